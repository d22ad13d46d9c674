// The softmax loops: what they are given, and how they are called.
#pragma once

#include "../softmax_args.h"
#include "common.h"

namespace longtail {

// Pixels that are taken through all classes together, at most.
constexpr int64_t kLongestStretch = 256;

struct SoftmaxLossArgs : SoftmaxLossFields<Storage, void, double> {
  double weight_sum;  // sum of the class weights, or C
  int64_t stretch;    // pixels taken through all classes together, a multiple of 16
};

// Rows [begin, end). Returns the first row whose target is neither a class nor ignore_index, or -1. The passes of a
// shard also know target -1: a class of another shard.
// `scratch`, for loss_and_grad: one row of T with softcap (tanh is then evaluated once), [C, stretch] of T with pixels,
// else null. T is double for float64 logits, else float.
using SoftmaxLossRows = int64_t (*)(const SoftmaxLossArgs&, Pass, int64_t begin, int64_t end, void* scratch);

}  // namespace longtail
