// The kernels of ZLPR and the two-way loss for bfloat16 logits.
#include "two_way_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_two_way_storage<BFloat16>(const TwoWayLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
