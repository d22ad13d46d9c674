// What every operator tells its kernels: the logits' type, and what is to be computed. For the host's compiler too.
#pragma once

#include <stdint.h>

namespace longtail {
namespace gpu {

enum class Storage { float32, bfloat16, float16 };
// accumulate, apply: the stats, and the gradient from `row_grad`, of one shard of the classes.
enum class Pass { loss, backward, loss_and_grad, accumulate, apply };

constexpr int element_size(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

}  // namespace gpu
}  // namespace longtail
