// Multiplies the rows of a gradient that was made in forward by the upstream gradient.
#pragma once

#include "scale_pixels.cuh"

namespace longtail {
namespace gpu {

constexpr int kScaleThreads = 256;
constexpr int kScaleGroup = 4;  // vectors of a thread that are under way together
template <int kCount>
constexpr int kShortGroup = kCount > 1 ? kScaleGroup : 2 * kScaleGroup;
// Bytes of a row whose threads would have little more than the edges of its vectors.
constexpr int kLongestShort = 1024;

// Vectors [first, end) of a row's body, `step` apart.
template <typename Z, int kCount>
LONGTAIL_DEVICE void scale_vectors(Z* body, int64_t first, int64_t step, int64_t end, float factor) {
  for (int64_t i = first; i < end; i += kScaleGroup * step) {
    Vector<Z, kCount> held[kScaleGroup];
#pragma unroll
    for (int k = 0; k < kScaleGroup; ++k) {
      if (i + k * step < end) held[k].load_streaming(body + (i + k * step) * kCount);
    }
#pragma unroll
    for (int k = 0; k < kScaleGroup; ++k) {
      if (i + k * step >= end) break;
      float x[kCount];
      held[k].get(x);
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] *= factor;
      Vector<Z, kCount>::store(body + (i + k * step) * kCount, x);
    }
  }
}

// `lanes` threads per part of a row, `parts` parts of each row.
// reads: factor [N], and target where it is not 1, once per part; grad [N, C] once, except in rows whose factor is 1 or
//   whose target is ignored. writes: grad, likewise.
// bytes: 4 N where the factors are 1, else 2 N C s for elements of s bytes: the least there is.
template <typename Z>
LONGTAIL_KERNEL(kScaleThreads, 4)
scale_grad_kernel(LONGTAIL_PARAMETER ScaleGradArgs a, int lanes, int64_t parts) {
  constexpr int kCount = 16 / sizeof(Z);
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1), teams = static_cast<int>(blockDim.x) / lanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * teams;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * teams + static_cast<int>(threadIdx.x) / lanes;
       unit < a.rows * parts; unit += step) {
    const int64_t row = parts == 1 ? unit : unit / parts, part = unit - row * parts;
    const float factor = scale_of(a, row);
    if (factor == 1.0f) continue;
    Z* grad = static_cast<Z*>(a.grad) + row * a.grad_stride;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(grad) % 16);
    const int64_t gap = (16 - past) % 16 / static_cast<int>(sizeof(Z));
    const int64_t head = gap < a.num_classes ? gap : a.num_classes, all = (a.num_classes - head) / kCount;
    const int64_t each = parts == 1 ? all : (all + parts - 1) / parts;
    const int64_t begin = part * each < all ? part * each : all, end = begin + each < all ? begin + each : all;
    scale_vectors<Z, kCount>(grad + head, begin + lane, lanes, end, factor);
    if (part == 0) scale_vectors<Z, 1>(grad, lane, lanes, head, factor);
    if (part == parts - 1) scale_vectors<Z, 1>(grad, head + all * kCount + lane, lanes, a.num_classes, factor);
  }
}

// Rows that are too short for threads of their own, without gaps: a vector, of no more elements than a row has, is of
// one row or of two.
// reads: factor [N], and target [N] where it is not 1; grad [N, C] once, except for vectors that stay as they are.
// writes: grad, likewise.
// bytes: 4 where one factor of 1 serves all rows, 4 N where each is 1, else 2 N C s and at most 12 N.
template <typename Z, int kCount>
LONGTAIL_KERNEL(kScaleThreads, 4)
scale_short_rows_kernel(LONGTAIL_PARAMETER ScaleGradArgs a) {
  constexpr int kGroup = kShortGroup<kCount>, kTile = kGroup * kScaleThreads * kCount;
  if (a.grad_loss_stride == 0 && *a.grad_loss == 1.0f) return;
  const auto classes = static_cast<uint32_t>(a.num_classes);
  const int64_t all = a.rows * a.num_classes;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile; tile < all;
       tile += static_cast<int64_t>(gridDim.x) * kTile) {
    const int64_t first = tile / a.num_classes;
    const auto column = static_cast<uint32_t>(tile - first * a.num_classes);
    Z* const grad = static_cast<Z*>(a.grad) + tile;
    const int left = all - tile < kTile ? static_cast<int>(all - tile) : kTile;
    float here[kGroup], after[kGroup];  // what multiplies the elements of a vector before `border`, and the others
    int border[kGroup];
    bool whole[kGroup];
    Vector<Z, kCount> held[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int at = (k * kScaleThreads + static_cast<int>(threadIdx.x)) * kCount;
      const uint32_t past = column + static_cast<uint32_t>(at), rows = past / classes;
      const int64_t row = first + rows;
      border[k] = static_cast<int>((rows + 1) * classes - past);
      here[k] = at < left ? scale_of(a, row) : 1.0f;
      after[k] = kCount > 1 && border[k] < kCount && row + 1 < a.rows ? scale_of(a, row + 1) : 1.0f;
      whole[k] = kCount == 1 || at + kCount <= left;
      if ((here[k] != 1.0f || after[k] != 1.0f) && whole[k]) held[k].load_streaming(grad + at);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int at = (k * kScaleThreads + static_cast<int>(threadIdx.x)) * kCount;
      if (here[k] == 1.0f && after[k] == 1.0f) continue;
      if (whole[k]) {
        float x[kCount];
        held[k].get(x);
#pragma unroll
        for (int j = 0; j < kCount; ++j) x[j] *= j < border[k] ? here[k] : after[k];
        Vector<Z, kCount>::store(grad + at, x);
      } else {  // the matrix ends within this vector
#pragma unroll 1
        for (int j = 0; at + j < left; ++j) {
          from_float(to_float(grad[at + j]) * (j < border[k] ? here[k] : after[k]), grad[at + j]);
        }
      }
    }
  }
}

template <typename Z, int kCount>
void launch_scale_short_rows(const ScaleGradArgs& a, int processors, void* stream) {
  const int64_t tiles = ceil_div(a.rows * a.num_classes, kShortGroup<kCount> * kScaleThreads * kCount);
  const int64_t most = static_cast<int64_t>(processors) * 8;
  launch(scale_short_rows_kernel<Z, kCount>, tiles < most ? tiles : most, kScaleThreads, 1, 0, stream, a);
}

template <typename Z>
void launch_scale_grad(const ScaleGradArgs& args, int processors, void* stream) {
  constexpr int64_t kCount = 16 / sizeof(Z), kPerThread = kScaleGroup * kCount;
  ScaleGradArgs a = args;
  const int64_t images = a.pixels > 0 ? a.rows / a.pixels : a.rows, image = a.num_classes * (a.rows / images);
  const bool whole = a.pixels == 0 || a.grad_class_stride == a.pixels || a.num_classes == 1;
  if (a.grad_loss_stride == 0 && a.target == nullptr && whole && (a.grad_stride == image || images == 1)) {
    a.num_classes *= a.rows;  // one factor, no gaps: one long row
    a.rows = 1;
  } else if (a.pixels > 0) {
    const bool aligned =
        aligned_pixels(a.grad, sizeof(Z), images, a.num_classes, a.pixels, a.grad_stride, a.grad_class_stride);
    return aligned ? launch_scale_pixels<Z, kCount>(a, processors, stream)
                   : launch_scale_pixels<Z, 1>(a, processors, stream);
  } else if (a.grad_stride == a.num_classes && a.num_classes * sizeof(Z) <= kLongestShort) {
    const bool vectors = a.num_classes >= kCount && reinterpret_cast<uintptr_t>(a.grad) % 16 == 0;
    return vectors ? launch_scale_short_rows<Z, kCount>(a, processors, stream)
                   : launch_scale_short_rows<Z, 1>(a, processors, stream);
  }
  const int64_t chunks = ceil_div(a.num_classes, kPerThread);
  const int lanes = power_of_two(chunks, 1, kScaleThreads), teams = kScaleThreads / lanes;
  // Enough parts that every multiprocessor has a full set of threads.
  const int64_t most = static_cast<int64_t>(processors) * 8 * teams, needed = ceil_div(chunks, lanes);
  const int64_t wanted = ceil_div(most, a.rows), parts = wanted < needed ? wanted : needed;
  const int64_t units = a.rows * parts, blocks = ceil_div(units < most ? units : most, teams);
  launch(scale_grad_kernel<Z>, blocks, kScaleThreads, 1, 0, stream, a, lanes, parts);
}

extern template void launch_scale_grad<float>(const ScaleGradArgs&, int, void*);
extern template void launch_scale_grad<BFloat16>(const ScaleGradArgs&, int, void*);
extern template void launch_scale_grad<Float16>(const ScaleGradArgs&, int, void*);

inline void scale_grad_launch(const ScaleGradArgs& a, int processors, void* stream) {
  if (a.rows == 0 || a.num_classes == 0) return;
  switch (a.storage) {
    case Storage::float32:
      return launch_scale_grad<float>(a, processors, stream);
    case Storage::bfloat16:
      return launch_scale_grad<BFloat16>(a, processors, stream);
    case Storage::float16:
      return launch_scale_grad<Float16>(a, processors, stream);
  }
}

}  // namespace gpu
}  // namespace longtail
