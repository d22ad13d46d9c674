// The kernels of the sigmoid family with every option for float32 logits.
#include "sigmoid_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_general_sigmoid_storage<float>(const SigmoidLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
