// The kernels for AVX-512 F, BW, DQ and VL; setup.py compiles this file with those instruction sets switched on.
#if defined(__x86_64__)
#define LONGTAIL_ISA avx512
#define LONGTAIL_VECTOR_BYTES 64
#include "loops.h"

namespace longtail {
const Kernels kernels_avx512 = {"avx512",
                                avx512::softmax_loss_rows,
                                avx512::sigmoid_loss_rows,
                                avx512::scale_grad_rows,
                                avx512::count_targets,
                                avx512::dense_targets_fit,
                                avx512::hierarchical_loss_rows,
                                avx512::two_way_loss_rows};
}
#endif
