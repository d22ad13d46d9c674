// What passes between the softmax operators and their kernels: plain data, in the same shape on every device.
#pragma once

#include "loss_math.h"

namespace longtail {

// The vectors of a loss, each of which may be absent, in the order of the operators' schemas: `vector` is a macro that
// is told each name and length.
#define LONGTAIL_SOFTMAX_VECTORS(vector)                                                                       \
  vector(weight, num_classes) vector(class_bias, num_classes) vector(class_margin, num_classes)                \
      vector(class_scale, num_classes) vector(target_scale, num_classes) vector(class_mitigation, num_classes) \
          vector(sample_weight, rows)

// [N, C] stands for the logits' shape, [N, C, P] included: classes of a row, or pixels of an image and class, are
// contiguous. R is the number of rows, N or N * P: of images, a row is a pixel.
// T: of the vectors, void where only `storage` says it. S: of the numbers.
template <typename Storage, typename T, typename S>
struct SoftmaxLossFields {
  Storage storage;
  int64_t rows;         // R
  int64_t num_classes;  // C
  int64_t pixels;       // P, or 0 for [N, C]
  const void* logits;   // [N, C]
  int64_t logits_stride, logits_class_stride;
  const int64_t* target;  // [R], or null where `dense`
  int64_t target_stride;
  bool dense;                // a probability for each class; [N, C] alone, Pass::loss and Pass::backward
  const void* dense_target;  // [N, C], classes contiguous
  int64_t dense_stride;
  bool dense_is_wide;  // dense_target is of T, not of the logits' type
#define LONGTAIL_FIELD(name, length) const T* name;
  LONGTAIL_SOFTMAX_VECTORS(LONGTAIL_FIELD)
#undef LONGTAIL_FIELD
  int64_t ignore_index;
  LossOptions<S> options;
  bool entropy;        // whether t is wanted without complement entropy too; else it may be any number
  const T* grad_loss;  // [R]; stride 0 when one value serves all rows; not read by Pass::loss
  int64_t grad_loss_stride;
  const T* target_terms;  // [N, 3], contiguous: TargetTerms of rows of a shard, or null: those of the class here
  const T* row_grad;      // [N, 5], contiguous: RowGrad times the upstream gradient; read by Pass::apply alone
  T* loss;                // [R]; written by Pass::loss and Pass::loss_and_grad
  T* stats;               // [R, 5]; rows contiguous, or columns of images; read by Pass::backward, else written; where
                          // `dense` (m, d, 0, W, 0) of DenseStats
  int64_t stats_stride, stats_column_stride;
  void* grad;  // [N, C] of the logits' type; may be `logits` itself; not written by Pass::loss
  int64_t grad_stride, grad_class_stride;
};

}  // namespace longtail
