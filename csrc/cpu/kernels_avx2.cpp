// The kernels for AVX2, FMA and F16C; setup.py compiles this file with those instruction sets switched on.
#if defined(__x86_64__)
#define LONGTAIL_ISA avx2
#define LONGTAIL_VECTOR_BYTES 32
#include "loops.h"

namespace longtail {
const Kernels kernels_avx2 = {"avx2",
                              avx2::softmax_loss_rows,
                              avx2::sigmoid_loss_rows,
                              avx2::scale_grad_rows,
                              avx2::count_targets,
                              avx2::dense_targets_fit,
                              avx2::hierarchical_loss_rows,
                              avx2::two_way_loss_rows};
}
#endif
