// What passes between the softmax operators and their loops: plain data, so that every instruction set may share it.
#pragma once

#include "../loss_math.h"
#include "common.h"

namespace longtail {

// Pixels that are taken through all classes together, at most.
constexpr int64_t kLongestStretch = 256;

// T below is double for float64 logits, else float. [N, C] stands for the logits' shape, [N, C, P] included: pixels are
// then contiguous, and classes `*_class_stride` apart; R is the number of rows, N or N * P.
struct SoftmaxLossArgs {
  Storage storage;
  int64_t num_classes;
  int64_t pixels;      // P, or 0 for [N, C]
  int64_t stretch;     // pixels taken through all classes together, a multiple of 16
  const void* logits;  // [N, C]
  int64_t logits_stride, logits_class_stride;
  const int64_t* target;  // [R]
  int64_t target_stride;
  const void* weight;         // [C] of T, or null
  const void* class_bias;     // [C] of T, or null
  const void* class_margin;   // [C] of T, or null
  const void* sample_weight;  // [R] of T, or null
  const void* grad_loss;      // [R] of T; stride 0 when one value serves all rows
  int64_t grad_loss_stride;
  int64_t ignore_index;
  LossOptions<double> options;
  double weight_sum;  // sum of the class weights, or C
  void* loss;         // [R] of T, or null
  void* stats;        // [R, 5] of T; columns contiguous for [N, C, P], else rows
  int64_t stats_stride, stats_column_stride;
  const void* row_grad;  // [N, 5] of T, rows: m, a, b, S, target of RowGrad times the upstream gradient; Pass::apply
  void* grad;            // [N, C] of the logits' type; may be `logits` itself
  int64_t grad_stride, grad_class_stride;
};

// Rows [begin, end). Returns the first row whose target is neither a class nor ignore_index, or -1. The passes of a
// shard also know target -1: a class of another shard.
// `scratch`, for loss_and_grad: one row of T with softcap (tanh is then evaluated once), [C, stretch] of T with pixels,
// else null.
using SoftmaxLossRows = int64_t (*)(const SoftmaxLossArgs&, Pass, int64_t begin, int64_t end, void* scratch);

}  // namespace longtail
