// The softmax kernels for bfloat16 logits.
#include "softmax_loss.cuh"

template void longtail::gpu::launch_storage<longtail::gpu::BFloat16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
