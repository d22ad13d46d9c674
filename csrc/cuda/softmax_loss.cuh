// Launches of the softmax family: from a problem to its plan, from a plan to its kernel.
#pragma once

#include "shared_rows.cuh"
#include "softmax_dense.cuh"
#include "softmax_pixels.cuh"
#include "sweep_rows.cuh"
#include "warp_rows.cuh"

namespace longtail {
namespace gpu {

// How the rows lie towards 16-byte boundaries.
inline Problem problem_of(const SoftmaxLossArgs& a, Pass pass) {
  if (a.dense) return dense_problem_of(a, pass);
  if (a.pixels > 0) return pixel_problem_of(a, pass);
  const auto past = [&](const void* p, int64_t stride, int64_t row) {
    return static_cast<int>((reinterpret_cast<uintptr_t>(p) + row * stride * element_size(a.storage)) % 16);
  };
  const bool writes = makes_grad(pass);
  bool aligned = a.num_classes * element_size(a.storage) % 16 == 0, alike = true;
  for (int64_t row = 0; row < (a.rows < 2 ? a.rows : 2); ++row) {
    const int z = past(a.logits, a.logits_stride, row), g = writes ? past(a.grad, a.grad_stride, row) : z;
    aligned = aligned && z == 0 && g == 0;
    alike = alike && z == g;
  }
  return {pass, element_size(a.storage), a.rows, a.num_classes, aligned, alike, has_extras(a), false};
}

inline Plan softmax_plan_of(const Problem& p, const Device& device) {
  Plan plan = p.dense ? sigmoid_plan_of(p, device) : p.images ? pixel_plan_of(p, device) : plan_of(p, device);
  plan.shared = static_cast<int>(p.images ? pixel_shared_bytes(plan, p) : shared_bytes(plan, p));
  return plan;
}

template <typename Z, int kCount, bool kExtras, typename PassOf>
void launch_rows(const SoftmaxLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  const int64_t grid = grid_of(a.rows, plan);
  constexpr bool kAny = std::is_same_v<PassOf, Pass>;  // any pass
  if (plan.regime == Regime::sweep) {
    launch(sweep_rows_kernel<Z, kCount, kExtras, PassOf>, grid, plan.threads, plan.cluster, plan.shared, stream, a,
           pass);
  } else if (plan.regime == Regime::warp) {
    if constexpr (kAny || !of_shard(PassOf())) {
      launch(warp_rows_kernel<Z, kCount, kExtras, PassOf>, grid, plan.threads, 1, 0, stream, a, pass, plan.lanes,
             plan.batch);
    }
  } else if constexpr (kCount > 1 && (kAny || PassOf() == Pass::loss_and_grad)) {
    launch(shared_rows_kernel<Z, kExtras>, grid, plan.threads, plan.cluster, plan.shared, stream, a);
  }
}

// Kernels with whole vectors and without extras are compiled for their pass: it takes registers from the others.
template <typename Z>
void launch_storage(const SoftmaxLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  constexpr int kCount = 16 / sizeof(Z);
  const bool extras = has_extras(a) || pass == Pass::apply;  // row_grad says row by row whether there is smoothing
  if (pass == Pass::apply && plan.vector) return launch_rows<Z, kCount, true>(a, Fixed<Pass::apply>(), plan, stream);
  if (!plan.vector)
    return (extras ? launch_rows<Z, 1, true, Pass> : launch_rows<Z, 1, false, Pass>)(a, pass, plan, stream);
  if (extras) return launch_rows<Z, kCount, true>(a, pass, plan, stream);
  switch (pass) {
    case Pass::loss:
      return launch_rows<Z, kCount, false>(a, Fixed<Pass::loss>(), plan, stream);
    case Pass::backward:
      return launch_rows<Z, kCount, false>(a, Fixed<Pass::backward>(), plan, stream);
    case Pass::loss_and_grad:
      return launch_rows<Z, kCount, false>(a, Fixed<Pass::loss_and_grad>(), plan, stream);
    default:
      return launch_rows<Z, kCount, false>(a, Fixed<Pass::accumulate>(), plan, stream);
  }
}

// One storage type per compiled file.
extern template void launch_storage<float>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
extern template void launch_storage<BFloat16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
extern template void launch_storage<Float16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

// Loss, gradient or both of args.rows rows on a cudaStream_t; nothing is allocated, nothing waited for.
inline void softmax_loss_launch(const SoftmaxLossArgs& args, Pass pass, const Plan& plan, void* stream) {
  if (args.rows == 0) return;
  SoftmaxLossArgs a = args;
  a.smooth = a.options.label_smoothing / static_cast<float>(a.num_classes);
  if (a.dense) return softmax_dense_launch(a, pass, plan, stream);
  if (a.pixels > 0) return softmax_pixels_launch(a, pass, plan, stream);
  switch (a.storage) {
    case Storage::float32:
      return launch_storage<float>(a, pass, plan, stream);
    case Storage::bfloat16:
      return launch_storage<BFloat16>(a, pass, plan, stream);
    case Storage::float16:
      return launch_storage<Float16>(a, pass, plan, stream);
  }
}

}  // namespace gpu
}  // namespace longtail
