// The kernels of class probabilities for bfloat16 logits.
#include "softmax_dense.cuh"

namespace longtail {
namespace gpu {

template void launch_dense_storage<BFloat16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
