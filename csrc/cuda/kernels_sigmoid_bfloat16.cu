// The sigmoid kernels for bfloat16 logits.
#include "sigmoid_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_sigmoid_storage<BFloat16>(const SigmoidLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
