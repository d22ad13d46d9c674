// What passes between scale_grad_ and its kernel: plain data, for the host's compiler too.
#pragma once

#include "../row_args.h"
#include "passes.h"

namespace longtail {
namespace gpu {

struct ScaleGradArgs : ScaleGradFields<Storage, float> {};

}  // namespace gpu
}  // namespace longtail
