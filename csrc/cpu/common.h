// What the loops of every family share with the operators.
#pragma once

#include <stdint.h>

namespace longtail {

enum class Storage { float64, float32, bfloat16, float16 };

// The last two are the steps of one shard of the classes, which the softmax loops over rows know.
enum class Pass { loss, backward, loss_and_grad, accumulate, apply };

}  // namespace longtail
