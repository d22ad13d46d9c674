// The kernels of hierarchical cross-entropy for float16 logits.
#include "hierarchical_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_hierarchical_storage<Float16>(const HierarchicalLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
