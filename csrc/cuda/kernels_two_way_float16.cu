// The kernels of ZLPR and the two-way loss for float16 logits.
#include "two_way_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_two_way_storage<Float16>(const TwoWayLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
