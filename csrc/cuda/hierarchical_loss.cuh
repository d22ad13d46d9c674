// Launches of hierarchical cross-entropy: from a problem to its plan, from a plan to its kernel.
#pragma once

#include "hierarchical_rows.cuh"

namespace longtail {
namespace gpu {

inline Problem problem_of(const HierarchicalLossArgs& a, Pass pass) {
  const int size = element_size(a.storage);
  const bool alike =
      !makes_grad(pass) || lie_alike({a.logits, a.logits_stride, size}, {a.grad, a.grad_stride, size}, a.rows);
  return {pass, size, a.rows, a.num_classes, false, alike, a.class_bias != nullptr || a.order != nullptr};
}

template <typename Z, int kCount, typename PassOf>
void launch_hierarchical(const HierarchicalLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  launch(hierarchical_rows_kernel<Z, kCount, PassOf>, grid_of(a.rows, plan), plan.threads, 1,
         hierarchical_shared_bytes(plan.threads), stream, a, pass);
}

// Single elements are rare: one kernel has all passes of them.
template <typename Z>
void launch_hierarchical_storage(const HierarchicalLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  constexpr int kCount = 16 / sizeof(Z);
  if (!plan.vector) return launch_hierarchical<Z, 1>(a, pass, plan, stream);
  if (pass == Pass::loss) return launch_hierarchical<Z, kCount>(a, Fixed<Pass::loss>(), plan, stream);
  if (pass == Pass::backward) return launch_hierarchical<Z, kCount>(a, Fixed<Pass::backward>(), plan, stream);
  launch_hierarchical<Z, kCount>(a, Fixed<Pass::loss_and_grad>(), plan, stream);
}

// One storage type per compiled file.
extern template void launch_hierarchical_storage<float>(const HierarchicalLossArgs&, Pass, const Plan&, void*);
extern template void launch_hierarchical_storage<BFloat16>(const HierarchicalLossArgs&, Pass, const Plan&, void*);
extern template void launch_hierarchical_storage<Float16>(const HierarchicalLossArgs&, Pass, const Plan&, void*);

// Loss, gradient or both of args.rows rows on a cudaStream_t; nothing is allocated, nothing waited for.
inline void hierarchical_loss_launch(const HierarchicalLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  if (a.rows == 0) return;
  switch (a.storage) {
    case Storage::float32:
      return launch_hierarchical_storage<float>(a, pass, plan, stream);
    case Storage::bfloat16:
      return launch_hierarchical_storage<BFloat16>(a, pass, plan, stream);
    case Storage::float16:
      return launch_hierarchical_storage<Float16>(a, pass, plan, stream);
  }
}

}  // namespace gpu
}  // namespace longtail
