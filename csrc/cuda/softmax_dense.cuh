// Class probabilities over rows [N, C]: some lanes of a warp, a block, or a cluster of blocks per row, in one sweep for
// the loss and one for the gradient.
#pragma once

#include "dense_row.cuh"

namespace longtail {
namespace gpu {

// Whether a class's share of the loss needs more than its logit and its probability.
inline bool has_dense_extras(const SoftmaxLossArgs& a) { return has_extras(a) || a.weight != nullptr; }

// lanes: threads of a warp per row, or 0 for all threads of a cluster.
// reads: logits and dense_target [N, C] once; per row the sample weight and, for `backward`, the upstream gradient and
//   the stats [N, 5]; class_bias, class_scale and weight [C] per row, from cache.
// writes: loss [N] and stats [N, 5], or, for `backward`, grad [N, C].
// bytes: one pass over each of the matrices named here, and some 30 N: the least there is.
template <typename Z, int kCount, bool kExtras, typename PassOf>
LONGTAIL_KERNEL(kBlockThreads, dense_resident(kCount, kExtras))
dense_rows_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a, PassOf pass, int lanes) {
  Joint joint;
  const int width = lanes > 0 ? lanes : static_cast<int>(blockDim.x);
  const int team = static_cast<int>(threadIdx.x) >> log2_of(width),
            thread = static_cast<int>(threadIdx.x) & (width - 1);
  const int64_t rows_per_block = static_cast<int>(blockDim.x) >> log2_of(width);
  const int64_t teams = (gridDim.x >> log2_of(joint.cluster())) * rows_per_block;
  // Every thread stays until the last row of its block is done: the joins need them all.
  for (int64_t first = (blockIdx.x >> log2_of(joint.cluster())) * rows_per_block; first < a.rows; first += teams) {
    const int64_t place = first + team, index = row_at(a, place, pass);
    DenseStats s = longtail::generic::empty_dense_stats<float>();
    if (place < a.rows) {
      const DenseRow<Z, kCount, kExtras> row(a, index, thread, width, joint.cluster(), joint.rank());
      if (makes_stats(pass)) s = row.stats();
      if (makes_grad(pass))
        row.store_grad(load_dense_grad(a, index), kept(static_cast<Z*>(a.grad) + index * a.grad_stride));
    }
    if (!makes_stats(pass)) continue;
    s = lanes > 0 ? join_lanes(s, lanes) : join_threads(joint, s);
    if (place < a.rows && thread == 0 && joint.rank() == 0) store_dense_loss(a, index, s);
    joint.next_row();
  }
  joint.meet();
}

// Whether vectors of the logits are vectors of every other matrix too.
inline Problem dense_problem_of(const SoftmaxLossArgs& a, Pass pass) {
  const int size = element_size(a.storage);
  const RowsInMemory logits = {a.logits, a.logits_stride, size};
  const bool alike = lie_alike(logits, {a.dense_target, a.dense_stride, a.dense_is_wide ? 4 : size}, a.rows) &&
                     (!makes_grad(pass) || lie_alike(logits, {a.grad, a.grad_stride, size}, a.rows));
  return {pass, size, a.rows, a.num_classes, false, alike, has_dense_extras(a), false, true};
}

template <typename Z, int kCount, typename PassOf>
void launch_dense_rows(const SoftmaxLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  const auto kernel =
      has_dense_extras(a) ? dense_rows_kernel<Z, kCount, true, PassOf> : dense_rows_kernel<Z, kCount, false, PassOf>;
  launch(kernel, grid_of(a.rows, plan), plan.threads, plan.cluster, plan.shared, stream, a, pass,
         plan.regime == Regime::warp ? plan.lanes : 0);
}

// Single elements are rare: one kernel has both passes of them.
template <typename Z>
void launch_dense_storage(const SoftmaxLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  constexpr int kCount = 16 / sizeof(Z);
  if (!plan.vector) return launch_dense_rows<Z, 1>(a, pass, plan, stream);
  if (pass == Pass::loss) return launch_dense_rows<Z, kCount>(a, Fixed<Pass::loss>(), plan, stream);
  launch_dense_rows<Z, kCount>(a, Fixed<Pass::backward>(), plan, stream);
}

// One storage type per compiled file.
extern template void launch_dense_storage<float>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
extern template void launch_dense_storage<BFloat16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
extern template void launch_dense_storage<Float16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

inline void softmax_dense_launch(const SoftmaxLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  switch (a.storage) {
    case Storage::float32:
      return launch_dense_storage<float>(a, pass, plan, stream);
    case Storage::bfloat16:
      return launch_dense_storage<BFloat16>(a, pass, plan, stream);
    case Storage::float16:
      return launch_dense_storage<Float16>(a, pass, plan, stream);
  }
}

}  // namespace gpu
}  // namespace longtail
