// The entry points of one instruction set: each picks the loop for the storage type and the layout.
#pragma once

#include "hierarchical_rows.h"
#include "kernels.h"
#include "sigmoid_rows.h"
#include "softmax_dense.h"
#include "softmax_pixels.h"
#include "softmax_rows.h"
#include "softmax_tiles.h"
#include "targets.h"
#include "two_way_pixels.h"

namespace longtail {
namespace LONGTAIL_ISA {

template <typename Z, typename T>
int64_t softmax_loss_of(const SoftmaxLossArgs& args, Pass pass, int64_t begin, int64_t end, void* scratch) {
  if (args.dense) return softmax_dense_of<Z, T>(args, pass, begin, end);
  if (SoftmaxTiles<Z, T>::serves(args, pass)) return SoftmaxTiles<Z, T>(args, pass).run(begin, end);
  if (args.pixels > 0) return SoftmaxPixels<Z, T>(args, pass, static_cast<T*>(scratch)).run(begin, end);
  return SoftmaxRows<Z, T>(args, pass, static_cast<T*>(scratch)).run(begin, end);
}

inline int64_t softmax_loss_rows(const SoftmaxLossArgs& args, Pass pass, int64_t begin, int64_t end, void* scratch) {
  switch (args.storage) {
    case Storage::float64:
      return softmax_loss_of<double, double>(args, pass, begin, end, scratch);
    case Storage::float32:
      return softmax_loss_of<float, float>(args, pass, begin, end, scratch);
    case Storage::bfloat16:
      return softmax_loss_of<bfloat16, float>(args, pass, begin, end, scratch);
    case Storage::float16:
      return softmax_loss_of<float16, float>(args, pass, begin, end, scratch);
  }
  return -1;
}

inline int64_t sigmoid_loss_rows(const SigmoidLossArgs& args, Pass pass, int64_t begin, int64_t end) {
  switch (args.storage) {
    case Storage::float64:
      return SigmoidRows<double, double>(args, pass).run(begin, end);
    case Storage::float32:
      return SigmoidRows<float, float>(args, pass).run(begin, end);
    case Storage::bfloat16:
      return SigmoidRows<bfloat16, float>(args, pass).run(begin, end);
    case Storage::float16:
      return SigmoidRows<float16, float>(args, pass).run(begin, end);
  }
  return -1;
}

// What multiplies a row: 1 where the target is ignored, whatever the upstream gradient.
template <typename T>
T scale_of(const ScaleGradArgs& args, int64_t row) {
  const T factor = static_cast<const T*>(args.grad_loss)[row * args.grad_loss_stride];
  if (factor == T(1) || args.target == nullptr) return factor;
  return args.target[row * args.target_stride] == args.ignore_index ? T(1) : factor;
}

// Pixels [begin, end) of one class: grad[k] *= factor[k].
template <typename Z, typename T>
void scale_pixels(const ScaleGradArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kStretch = 256;
  T factor[kStretch];
  for (int64_t row = begin; row < end;) {
    const int64_t image = row / args.pixels, pixel = row % args.pixels;
    int64_t n = args.pixels - pixel < end - row ? args.pixels - pixel : end - row;
    if (n > kStretch) n = kStretch;
    bool ones = true;
    for (int64_t k = 0; k < n; ++k) {
      factor[k] = scale_of<T>(args, row + k);
      ones = ones && factor[k] == T(1);
    }
    for (int64_t j = 0; !ones && j < args.num_classes; ++j) {
      Z* grad = static_cast<Z*>(args.grad) + image * args.grad_stride + j * args.grad_class_stride + pixel;
      for (int64_t k = 0; k < n; k += Vec<T>::kLanes) {
        store_some(grad + k, load_some(grad + k, n - k) * load_some(factor + k, n - k), n - k);
      }
    }
    row += n;
  }
}

template <typename Z, typename T>
void scale_grad_of(const ScaleGradArgs& args, int64_t begin, int64_t end) {
  if (args.pixels > 0) return scale_pixels<Z, T>(args, begin, end);
  for (int64_t i = begin; i < end; ++i) {
    const T factor = scale_of<T>(args, i);
    if (factor == T(1)) continue;
    Z* row = static_cast<Z*>(args.grad) + i * args.grad_stride;
    for (int64_t j = 0; j < args.num_classes; j += Vec<T>::kLanes) {
      const int64_t count = args.num_classes - j;
      store_some(row + j, load_some(row + j, count) * Vec<T>(factor), count);
    }
  }
}

inline void scale_grad_rows(const ScaleGradArgs& args, int64_t begin, int64_t end) {
  switch (args.storage) {
    case Storage::float64:
      return scale_grad_of<double, double>(args, begin, end);
    case Storage::float32:
      return scale_grad_of<float, float>(args, begin, end);
    case Storage::bfloat16:
      return scale_grad_of<bfloat16, float>(args, begin, end);
    case Storage::float16:
      return scale_grad_of<float16, float>(args, begin, end);
  }
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
