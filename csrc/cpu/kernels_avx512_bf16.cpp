// The kernels for AVX-512 with BF16, which rounds to bfloat16 in one instruction; setup.py switches it on here.
// No other type gains by it: they take the loops of AVX-512.
#if defined(__x86_64__)
#define LONGTAIL_ISA avx512_bf16
#define LONGTAIL_VECTOR_BYTES 64
#include "loops.h"

namespace longtail {
namespace {

int64_t softmax_loss_rows(const SoftmaxLossArgs& args, Pass pass, int64_t begin, int64_t end, void* scratch) {
  if (args.storage != Storage::bfloat16) return kernels_avx512.softmax_loss_rows(args, pass, begin, end, scratch);
  return avx512_bf16::softmax_loss_of<avx512_bf16::bfloat16, float>(args, pass, begin, end, scratch);
}

int64_t sigmoid_loss_rows(const SigmoidLossArgs& args, Pass pass, int64_t begin, int64_t end) {
  if (args.storage != Storage::bfloat16) return kernels_avx512.sigmoid_loss_rows(args, pass, begin, end);
  return avx512_bf16::SigmoidRows<avx512_bf16::bfloat16, float>(args, pass).run(begin, end);
}

int64_t hierarchical_loss_rows(const HierarchicalLossArgs& args, Pass pass, int64_t begin, int64_t end, void* scratch) {
  if (args.storage != Storage::bfloat16) return kernels_avx512.hierarchical_loss_rows(args, pass, begin, end, scratch);
  return avx512_bf16::HierarchicalRows<avx512_bf16::bfloat16, float>(args, pass, scratch).run(begin, end);
}

int64_t two_way_loss_rows(const TwoWayLossArgs& args, Pass pass, int64_t begin, int64_t end) {
  if (args.storage != Storage::bfloat16) return kernels_avx512.two_way_loss_rows(args, pass, begin, end);
  return avx512_bf16::two_way_loss_of<avx512_bf16::bfloat16, float>(args, pass, begin, end);
}

void scale_grad_rows(const ScaleGradArgs& args, int64_t begin, int64_t end) {
  if (args.storage != Storage::bfloat16) return kernels_avx512.scale_grad_rows(args, begin, end);
  avx512_bf16::scale_grad_of<avx512_bf16::bfloat16, float>(args, begin, end);
}

}  // namespace

const Kernels kernels_avx512_bf16 = {"avx512_bf16",          softmax_loss_rows,          sigmoid_loss_rows,
                                     scale_grad_rows,        avx512_bf16::count_targets, avx512_bf16::dense_targets_fit,
                                     hierarchical_loss_rows, two_way_loss_rows};

}  // namespace longtail
#endif
