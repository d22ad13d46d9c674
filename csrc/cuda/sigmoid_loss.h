// What passes between the sigmoid operators and their kernels: plain data, for the host's compiler too.
#pragma once

#include "passes.h"

namespace longtail {
namespace gpu {

// All addresses are on the device. [N, C] stands for the logits' shape, [N, C, P] included: classes of a row, or pixels
// of an image and class, are contiguous. R is the number of rows, N or N * P.
struct SigmoidLossArgs {
  Storage storage;
  int64_t rows;         // R
  int64_t num_classes;  // C < 2^30, of images < 2^24
  int64_t pixels;       // P, or 0 for [N, C]
  const void* logits;   // [N, C]
  int64_t logits_stride, logits_class_stride;
  const int64_t* target;  // [R], or null
  int64_t target_stride;
  const void* dense_target;  // [N, C], or null
  int64_t dense_stride, dense_class_stride;
  const float* weight;         // [C], or null
  const float* pos_weight;     // [C], or null
  const float* sample_weight;  // [R], or null
  const float* grad_loss;      // [N, C] contiguous if elementwise_upstream, else [R]; not read by Pass::loss
  int64_t grad_loss_stride;    // of rows; 0 when one value serves all of them
  int64_t ignore_index;
  float alpha_positive;
  float alpha_negative;
  float gamma;
  bool dense_is_wide;  // float32, else of the logits' type
  bool class_weight_by_target;
  bool ignoring;  // false: every element counts
  bool elementwise_loss;
  bool elementwise_upstream;
  float* loss;  // [N, C] contiguous if elementwise_loss, else [R]: sums over the classes; not written by Pass::backward
  void* grad;   // [N, C] of the logits' type; may be `logits` itself; not written by Pass::loss
  int64_t grad_stride, grad_class_stride;
};

}  // namespace gpu
}  // namespace longtail
