// What passes between the sigmoid operators and their loops: plain data, so that every instruction set may share it.
#pragma once

#include "common.h"

namespace longtail {

// T below is double for float64 logits, else float. [N, C] stands for the logits' shape, [N, C, P] included: pixels are
// then contiguous, and classes `*_class_stride` apart; R is the number of rows, N or N * P.
struct SigmoidLossArgs {
  Storage storage;
  int64_t num_classes;
  int64_t pixels;      // P, or 0 for [N, C]
  const void* logits;  // [N, C]
  int64_t logits_stride, logits_class_stride;
  const int64_t* target;  // [R], or null
  int64_t target_stride;
  const void* dense_target;  // [N, C], or null
  int64_t dense_stride, dense_class_stride;
  bool dense_is_wide;         // of T, not of the logits' type
  const void* weight;         // [C] of T, or null
  const void* pos_weight;     // [C] of T, or null
  const void* sample_weight;  // [R] of T, or null
  bool class_weight_by_target;
  bool ignoring;  // false: every element counts
  int64_t ignore_index;
  double alpha_positive, alpha_negative;
  double gamma;
  bool elementwise_loss;  // loss is [N, C] of T, contiguous, else [R]: sums over the classes
  void* loss;
  bool elementwise_upstream;  // grad_loss is [N, C] of T, contiguous, else [R] of any stride
  const void* grad_loss;
  int64_t grad_loss_stride;
  void* grad;  // [N, C] of the logits' type; may be `logits` itself
  int64_t grad_stride, grad_class_stride;
};

// Rows [begin, end). Returns the first row whose target is neither a class nor ignore_index, or -1.
using SigmoidLossRows = int64_t (*)(const SigmoidLossArgs&, Pass, int64_t begin, int64_t end);

}  // namespace longtail
