// What passes between scale_grad_ and its kernel: plain data, for the host's compiler too.
#pragma once

#include "passes.h"

namespace longtail {
namespace gpu {

struct ScaleGradArgs {
  Storage storage;
  int64_t rows, num_classes;
  void* grad;  // [N, C], or [N, C, P] where a row is a pixel
  int64_t grad_stride;
  const float* factor;  // [N]; stride 0 when one value serves all rows
  int64_t factor_stride;
  int64_t pixels, class_stride;  // as in SoftmaxLossArgs
  const int64_t* target;         // [N], or null where no row is ignored
  int64_t target_stride, ignore_index;
};

}  // namespace gpu
}  // namespace longtail
