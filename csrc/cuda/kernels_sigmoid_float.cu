// The sigmoid kernels for float32 logits.
#include "sigmoid_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_sigmoid_storage<float>(const SigmoidLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
