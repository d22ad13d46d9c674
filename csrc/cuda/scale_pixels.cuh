// Multiplies the pixels of a gradient [N, C, P] that was made in forward by the upstream gradient.
#pragma once

#include "plan.h"
#include "scale_grad.h"
#include "vectors.cuh"

namespace longtail {
namespace gpu {

constexpr int kScalePixelsThreads = 256;
constexpr int kScaleClasses = 4;  // of a thread, under way together

// What multiplies a row: 1 where the target is ignored, whatever the upstream gradient.
LONGTAIL_DEVICE float scale_of(const ScaleGradArgs& a, int64_t row) {
  const float factor = a.grad_loss[row * a.grad_loss_stride];
  if (factor == 1.0f || a.target == nullptr) return factor;
  return a.target[row * a.target_stride] == a.ignore_index ? 1.0f : factor;
}

// A thread has a vector of pixels and `chunk` neighbouring classes of it, `chunks` of which are all classes.
// reads: factor [N * P], and target where it is not 1, once per chunk; grad [N, C, P] once, except for threads whose
//   factors are all 1. writes: grad, likewise.
// bytes: 4 N P per chunk where the factors are 1, else 2 N C P s for elements of s bytes: the least there is.
template <typename Z, int kCount>
LONGTAIL_KERNEL(kScalePixelsThreads, 4)
scale_pixels_kernel(LONGTAIL_PARAMETER ScaleGradArgs a, int chunk, int64_t chunks) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * static_cast<int>(blockDim.x), vectors = a.rows / kCount;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
       unit < vectors * chunks; unit += step) {
    const int64_t part = chunks == 1 ? 0 : unit / vectors, row = (unit - part * vectors) * kCount;
    const int64_t image = row / a.pixels, first = part * chunk;
    const int64_t end = first + chunk < a.num_classes ? first + chunk : a.num_classes;
    float factor[kCount];
    bool idle = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      factor[i] = scale_of(a, row + i);
      idle = idle && factor[i] == 1.0f;
    }
    if (idle) continue;
    Z* grad = static_cast<Z*>(a.grad) + image * a.grad_stride + (row - image * a.pixels);
    for (int64_t cls = first; cls < end; cls += kScaleClasses) {
      Vector<Z, kCount> held[kScaleClasses];
#pragma unroll
      for (int k = 0; k < kScaleClasses; ++k) {
        if (cls + k < end) held[k].load_streaming(grad + (cls + k) * a.grad_class_stride);
      }
#pragma unroll
      for (int k = 0; k < kScaleClasses; ++k) {
        if (cls + k >= end) break;
        float x[kCount];
        held[k].get(x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] *= factor[i];
        Vector<Z, kCount>::store(grad + (cls + k) * a.grad_class_stride, x);
      }
    }
  }
}

template <typename Z, int kCount>
void launch_scale_pixels(const ScaleGradArgs& a, int processors, void* stream) {
  // Enough chunks that every multiprocessor has a full set of threads.
  const int64_t vectors = a.rows / kCount, most = static_cast<int64_t>(processors) * 2048;
  const int64_t needed = ceil_div(a.num_classes, kScaleClasses), wanted = ceil_div(most, vectors);
  const int64_t chunk = ceil_div(needed, wanted < needed ? wanted : needed) * kScaleClasses;
  const int64_t chunks = ceil_div(a.num_classes, chunk), units = vectors * chunks;
  constexpr int64_t kMost = int64_t(1) << 30;
  const int64_t blocks = ceil_div(units, kScalePixelsThreads);
  launch(scale_pixels_kernel<Z, kCount>, blocks < kMost ? blocks : kMost, kScalePixelsThreads, 1, 0, stream, a,
         static_cast<int>(chunk), chunks);
}

}  // namespace gpu
}  // namespace longtail
