// What passes between the operators of hierarchical cross-entropy and their kernels: plain data, for the host's
// compiler too.
#pragma once

#include "../hierarchical_args.h"
#include "passes.h"

namespace longtail {
namespace gpu {

// All addresses are on the device; C < 2^30.
struct HierarchicalLossArgs : HierarchicalLossFields<Storage, float> {};

}  // namespace gpu
}  // namespace longtail
