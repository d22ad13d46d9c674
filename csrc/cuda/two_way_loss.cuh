// Launches of ZLPR and the two-way loss: from a problem to its plan, from a plan to its kernel.
#pragma once

#include "two_way_pixels.cuh"
#include "two_way_rows.cuh"

namespace longtail {
namespace gpu {

// Whether vectors of the logits are vectors of every other matrix too; of images whether 16 bytes of neighbouring
// pixels are whole vectors of each.
inline Problem problem_of(const TwoWayLossArgs& a, Pass pass) {
  const int size = element_size(a.storage), target = a.dense_is_wide ? 4 : size;
  const auto rows_alike = [&](const void* p, int64_t stride, int element) {
    return lie_alike({a.logits, a.logits_stride, size}, {p, stride, element}, a.rows);
  };
  const auto whole = [&](const void* p, int64_t stride, int64_t class_stride, int element) {
    return aligned_pixels(p, element, a.rows / a.pixels, a.num_classes, a.pixels, stride, class_stride);
  };
  bool alike;
  if (a.pixels > 0) {
    alike = whole(a.logits, a.logits_stride, a.logits_class_stride, size) &&
            (pass == Pass::loss || whole(a.grad, a.grad_stride, a.grad_class_stride, size)) &&
            (a.dense_target == nullptr || whole(a.dense_target, a.dense_stride, a.dense_class_stride, target));
  } else {
    alike = (pass == Pass::loss || rows_alike(a.grad, a.grad_stride, size)) &&
            (a.dense_target == nullptr || rows_alike(a.dense_target, a.dense_stride, target));
  }
  return {pass, size, a.rows, a.num_classes, false, alike, false, a.pixels > 0};
}

inline Plan plan_of(const TwoWayLossArgs& a, Pass pass, const Device& device) {
  const Problem problem = problem_of(a, pass);
  return a.pixels > 0 ? sigmoid_pixels_plan_of(problem, device) : sigmoid_plan_of(problem, device);
}

template <typename Z, int kCount, typename PassOf>
void launch_two_way_rows(const TwoWayLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  const bool in_warp = plan.regime == Regime::warp;
  const int shared = in_warp ? 0 : joint_bytes(plan.threads, plan.cluster);
  // Not by dense_target, which is null where there are no classes.
  const auto kernel = a.target == nullptr ? two_way_rows_kernel<Z, kCount, true, PassOf>
                                          : two_way_rows_kernel<Z, kCount, false, PassOf>;
  launch(kernel, grid_of(a.rows, plan), plan.threads, plan.cluster, shared, stream, a, pass, in_warp ? plan.lanes : 0);
}

// One kernel has all passes.
template <typename Z, int kCount>
void launch_two_way_pixels(const TwoWayLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  constexpr int64_t kMost = int64_t(1) << 30;  // kernels go on to the pixels beyond
  const int64_t tiles = ceil_div(a.rows, int64_t(plan.lanes) * kCount);
  const auto kernel =
      a.target == nullptr ? two_way_pixels_kernel<Z, kCount, true> : two_way_pixels_kernel<Z, kCount, false>;
  launch(kernel, tiles < kMost ? tiles : kMost, plan.threads, 1, two_way_pixels_bytes(plan.threads, plan.lanes, kCount),
         stream, a, pass, plan.lanes);
}

// Single elements are rare: one kernel has all passes of them.
template <typename Z>
void launch_two_way_storage(const TwoWayLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  constexpr int kCount = 16 / sizeof(Z);
  if (a.pixels > 0) {
    return (plan.vector ? launch_two_way_pixels<Z, kCount> : launch_two_way_pixels<Z, 1>)(a, pass, plan, stream);
  }
  if (!plan.vector) return launch_two_way_rows<Z, 1>(a, pass, plan, stream);
  if (pass == Pass::loss) return launch_two_way_rows<Z, kCount>(a, Fixed<Pass::loss>(), plan, stream);
  if (pass == Pass::backward) return launch_two_way_rows<Z, kCount>(a, Fixed<Pass::backward>(), plan, stream);
  launch_two_way_rows<Z, kCount>(a, Fixed<Pass::loss_and_grad>(), plan, stream);
}

// One storage type per compiled file.
extern template void launch_two_way_storage<float>(const TwoWayLossArgs&, Pass, const Plan&, void*);
extern template void launch_two_way_storage<BFloat16>(const TwoWayLossArgs&, Pass, const Plan&, void*);
extern template void launch_two_way_storage<Float16>(const TwoWayLossArgs&, Pass, const Plan&, void*);

// Loss, gradient or both of args.rows rows on a cudaStream_t; nothing is allocated, nothing waited for.
inline void two_way_loss_launch(const TwoWayLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  if (a.rows == 0) return;
  switch (a.storage) {
    case Storage::float32:
      return launch_two_way_storage<float>(a, pass, plan, stream);
    case Storage::bfloat16:
      return launch_two_way_storage<BFloat16>(a, pass, plan, stream);
    case Storage::float16:
      return launch_two_way_storage<Float16>(a, pass, plan, stream);
  }
}

}  // namespace gpu
}  // namespace longtail
