// The kernels for images of float32 logits.
#include "softmax_pixels.cuh"

namespace longtail {
namespace gpu {

template void launch_pixels<float>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
