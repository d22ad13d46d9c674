// The kernels for float32 logits.
#include "scale_grad.cuh"
#include "softmax_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_storage<float>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
template void launch_scale_grad<float>(const ScaleGradArgs&, int, void*);

}  // namespace gpu
}  // namespace longtail
