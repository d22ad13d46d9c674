// What passes between scale_grad_ and its kernel: plain data, for the host's compiler too.
#pragma once

#include "passes.h"

namespace longtail {
namespace gpu {

struct ScaleGradArgs {
  Storage storage;
  int64_t rows, num_classes;
  void* grad;  // [N, C]
  int64_t grad_stride;
  const float* factor;  // [N]; stride 0 when one value serves all rows
  int64_t factor_stride;
};

}  // namespace gpu
}  // namespace longtail
