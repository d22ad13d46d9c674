// What passes between the operators of ZLPR and the two-way loss and their kernels: plain data, the same on every
// device.
#pragma once

#include <stdint.h>

namespace longtail {

// The options of a loss, as LONGTAIL_SIGMOID_VECTORS and LONGTAIL_SIGMOID_SCALARS.
#define LONGTAIL_TWO_WAY_VECTORS(vector) vector(class_bias, num_classes) vector(sample_weight, rows)
#define LONGTAIL_TWO_WAY_SCALARS(scalar)                                            \
  scalar(ignore_index, std::optional<int64_t>) scalar(positive_temperature, double) \
      scalar(negative_temperature, double) scalar(joint, bool)

// Shapes as of SigmoidLossFields. A side are the classes with y > 0, or those with y < 1; where y is between, both.
template <typename Storage, typename T, typename S>
struct TwoWayLossFields {
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
  LONGTAIL_TWO_WAY_VECTORS(LONGTAIL_FIELD)
#undef LONGTAIL_FIELD
  const T* grad_loss;        // [R]; not read by Pass::loss
  int64_t grad_loss_stride;  // 0 when one value serves all rows
  int64_t ignore_index;
  S positive_temperature, negative_temperature;
  bool dense_is_wide;  // dense_target is of T, not of the logits' type
  bool ignoring;       // false: every element counts
  bool joint;          // the softplus of both sides' sum, in which a row without a positive does not count
  T* loss;             // [R]; not written by Pass::backward
  T* stats;            // [R, 4]: m and d of the negatives, then of the positives, 0 where a row does not count; read by
                       // Pass::backward
  int64_t stats_stride, stats_column_stride;
  void* grad;  // [N, C] of the logits' type; may be `logits` itself; not written by Pass::loss
  int64_t grad_stride, grad_class_stride;
};

}  // namespace longtail
