// Launches of the sigmoid family: from a problem to its plan, from a plan to its kernel.
#pragma once

#include "sigmoid_general_pixels.cuh"
#include "sigmoid_general_rows.cuh"
#include "sigmoid_pixels.cuh"
#include "sigmoid_rows.cuh"

namespace longtail {
namespace gpu {

// Whether vectors of the logits are vectors of every other matrix too.
inline bool all_alike(const SigmoidLossArgs& a, Pass pass) {
  const int size = element_size(a.storage);
  const auto alike = [&](const void* p, int64_t stride, int element) {
    return lie_alike({a.logits, a.logits_stride, size}, {p, stride, element}, a.rows);
  };
  const bool has_loss = pass != Pass::backward, has_grad = pass != Pass::loss;
  return (!has_grad || alike(a.grad, a.grad_stride, size)) &&
         (a.dense_target == nullptr || alike(a.dense_target, a.dense_stride, a.dense_is_wide ? 4 : size)) &&
         (!(has_loss && a.elementwise_loss) || alike(a.loss, a.num_classes, 4)) &&
         (!(has_grad && a.elementwise_upstream) || alike(a.grad_loss, a.num_classes, 4));
}

// The same of images: whether 16 bytes of neighbouring pixels are whole vectors of every array.
inline bool all_whole(const SigmoidLossArgs& a, Pass pass) {
  const int size = element_size(a.storage);
  const bool has_loss = pass != Pass::backward, has_grad = pass != Pass::loss;
  const auto begins = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const auto whole = [&](const void* p, int64_t stride, int64_t class_stride, int element) {
    return aligned_pixels(p, element, a.rows / a.pixels, a.num_classes, a.pixels, stride, class_stride);
  };
  return whole(a.logits, a.logits_stride, a.logits_class_stride, size) &&
         (!has_grad || whole(a.grad, a.grad_stride, a.grad_class_stride, size)) &&
         (a.dense_target == nullptr ||
          whole(a.dense_target, a.dense_stride, a.dense_class_stride, a.dense_is_wide ? 4 : size)) &&
         (!has_loss || begins(a.loss)) && (!(has_grad && a.elementwise_upstream) || begins(a.grad_loss));
}

inline Problem problem_of(const SigmoidLossArgs& a, Pass pass) {
  const bool alike = a.pixels > 0 ? all_whole(a, pass) : all_alike(a, pass);
  return {pass, element_size(a.storage), a.rows, a.num_classes, false, alike, false, a.pixels > 0};
}

inline Plan plan_of(const SigmoidLossArgs& a, Pass pass, const Device& device) {
  const Problem problem = problem_of(a, pass);
  return a.pixels > 0 ? sigmoid_pixels_plan_of(problem, device) : sigmoid_plan_of(problem, device);
}

template <typename Z, int kCount, typename PassOf>
void launch_sigmoid_rows(const SigmoidLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  const bool in_warp = plan.regime == Regime::warp;
  const int shared = in_warp ? 0 : joint_bytes(plan.threads, plan.cluster);
  // Not by dense_target, which is null where there are no classes.
  const auto kernel = a.target == nullptr ? sigmoid_rows_kernel<Z, kCount, true, PassOf>
                                          : sigmoid_rows_kernel<Z, kCount, false, PassOf>;
  launch(kernel, grid_of(a.rows, plan), plan.threads, plan.cluster, shared, stream, a, pass, in_warp ? plan.lanes : 0);
}

// Pixels, `plan.lanes` threads along them.
struct PixelGrid {
  int64_t blocks;
  int shared;
};

inline PixelGrid pixel_grid(const SigmoidLossArgs& a, const Plan& plan, int count) {
  constexpr int64_t kMost = int64_t(1) << 30;  // kernels go on to the pixels beyond
  const int64_t tiles = ceil_div(a.rows, int64_t(plan.lanes) * count);
  return {tiles < kMost ? tiles : kMost, plan.threads > plan.lanes ? plan.threads * count * 4 : 0};
}

template <typename Z, int kCount, typename PassOf>
void launch_sigmoid_pixels(const SigmoidLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  const auto [grid, shared] = pixel_grid(a, plan, kCount);
  if (a.target == nullptr) {  // dense targets take so much that a pass of their own gains them little
    launch(sigmoid_pixels_kernel<Z, kCount, true, Pass>, grid, plan.threads, 1, shared, stream, a, Pass(pass),
           plan.lanes);
  } else {
    launch(sigmoid_pixels_kernel<Z, kCount, false, PassOf>, grid, plan.threads, 1, shared, stream, a, pass, plan.lanes);
  }
}

template <typename Z, int kCount, typename PassOf>
void launch_sigmoid(const SigmoidLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  (a.pixels > 0 ? launch_sigmoid_pixels<Z, kCount, PassOf> : launch_sigmoid_rows<Z, kCount, PassOf>)(a, pass, plan,
                                                                                                     stream);
}

// Launches that are not plain: one kernel has all passes and targets. Of pixels, kFew of which a thread has.
template <typename Z, int kCount, int kFew>
void launch_general_sigmoid(const SigmoidLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  const auto options = longtail::generic::general_options<float>(a);
  if (a.pixels > 0) {
    const auto [grid, shared] = pixel_grid(a, plan, kFew);
    return launch(general_sigmoid_pixels_kernel<Z, kFew>, grid, plan.threads, 1, shared, stream, a, options, pass,
                  plan.lanes);
  }
  const bool in_warp = plan.regime == Regime::warp;
  const int shared = in_warp ? 0 : joint_bytes(plan.threads, plan.cluster);
  launch(general_sigmoid_rows_kernel<Z, kCount>, grid_of(a.rows, plan), plan.threads, plan.cluster, shared, stream, a,
         options, pass, in_warp ? plan.lanes : 0);
}

template <typename Z>
void launch_general_sigmoid_storage(const SigmoidLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  (plan.vector ? launch_general_sigmoid<Z, 16 / sizeof(Z), 4> : launch_general_sigmoid<Z, 1, 1>)(a, pass, plan, stream);
}

// One storage type per compiled file.
extern template void launch_general_sigmoid_storage<float>(const SigmoidLossArgs&, Pass, const Plan&, void*);
extern template void launch_general_sigmoid_storage<BFloat16>(const SigmoidLossArgs&, Pass, const Plan&, void*);
extern template void launch_general_sigmoid_storage<Float16>(const SigmoidLossArgs&, Pass, const Plan&, void*);

// Single elements are rare: one kernel has all passes of them.
template <typename Z>
void launch_sigmoid_storage(const SigmoidLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  constexpr int kCount = 16 / sizeof(Z);
  if (!a.plain) return launch_general_sigmoid_storage<Z>(a, pass, plan, stream);
  if (!plan.vector) return launch_sigmoid<Z, 1>(a, pass, plan, stream);
  if (pass == Pass::loss) return launch_sigmoid<Z, kCount>(a, Fixed<Pass::loss>(), plan, stream);
  if (pass == Pass::backward) return launch_sigmoid<Z, kCount>(a, Fixed<Pass::backward>(), plan, stream);
  launch_sigmoid<Z, kCount>(a, Fixed<Pass::loss_and_grad>(), plan, stream);
}

// One storage type per compiled file.
extern template void launch_sigmoid_storage<float>(const SigmoidLossArgs&, Pass, const Plan&, void*);
extern template void launch_sigmoid_storage<BFloat16>(const SigmoidLossArgs&, Pass, const Plan&, void*);
extern template void launch_sigmoid_storage<Float16>(const SigmoidLossArgs&, Pass, const Plan&, void*);

// Loss, gradient or both of args.rows rows on a cudaStream_t; nothing is allocated, nothing waited for.
inline void sigmoid_loss_launch(const SigmoidLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  if (a.rows == 0) return;
  switch (a.storage) {
    case Storage::float32:
      return launch_sigmoid_storage<float>(a, pass, plan, stream);
    case Storage::bfloat16:
      return launch_sigmoid_storage<BFloat16>(a, pass, plan, stream);
    case Storage::float16:
      return launch_sigmoid_storage<Float16>(a, pass, plan, stream);
  }
}

}  // namespace gpu
}  // namespace longtail
