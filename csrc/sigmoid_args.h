// What passes between the sigmoid operators and their kernels: plain data, in the same shape on every device.
#pragma once

#include <stdint.h>

namespace longtail {

// The options of a loss, in the order of the operators' schemas: `vector` is a macro that is told the name and length
// of each vector, which may be absent, `scalar` one that is told the name and type of what follows them.
#define LONGTAIL_SIGMOID_VECTORS(vector)                                                                \
  vector(weight, num_classes) vector(pos_weight, num_classes) vector(sample_weight, rows)               \
      vector(class_bias, num_classes) vector(class_alpha, num_classes) vector(class_gamma, num_classes) \
          vector(inverse_counts, num_classes)
#define LONGTAIL_SIGMOID_SCALARS(scalar)                                                                           \
  scalar(class_weight_by_target, bool) scalar(ignore_index, std::optional<int64_t>)                                \
      scalar(alpha, std::optional<double>) scalar(gamma, double) scalar(gamma_negative, std::optional<double>)     \
          scalar(clip, double) scalar(detach, bool) scalar(negative_scale, double) scalar(label_smoothing, double) \
              scalar(rebalance_alpha, double) scalar(rebalance_beta, double) scalar(rebalance_mu, double)

// [N, C] stands for the logits' shape, [N, C, P] included: classes of a row, or pixels of an image and class, are
// contiguous. R is the number of rows, N or N * P: of images, a row is a pixel.
// T: of the vectors, void where only `storage` says it. S: of the numbers.
template <typename Storage, typename T, typename S>
struct SigmoidLossFields {
  Storage storage;
  int64_t rows;         // R
  int64_t num_classes;  // C
  int64_t pixels;       // P, or 0 for [N, C]
  const void* logits;   // [N, C]
  int64_t logits_stride, logits_class_stride;
  const int64_t* target;  // [R], or null
  int64_t target_stride;
  const void* dense_target;  // [N, C], or null
  int64_t dense_stride, dense_class_stride;
#define LONGTAIL_FIELD(name, length) const T* name;
  LONGTAIL_SIGMOID_VECTORS(LONGTAIL_FIELD)
#undef LONGTAIL_FIELD
  const T* grad_loss;        // [N, C] contiguous if elementwise_upstream, else [R]; not read by Pass::loss
  int64_t grad_loss_stride;  // of rows; 0 when one value serves all of them
  int64_t ignore_index;
  S alpha_positive, alpha_negative;  // what multiplies the terms of y = 1 and of y = 0
  S gamma;
  // What follows is read of elements that are not plain alone. Vectors of classes stand in the place of alpha and
  // gamma.
  S gamma_negative;  // unless it is that of positives
  S clip, negative_scale, label_smoothing, rebalance_alpha, rebalance_beta, rebalance_mu;
  bool same_gamma, detach;
  bool plain;          // a focal loss with one exponent, of which nothing else is asked
  bool dense_is_wide;  // dense_target is of T, not of the logits' type
  bool class_weight_by_target;
  bool ignoring;  // false: every element counts
  bool elementwise_loss;
  bool elementwise_upstream;
  T* loss;     // [N, C] contiguous if elementwise_loss, else [R]: sums over the classes; not written by Pass::backward
  void* grad;  // [N, C] of the logits' type; may be `logits` itself; not written by Pass::loss
  int64_t grad_stride, grad_class_stride;
};

}  // namespace longtail
