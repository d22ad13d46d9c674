// The kernels of class probabilities for float32 logits.
#include "softmax_dense.cuh"

namespace longtail {
namespace gpu {

template void launch_dense_storage<float>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
