// The kernels for images of float16 logits.
#include "softmax_pixels.cuh"

namespace longtail {
namespace gpu {

template void launch_pixels<Float16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
