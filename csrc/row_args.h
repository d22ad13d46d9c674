// What passes between the operators that serve every family and their kernels: plain data, the same on every device.
#pragma once

#include <stdint.h>

namespace longtail {

// T: of the factors, void where only `storage` says it.
template <typename Storage, typename T>
struct ScaleGradFields {
  Storage storage;
  int64_t rows, num_classes;  // R, which is N or N * P, and C
  int64_t pixels;             // P of [N, C, P], or 0 for [N, C]
  void* grad;                 // [N, C]
  int64_t grad_stride, grad_class_stride;
  const T* grad_loss;  // [R]; stride 0 when one value serves all rows
  int64_t grad_loss_stride;
  const int64_t* target;  // [R], or null where no row is ignored
  int64_t target_stride, ignore_index;
};

// What a mean over targets divides by: how many are not ignored, or the sum of their classes' weights.
struct MeanDenominatorArgs {
  int64_t rows, num_classes;
  const int64_t* target;  // [rows]
  int64_t target_stride, ignore_index;
  const void* weight;  // [num_classes], or null
  int weight_size;     // bytes of a weight: 4, 8 or, without weights, 0
  void* result;        // [1] of the weights' type, or of int64_t without
};

enum class Counted { integers, float32, float64 };

// The mean of losses, and what its gradient is divided by: the denominator, or infinity where it is 0.
struct MeanLossArgs {
  int64_t rows;
  const void* loss;  // [rows]
  int64_t loss_stride;
  int loss_size;  // bytes of a loss: 4 or 8
  Counted denominator_type;
  const void* denominator;  // [1]
  void *mean, *divisor;     // [1] of the losses' type
};

}  // namespace longtail
