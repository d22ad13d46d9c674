// Which launch serves images [N, C, P]: as plan.h, reasoned and not measured.
#pragma once

#include "../loss_math.h"
#include "plan.h"

namespace longtail {
namespace gpu {

// A block takes Plan::lanes neighbouring vectors of pixels, or single pixels; threads / lanes threads share the classes
// of each. Regime::shared: the logits stay in shared memory between their two uses in Pass::loss_and_grad.
// Regime::sweep: nothing is kept. Problem::aligned: every class's pixels, of logits and of grad, begin and end at a
// 16-byte boundary.

// Threads of a block, at most, and blocks of that size that a multiprocessor's registers suffice for: 168 a thread with
// eight pixels each, else 128.
LONGTAIL_INLINE constexpr int pixel_threads(int count) { return count == 8 ? 128 : 256; }
LONGTAIL_INLINE constexpr int pixel_resident(int count) { return count == 8 ? 3 : 2; }
constexpr int kFewestVectorLanes = 8;   // 128 bytes together, a cache line
constexpr int kFewestSingleLanes = 32;  // 64 or 128 bytes
// Classes that a thread takes at a time: four 16-byte loads, or 8 single elements.
LONGTAIL_INLINE constexpr int classes_of(int count) { return count > 1 ? 4 : 8; }

// Where a pixel of a block is in shared memory: every ninth place is left empty, so that neither threads with a pixel
// each nor threads with a vector each meet in a bank.
LONGTAIL_INLINE constexpr int slot_of(int pixel) { return pixel + pixel / 8; }

inline int count_of(const Problem& p) { return p.aligned ? 16 / p.element_size : 1; }

// A float4 for each pixel of each thread, a float and an int for each pixel, and the logits that are kept; one more
// float4 for each pixel whose target changes the effective logits of the other classes.
inline int64_t pixel_shared_bytes(const Plan& plan, const Problem& p) {
  const int pixels = plan.lanes * (plan.vector ? 16 / p.element_size : 1);
  const int each = plan.threads / plan.lanes + (p.by_target ? 1 : 0);
  const int64_t kept = plan.regime == Regime::shared ? pixels * p.num_classes * p.element_size : 0;
  return slot_of(pixels) * (16 * each + 8) + kept;
}

inline int resident_blocks(const Plan& plan, const Problem& p, const Device& device) {
  const int64_t block = pixel_shared_bytes(plan, p);
  if (block > device.shared_per_block) return 0;
  return static_cast<int>(device.shared_per_processor / (block + kReservedPerBlock));
}

// With so many lanes, and as many threads for each as have a group of classes.
inline Plan with_lanes(const Problem& p, int lanes, Regime regime) {
  const int64_t groups = ceil_div(p.num_classes, classes_of(count_of(p)));
  const int threads = power_of_two(lanes * (groups < 1 ? 1 : groups) / 2 + 1, lanes, pixel_threads(count_of(p)));
  return {regime, p.aligned, threads < kWarpSize ? kWarpSize : threads, lanes, 1};
}

inline Plan pixel_plan_of(const Problem& p, const Device& device) {
  const int count = count_of(p), threads = pixel_threads(count), resident = pixel_resident(count);
  const int fewest = p.aligned ? kFewestVectorLanes : kFewestSingleLanes;
  // Where pixels are too few to fill the multiprocessors, threads share their classes, two groups for each at least.
  const int64_t wanted = static_cast<int64_t>(device.processors) * resident * threads;
  int lanes = threads;
  while (lanes > fewest && p.rows / count * (threads / lanes) < wanted &&
         p.num_classes >= 4 * classes_of(count) * (threads / lanes)) {
    lanes /= 2;
  }
  if (p.pass != Pass::loss_and_grad) return with_lanes(p, lanes, Regime::sweep);
  for (int blocks = resident; blocks > 0; --blocks) {
    for (int fewer = lanes; fewer >= fewest; fewer /= 2) {
      const Plan plan = with_lanes(p, fewer, Regime::shared);
      if (resident_blocks(plan, p, device) * plan.threads >= blocks * threads) return plan;
    }
  }
  // Twice: the fewer pixels in flight, the more of their logits is still in the L2 cache when the second sweep comes.
  return with_lanes(p, fewest, Regime::sweep);
}

}  // namespace gpu
}  // namespace longtail
