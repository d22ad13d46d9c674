// The kernels of hierarchical cross-entropy for float32 logits.
#include "hierarchical_loss.cuh"

namespace longtail {
namespace gpu {

template void launch_hierarchical_storage<float>(const HierarchicalLossArgs&, Pass, const Plan&, void*);

}  // namespace gpu
}  // namespace longtail
