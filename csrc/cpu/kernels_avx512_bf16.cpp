// The kernels for AVX-512 with BF16, which rounds to bfloat16 in one instruction; setup.py switches it on here.
#if defined(__x86_64__)
#define LONGTAIL_ISA avx512_bf16
#define LONGTAIL_VECTOR_BYTES 64
#include "loops.h"

namespace longtail {
const Kernels kernels_avx512_bf16 = {"avx512_bf16", avx512_bf16::softmax_loss_rows, avx512_bf16::sigmoid_loss_rows,
                                     avx512_bf16::scale_grad_rows, avx512_bf16::count_targets};
}
#endif
