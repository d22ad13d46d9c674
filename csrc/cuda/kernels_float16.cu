// The kernels for float16 logits.
#include "scale_grad.cuh"
#include "softmax_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_storage<Float16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
template void launch_scale_grad<Float16>(const ScaleGradArgs&, int, void*);

}  // namespace gpu
}  // namespace longtail
