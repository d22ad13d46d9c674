// ZLPR and the two-way loss over images [N, C, P]: threads along the pixels, which are contiguous, walk the classes in
// one sweep for the loss and one for the gradient. Groups of threads share the classes of the same pixels.
#pragma once

#include "two_way_sides.cuh"

namespace longtail {
namespace gpu {

// kCount neighbouring pixels of one image in one of the `groups` threads that share them.
template <typename Z, int kCount, bool kDense>
class SidesPixels {
 public:
  // first: of the pixels, counted over all images.
  LONGTAIL_DEVICE SidesPixels(const TwoWayLossArgs& args, int64_t first, int group, int groups)
      : a_(args), inverses_(args), group_(group), groups_(groups) {
    const int64_t image = first / a_.pixels, pixel = first - image * a_.pixels;
    logits_ = static_cast<const Z*>(a_.logits) + image * a_.logits_stride + pixel;
    grad_ = static_cast<Z*>(a_.grad) + image * a_.grad_stride + pixel;
    dense_ = image * a_.dense_stride + pixel;
    if constexpr (!kDense) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) target_[i] = class_target(a_, first + i);
    }
  }

  LONGTAIL_DEVICE void add_to(Sides (&s)[kCount]) const {
    const int classes = static_cast<int>(a_.num_classes);
#pragma unroll 1
    for (int j = group_; j < classes; j += kGroup * groups_) {
      float u[kGroup][kCount], y[kGroup][kCount];
      unsigned ignored[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) ignored[k] = load(j + k * groups_, u[k], y[k]);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float u_i[kGroup], y_i[kGroup];
        unsigned ignored_i = 0;
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          u_i[k] = u[k][i];
          y_i[k] = y[k][i];
          ignored_i |= (ignored[k] >> i & 1u) << k;
        }
        add_sides(s[i], u_i, y_i, ignored_i, inverses_);
      }
    }
  }

  LONGTAIL_DEVICE void store_grad(const SideTerms (&g)[kCount]) const {
    const int classes = static_cast<int>(a_.num_classes);
#pragma unroll 1
    for (int j = group_; j < classes; j += groups_) {
      float u[kCount], y[kCount];
      const unsigned ignored = load(j, u, y);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool counts = g[i].counted && (ignored >> i & 1u) == 0;
        u[i] = counts ? side_gradient(u[i], y[i], g[i], inverses_) : 0.0f;
      }
      Vector<Z, kCount>::store(grad_ + static_cast<int64_t>(j) * a_.grad_class_stride, u);
    }
  }

 private:
  static constexpr int kGroup = kCount > 1 ? 2 : 4;  // classes that are read before one is computed

  // Effective logits and targets of class j; pixels where it does not count, by bits: all, of a class that is none.
  LONGTAIL_DEVICE unsigned load(int64_t j, float (&u)[kCount], float (&y)[kCount]) const {
    if (j >= a_.num_classes) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) u[i] = y[i] = 0.0f;
      return ~0u;
    }
    Vector<Z, kCount> z;
    z.load(logits_ + j * a_.logits_class_stride);
    z.get(u);
    const float bias = a_.class_bias != nullptr ? load_constant(a_.class_bias + j) : 0.0f;
    unsigned ignored = 0;
    if constexpr (kDense) {
      const int64_t at = dense_ + j * a_.dense_class_stride;
      if (a_.dense_is_wide) {
        load_constants(static_cast<const float*>(a_.dense_target) + at, 0, true, y);
      } else {
        Vector<Z, kCount> narrow;
        narrow.load(static_cast<const Z*>(a_.dense_target) + at);
        narrow.get(y);
      }
      ignored = uncounted(a_, y);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      u[i] += bias;
      if constexpr (!kDense) y[i] = target_[i] == j ? 1.0f : 0.0f;
    }
    return ignored;
  }

  const TwoWayLossArgs& a_;
  const Inverses inverses_;
  const int group_, groups_;
  const Z* logits_;
  Z* grad_;
  int64_t dense_;  // where the pixels' targets begin
  int target_[kDense ? 1 : kCount];
};

// Bytes of shared memory: the sums of each pixel in each thread, then the pixel's terms; whether it counts.
constexpr int two_way_pixels_bytes(int threads, int width, int count) {
  return 16 * threads * count + 4 * width * count;
}

LONGTAIL_DEVICE SideTerms terms_of(const float4& x, float counted) { return {x.x, x.y, x.z, x.w, counted != 0.0f}; }

// The end of each pixel of a tile, by the sums of the groups that share it: one thread for each leaves its terms.
template <int kCount, bool kDense>
LONGTAIL_DEVICE void finish_tile(const TwoWayLossArgs& a, int64_t first, Pass pass, int width) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int groups = threads >> log2_of(width);
  float4* const slots = dynamic_shared<float4>();
  float* const counted = reinterpret_cast<float*>(slots + threads * kCount);
  const Inverses inverses(a);
#pragma unroll 1
  for (int pixel = thread; pixel < width * kCount && first + pixel < a.rows; pixel += threads) {
    const int slot = pixel % kCount * width + pixel / kCount;
    Sides s = empty_sides();
    for (int k = 0; pass != Pass::backward && k < groups; ++k) combine(s, slots[k * kCount * width + slot], inverses);
    const bool counts = kDense || class_target(a, first + pixel) >= 0;
    const SideTerms g = finish_sides_of(a, first + pixel, s, counts, pass, true);
    slots[slot] = float4{g.m_n, g.by_n, g.m_p, g.by_p};
    counted[slot] = g.counted ? 1.0f : 0.0f;
  }
}

// width: threads along the pixels, kCount of which each has; the others of a block share the classes of these.
// reads: logits [N, C, P] once, with both passes twice, the second time from cache; target [N, P], or [N, C, P] as
//   often; per pixel the sample weight, for a gradient the upstream gradient and, for `backward`, the stats [4, N P];
//   class_bias [C] per thread, from cache.
// writes: loss [N, P] and stats [4, N P] (unless `backward`); grad [N, C, P] (unless `loss`; may be the logits' own
//   memory).
// bytes: one pass over each of the matrices named here, and some 40 N P: the least there is.
template <typename Z, int kCount, bool kDense>
LONGTAIL_KERNEL(kBlockThreads, kTwoWayResident)
two_way_pixels_kernel(LONGTAIL_PARAMETER TwoWayLossArgs a, Pass pass, int width) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int groups = threads >> log2_of(width), lane = thread & (width - 1), group = thread >> log2_of(width);
  const int64_t tile = int64_t(width) * kCount, tiles = (a.rows + tile - 1) / tile;
  float4* const slots = dynamic_shared<float4>();
  const float* const counted = reinterpret_cast<const float*>(slots + threads * kCount);
  for (int64_t turn = blockIdx.x; turn < tiles; turn += gridDim.x) {
    // Backwards: what a pass before has left in the cache.
    const int64_t first = (pass == Pass::backward ? tiles - 1 - turn : turn) * tile;
    const int64_t pixel = min(first + lane * kCount, a.rows - kCount);
    const bool exists = first + lane * kCount < a.rows;
    const SidesPixels<Z, kCount, kDense> pixels(a, pixel, group, groups);
    if (pass != Pass::backward) {
      Sides s[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] = empty_sides();
      if (exists) pixels.add_to(s);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        slots[(group * kCount + i) * width + lane] = float4{s[i].n.m, s[i].n.d, s[i].p.m, s[i].p.d};
      }
      __syncthreads();
    }
    finish_tile<kCount, kDense>(a, first, pass, width);
    __syncthreads();
    if (pass != Pass::loss && exists) {
      SideTerms g[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        g[i] = terms_of(slots[i * width + lane], counted[i * width + lane]);
      }
      pixels.store_grad(g);
    }
    __syncthreads();
  }
}

}  // namespace gpu
}  // namespace longtail
