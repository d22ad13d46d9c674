// What the loops of every family share with the operators.
#pragma once

#include <stdint.h>

namespace longtail {

enum class Storage { float64, float32, bfloat16, float16 };

enum class Pass { loss, backward, loss_and_grad };

}  // namespace longtail
