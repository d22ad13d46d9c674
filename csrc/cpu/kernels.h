// The loops of each instruction set, what they are given, and which of them runs here.
#pragma once

#include "../hierarchical_args.h"
#include "../row_args.h"
#include "../sigmoid_args.h"
#include "../softmax_args.h"
#include "../two_way_args.h"

namespace longtail {

enum class Storage { float64, float32, bfloat16, float16 };

// The last two are the steps of one shard of the classes, which the softmax loops over rows know.
enum class Pass { loss, backward, loss_and_grad, accumulate, apply };

// Pixels that are taken through all classes together, at most.
constexpr int64_t kLongestStretch = 256;

// Up to so many classes are few: all of them go into a register's turn.
constexpr int64_t kFewClasses = 64;

struct SoftmaxLossArgs : SoftmaxLossFields<Storage, void, double> {
  double weight_sum;  // sum of the class weights, or C
  bool stream;        // whether the gradient, too large for the caches, is written past them
  int64_t stretch;    // pixels taken through all classes together, a multiple of 16
  bool keeps;         // whether loss_and_grad of rows computes effective logits once: in `scratch`, or where there is
                      // none in the place of the logits, which are of T then
};
struct SigmoidLossArgs : SigmoidLossFields<Storage, void, double> {};
// The classes of a node in memory order.
struct Members {
  static constexpr int64_t kBlock = 1024;  // classes at a time
  int32_t node;
  int64_t count;
  const uint64_t* bits;     // one for each of all classes
  const int32_t* counts;    // how many are before each 64 classes, and after all
  const uint16_t* offsets;  // of each from the begin of its block
  const void* bias;         // class_bias of each, or null

  bool operator<(int32_t other) const { return node < other; }
  // How many are before class j, a multiple of 64 or the number of classes.
  int64_t before(int64_t j) const { return counts[(j + 63) / 64]; }
  // Which one class j is.
  int64_t place_of(int64_t j) const {
    return counts[j / 64] + __builtin_popcountll(bits[j / 64] & ((uint64_t(1) << j % 64) - 1));
  }
};
struct HierarchicalLossArgs : HierarchicalLossFields<Storage, void> {
  const void* ordered_bias;  // class_bias by position, where there is an order
  // Where there is an order: of the large ones of the nodes A_1 of these rows, sorted by node.
  const Members* members;
  int64_t members_count;
  int64_t mask_bytes;  // of a mask over all classes, with all that registers read
  bool stream;         // as of SoftmaxLossArgs
};
struct TwoWayLossArgs : TwoWayLossFields<Storage, void, double> {
  bool stream;  // as of SoftmaxLossArgs
};
struct ScaleGradArgs : ScaleGradFields<Storage, void> {};

// Rows [begin, end). Losses return the first row whose target is neither a class nor ignore_index, or -1; the passes of
// a shard also know target -1: a class of another shard.
// `scratch`, for loss_and_grad of more than few classes: one row of T with softcap (tanh is then evaluated once) or
// `keeps`, [C, stretch] of T with pixels, else null. T is double for float64 logits, else float.
using SoftmaxLossRows = int64_t (*)(const SoftmaxLossArgs&, Pass, int64_t begin, int64_t end, void* scratch);
using SigmoidLossRows = int64_t (*)(const SigmoidLossArgs&, Pass, int64_t begin, int64_t end);
// `scratch`: where there is an order two rows of the logits' type, and mask_bytes, else null. Also returns a row whose
// path does not nest.
using HierarchicalLossRows = int64_t (*)(const HierarchicalLossArgs&, Pass, int64_t begin, int64_t end, void* scratch);
using TwoWayLossRows = int64_t (*)(const TwoWayLossArgs&, Pass, int64_t begin, int64_t end);
// Multiplies grad by grad_loss; where it is 1 or the target is ignored, nothing changes.
using ScaleGradRows = void (*)(const ScaleGradArgs&, int64_t begin, int64_t end);
// How many are not ignored, and the first of these that is no class, or -1.
struct TargetCount {
  int64_t counted, bad;
};
using CountTargets = TargetCount (*)(const MeanDenominatorArgs&, int64_t begin, int64_t end);

// Targets of `count` elements side by side.
struct DenseTargets {
  Storage storage;
  const void* y;
  int64_t count;
  bool ignoring;
  int64_t ignore_index;
};
// Whether each is in [0, 1], NaN or, where `ignoring`, ignore_index.
using DenseTargetsFit = bool (*)(const DenseTargets&);

struct Kernels {
  const char* isa;
  SoftmaxLossRows softmax_loss_rows;
  SigmoidLossRows sigmoid_loss_rows;
  ScaleGradRows scale_grad_rows;
  CountTargets count_targets;
  DenseTargetsFit dense_targets_fit;
  HierarchicalLossRows hierarchical_loss_rows;
  TwoWayLossRows two_way_loss_rows;
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

// The widest kernels this processor runs, or those that LONGTAIL_CPU_ISA names. Throws on a name it cannot honour.
const Kernels& kernels();

}  // namespace longtail
