// The softmax kernels for float16 logits.
#include "softmax_loss.cuh"

template void longtail::gpu::launch_storage<longtail::gpu::Float16>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
