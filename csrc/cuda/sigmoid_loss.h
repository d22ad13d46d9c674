// What passes between the sigmoid operators and their kernels: plain data, for the host's compiler too.
#pragma once

#include "../sigmoid_args.h"
#include "passes.h"

namespace longtail {
namespace gpu {

// All addresses are on the device; C < 2^30, of images < 2^24.
struct SigmoidLossArgs : SigmoidLossFields<Storage, float, float> {};

}  // namespace gpu
}  // namespace longtail
