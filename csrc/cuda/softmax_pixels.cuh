// The softmax family over images [N, C, P] of contiguous pixels: threads run along the pixels, the classes are walked
// with their stride.
#pragma once

#include "pixel_block.cuh"

namespace longtail {
namespace gpu {

// `lanes` vectors of pixels per block, of which blockDim.x / lanes threads share the classes.
// grid: a block for each, at most 2^30, which go on to the pixels beyond.
// Sweeps: one for the stats (unless `backward`), one for the gradient (unless `loss`), in reverse.
// reads: logits [N, C, P] once per sweep, or once where they are kept; target; per pixel its target's entries
//   of the vectors [C], the sample weight, the upstream gradient (unless `loss`), the stats (`backward`); the vectors
//   [C] of what touches every element, weight with label smoothing, per thread, from cache; with label smoothing, or
//   where it changes the other classes, the target's logit once more.
// writes: loss [N * P] and the stats, 5 columns of N * P (unless `backward`); grad [N, C, P] (unless `loss`; may be the
//   logits' own memory).
// bytes: N C P s (loss) or 2 N C P s (backward, or both where logits are kept) for elements of s bytes, the least there
//   is; 3 N C P s with both sweeps, of which the pixels in flight find as much in the L2 cache as fits there; some 40
//   N P.
template <typename Z, int kCount, bool kExtras, typename PassOf>
LONGTAIL_KERNEL(pixel_threads(kCount), pixel_resident(kCount))
softmax_pixels_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a, PassOf fixed, int lanes, bool keeps) {
  const Pass pass = fixed;
  PixelBlock<Z, kCount, kExtras> block(a, pass, lanes, keeps);
  const int64_t units = (a.rows + block.pixels - 1) >> log2_of(block.pixels);
  for (int64_t place = blockIdx.x; place < units; place += gridDim.x) {
    // Backward goes from the last to the first, as row_at.
    block.go_to(pass == Pass::backward ? units - 1 - place : place);
    if (pass != Pass::backward) {
      Vector<Z, kCount> held[block.kGroup];
      block.load(held, block.part);
      block.load_targets();
      __syncthreads();
      block.sweep_stats(held);
      __syncthreads();
    }
    block.finish();
    if (pass == Pass::loss) continue;
    __syncthreads();
    block.sweep_grad();
    __syncthreads();  // others still use what the next pixels' targets overwrite
  }
}

inline Problem pixel_problem_of(const SoftmaxLossArgs& a, Pass pass) {
  const int size = element_size(a.storage);
  const int64_t images = a.rows / a.pixels, c = a.num_classes, p = a.pixels;
  const bool aligned = aligned_pixels(a.logits, size, images, c, p, a.logits_stride, a.logits_class_stride);
  const bool also =
      pass == Pass::loss || aligned_pixels(a.grad, size, images, c, p, a.grad_stride, a.grad_class_stride);
  return {pass, size, a.rows, c, aligned && also, aligned && also, has_extras(a), true, false, is_by_target(a)};
}

template <typename Z, int kCount, bool kExtras, typename PassOf>
void launch_pixels_of(const SoftmaxLossArgs& a, PassOf pass, const Plan& plan, void* stream) {
  constexpr int64_t kMost = int64_t(1) << 30;
  const int64_t units = ceil_div(a.rows, plan.lanes * kCount);
  launch(softmax_pixels_kernel<Z, kCount, kExtras, PassOf>, units < kMost ? units : kMost, plan.threads, 1, plan.shared,
         stream, a, pass, plan.lanes, plan.regime == Regime::shared);
}

template <typename Z>
void launch_pixels(const SoftmaxLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  constexpr int kCount = 16 / sizeof(Z);
  const bool extras = has_extras(a);
  if (!plan.vector)
    return (extras ? launch_pixels_of<Z, 1, true, Pass> : launch_pixels_of<Z, 1, false, Pass>)(a, pass, plan, stream);
  if (extras) return launch_pixels_of<Z, kCount, true>(a, pass, plan, stream);
  if (pass == Pass::loss) return launch_pixels_of<Z, kCount, false>(a, Fixed<Pass::loss>(), plan, stream);
  if (pass == Pass::backward) return launch_pixels_of<Z, kCount, false>(a, Fixed<Pass::backward>(), plan, stream);
  launch_pixels_of<Z, kCount, false>(a, Fixed<Pass::loss_and_grad>(), plan, stream);
}

// One storage type per compiled file.
extern template void launch_pixels<float>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
extern template void launch_pixels<BFloat16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
extern template void launch_pixels<Float16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);

inline void softmax_pixels_launch(const SoftmaxLossArgs& a, Pass pass, const Plan& plan, void* stream) {
  switch (a.storage) {
    case Storage::float32:
      return launch_pixels<float>(a, pass, plan, stream);
    case Storage::bfloat16:
      return launch_pixels<BFloat16>(a, pass, plan, stream);
    case Storage::float16:
      return launch_pixels<Float16>(a, pass, plan, stream);
  }
}

}  // namespace gpu
}  // namespace longtail
