// What passes between the operators of ZLPR and the two-way loss and their kernels: plain data, for the host's compiler
// too.
#pragma once

#include "../two_way_args.h"
#include "passes.h"

namespace longtail {
namespace gpu {

// All addresses are on the device; C < 2^30, of images < 2^24.
struct TwoWayLossArgs : TwoWayLossFields<Storage, float, float> {};

}  // namespace gpu
}  // namespace longtail
