// The kernels of hierarchical cross-entropy for bfloat16 logits.
#include "hierarchical_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_hierarchical_storage<BFloat16>(const HierarchicalLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
