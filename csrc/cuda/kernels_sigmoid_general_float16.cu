// The kernels of the sigmoid family with every option for float16 logits.
#include "sigmoid_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_general_sigmoid_storage<Float16>(const SigmoidLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
