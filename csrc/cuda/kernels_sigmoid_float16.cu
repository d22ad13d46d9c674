// The sigmoid kernels for float16 logits.
#include "sigmoid_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_sigmoid_storage<Float16>(const SigmoidLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
