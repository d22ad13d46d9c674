// The kernels of ZLPR and the two-way loss for float32 logits.
#include "two_way_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_two_way_storage<float>(const TwoWayLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
