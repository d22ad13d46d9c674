// What every operator tells its kernels: the logits' type, and what is to be computed. For the host's compiler too.
#pragma once

#include <stdint.h>

#include "../loss_math.h"

namespace longtail {
namespace gpu {

enum class Storage { float32, bfloat16, float16 };
// accumulate, apply: the stats, and the gradient from `row_grad`, of one shard of the classes.
enum class Pass { loss, backward, loss_and_grad, accumulate, apply };

// A pass that a kernel is compiled for; those that serve every pass take a Pass in its place.
template <Pass kPass>
struct Fixed {
  LONGTAIL_INLINE constexpr operator Pass() const { return kPass; }
};

LONGTAIL_INLINE constexpr bool makes_stats(Pass pass) { return pass != Pass::backward && pass != Pass::apply; }
LONGTAIL_INLINE constexpr bool makes_grad(Pass pass) { return pass != Pass::loss && pass != Pass::accumulate; }
LONGTAIL_INLINE constexpr bool of_shard(Pass pass) { return pass == Pass::accumulate || pass == Pass::apply; }

constexpr int element_size(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

}  // namespace gpu
}  // namespace longtail
