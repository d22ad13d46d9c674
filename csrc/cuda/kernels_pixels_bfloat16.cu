// The kernels for images of bfloat16 logits.
#include "softmax_pixels.cuh"

namespace longtail {
namespace gpu {

template void launch_pixels<BFloat16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
