// What passes between the softmax operators and their kernels: plain data, for the host's compiler too.
#pragma once

#include "../loss_math.h"
#include "passes.h"

namespace longtail {
namespace gpu {

// All addresses are on the device. Rows of logits and grad are contiguous; of images [N, C, P], the pixels are, and a
// row is a pixel: where [N] stands below it is [N * P], image by image.
struct SoftmaxLossArgs {
  Storage storage;
  int64_t rows;         // N, or N * P
  int64_t num_classes;  // C < 2^30
  const void* logits;   // [N, C]
  int64_t logits_stride;
  const int64_t* target;  // [N]
  int64_t target_stride;
  const float* weight;         // [C], or null
  const float* class_bias;     // [C], or null
  const float* class_margin;   // [C], or null
  const float* sample_weight;  // [N], or null
  const float* weight_sum;     // [1], the sum of weight; read with weight and label smoothing only
  const float* grad_loss;      // [N]; stride 0 when one value serves all rows; not read by Pass::loss
  int64_t grad_loss_stride;
  int64_t ignore_index;
  LossOptions<float> options;
  float* loss;   // [N]; written unless Pass::backward
  float* stats;  // [N, 5], contiguous; read by Pass::backward, else written
  void* grad;    // [N, C] of the logits' type; may be `logits` itself in Pass::loss_and_grad; not written by Pass::loss
  int64_t grad_stride;
  int64_t pixels;  // P, or 0 for [N, C], to which the rest does not apply
  int64_t logits_class_stride, grad_class_stride;
  int64_t stats_stride, stats_column_stride;  // of a pixel's, and of one of its five
  const float* row_grad;  // [N, 5], contiguous: RowGrad times the upstream gradient; read by Pass::apply alone
  bool entropy;           // whether t is wanted without complement entropy too
  float smooth;           // label_smoothing / C; set by the launch
};

}  // namespace gpu
}  // namespace longtail
