// What passes between the softmax operators and their kernels: plain data, for the host's compiler too.
#pragma once

#include "../softmax_args.h"
#include "passes.h"

namespace longtail {
namespace gpu {

// All addresses are on the device; C < 2^30.
struct SoftmaxLossArgs : SoftmaxLossFields<Storage, float, float> {
  const float* weight_sum;  // [1], the sum of weight; read with weight and label smoothing only
  float smooth;             // label_smoothing / C; set by the launch
};

}  // namespace gpu
}  // namespace longtail
