// The kernels for bfloat16 logits.
#include "scale_grad.cuh"
#include "softmax_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_storage<BFloat16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
template void launch_scale_grad<BFloat16>(const ScaleGradArgs&, int, void*);

}  // namespace gpu
}  // namespace longtail
