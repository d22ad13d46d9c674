// What passes between the operators and the row loops: plain data, so that every instruction set may share it.
#pragma once

#include <stdint.h>

namespace longtail {

enum class Storage { float64, float32, bfloat16, float16 };

// T below is double for float64 logits, else float.
struct SoftmaxLossArgs {
  Storage storage;
  int64_t num_classes;
  const void* logits;  // [N, C]; classes contiguous
  int64_t logits_stride;
  const int64_t* target;  // [N]
  int64_t target_stride;
  const void* weight;         // [C] of T, or null
  const void* class_bias;     // [C] of T, or null
  const void* class_margin;   // [C] of T, or null
  const void* sample_weight;  // [N] of T, or null
  const void* grad_loss;      // [N] of T; stride 0 when one value serves all rows
  int64_t grad_loss_stride;
  int64_t ignore_index;
  double label_smoothing;
  double focal_gamma;
  double complement_coefficient;
  double cross_entropy_coefficient;
  double scale;
  double softcap;  // 0: off
  double z_loss;
  double weight_sum;  // sum of the class weights, or C
  void* loss;         // [N] of T
  void* stats;        // [N, 5] of T
  void* grad;         // [N, C] of the logits' type; may be `logits` itself
  int64_t grad_stride;
};

enum class Pass { loss, backward, loss_and_grad };

// Rows [begin, end). Returns the first row whose target is neither a class nor ignore_index, or -1.
// `scratch`: one row of T when the pass is loss_and_grad with softcap (tanh is then evaluated once), else null.
using SoftmaxLossRows = int64_t (*)(const SoftmaxLossArgs&, Pass, int64_t begin, int64_t end, void* scratch);

struct ScaleGradArgs {
  Storage storage;
  int64_t num_classes;
  void* grad;  // [N, C]; classes contiguous
  int64_t grad_stride;
  const void* grad_loss;  // [N] of T
  int64_t grad_loss_stride;
};

// grad[i, :] *= grad_loss[i], rows [begin, end); a row whose factor is 1 is not touched.
using ScaleGradRows = void (*)(const ScaleGradArgs&, int64_t begin, int64_t end);

struct Kernels {
  const char* isa;
  SoftmaxLossRows softmax_loss_rows;
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
