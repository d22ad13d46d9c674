// The softmax kernels for float32 logits.
#include "softmax_loss.cuh"

template void longtail::gpu::launch_storage<float>(const SoftmaxLossArgs&, Pass, const Plan&, void*);
