// The kernels for every processor of the architecture: SSE2 on x86-64, NEON on aarch64.
#define LONGTAIL_ISA baseline
#define LONGTAIL_VECTOR_BYTES 16
#include "loops.h"

#if defined(__aarch64__)
#define LONGTAIL_BASELINE_NAME "neon"
#else
#define LONGTAIL_BASELINE_NAME "baseline"
#endif

namespace longtail {
const Kernels kernels_baseline = {LONGTAIL_BASELINE_NAME,           baseline::softmax_loss_rows,
                                  baseline::sigmoid_loss_rows,      baseline::scale_grad_rows,
                                  baseline::count_targets,          baseline::dense_targets_fit,
                                  baseline::hierarchical_loss_rows, baseline::two_way_loss_rows};
}
