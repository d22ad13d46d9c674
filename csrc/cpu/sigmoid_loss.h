// The sigmoid loops: what they are given, and how they are called.
#pragma once

#include "../sigmoid_args.h"
#include "common.h"

namespace longtail {

struct SigmoidLossArgs : SigmoidLossFields<Storage, void, double> {};

// Rows [begin, end). Returns the first row whose target is neither a class nor ignore_index, or -1.
using SigmoidLossRows = int64_t (*)(const SigmoidLossArgs&, Pass, int64_t begin, int64_t end);

}  // namespace longtail
