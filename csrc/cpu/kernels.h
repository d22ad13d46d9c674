// The loops of each instruction set, and which of them runs here.
#pragma once

#include "../row_args.h"
#include "sigmoid_loss.h"
#include "softmax_loss.h"

namespace longtail {

struct ScaleGradArgs : ScaleGradFields<Storage, void> {};

// Multiplies the rows [begin, end) of grad by grad_loss; where it is 1 or the target is ignored, nothing changes.
using ScaleGradRows = void (*)(const ScaleGradArgs&, int64_t begin, int64_t end);

struct Kernels {
  const char* isa;
  SoftmaxLossRows softmax_loss_rows;
  SigmoidLossRows sigmoid_loss_rows;
  ScaleGradRows scale_grad_rows;
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
