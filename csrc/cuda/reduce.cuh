// Joins the stats of a row's threads: lanes of a warp, warps of a block, blocks of a cluster. Always the same tree, so
// that every run gives the same bits.
#pragma once

#include "plan.h"
#include "row_ends.cuh"

namespace longtail {
namespace gpu {

// Joins what `lanes` neighbouring lanes (a power of two) have, to the same bits in each of them. Selections cost less
// than a loop would.
template <typename Join>
LONGTAIL_DEVICE float over_lanes(float x, int lanes, const Join& join) {
  if (lanes == kWarpSize) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, offset));
    return x;
  }
#pragma unroll
  for (int offset = kWarpSize / 4; offset > 0; offset /= 2) {
    const float joined = join(x, __shfl_xor_sync(kAllLanes, x, offset));
    x = offset < lanes ? joined : x;
  }
  return x;
}

LONGTAIL_DEVICE float max_lanes(float x, int lanes) {
  return over_lanes(x, lanes, [](float a, float b) { return fmaxf(a, b); });
}

LONGTAIL_DEVICE float sum_lanes(float x, int lanes) {
  return over_lanes(x, lanes, [](float a, float b) { return a + b; });
}

LONGTAIL_DEVICE Stats join_lanes(Stats s, int lanes) {
  raise_max(s, max_lanes(s.m, lanes));
  return {s.m, sum_lanes(s.d, lanes), sum_lanes(s.t, lanes), s.u_g, sum_lanes(s.U, lanes)};
}

// The meeting place of the threads of a row, over one block or a cluster of them, in each block's shared memory. It is
// used twice over, in turns: a warp may be at the next row while another still reads of this one.
class Joint {
 public:
  LONGTAIL_DEVICE Joint()
      : cluster_(cluster_size()), rank_(cluster_rank()), warps_(static_cast<int>(blockDim.x) / kWarpSize) {
    if (cluster_ > 1) cluster_arrive();  // no block may write to another that does not run yet
  }

  LONGTAIL_DEVICE bool leads() const { return threadIdx.x < kWarpSize; }

  // The stats of the whole row, in the warp that leads.
  LONGTAIL_DEVICE Stats join(Stats s) {
    s = join_lanes(s, kWarpSize);
    const float4* slots = exchange(float4{s.m, s.d, s.t, s.U});
    if (!leads()) return s;
    Stats row = empty_stats(s.u_g);
    for (int i = lane(); i < cluster_ * warps_; i += kWarpSize) {
      const float4 x = slots[i];
      row = combine(row, {x.x, x.y, x.z, s.u_g, x.w});
    }
    return join_lanes(row, kWarpSize);
  }

  // The sum of what the threads of the row have, in the warp that leads.
  LONGTAIL_DEVICE float sum(float x) {
    const float4* slots = exchange(float4{sum_lanes(x, kWarpSize), 0.0f, 0.0f, 0.0f});
    if (!leads()) return 0.0f;
    float row = 0.0f;
    for (int i = lane(); i < cluster_ * warps_; i += kWarpSize) row += slots[i].x;
    return sum_lanes(row, kWarpSize);
  }

  // The same in every thread of the row.
  LONGTAIL_DEVICE float sum_for_all(float x) {
    const float4* slots = exchange(float4{sum_lanes(x, kWarpSize), 0.0f, 0.0f, 0.0f});
    float row = 0.0f;
    for (int i = lane(); i < cluster_ * warps_; i += kWarpSize) row += slots[i].x;
    return sum_lanes(row, kWarpSize);
  }

  // The leading warp's coefficients, in every thread of its block.
  LONGTAIL_DEVICE Grad share(const Grad& g) {
    float* x = dynamic_shared<float>() + 4 * 2 * cluster_ * warps_ + 8 * turn_;
    if (threadIdx.x == 0) {
      x[0] = g.m;
      x[1] = g.a;
      x[2] = g.b;
      x[3] = g.S;
      x[4] = g.target;
    }
    __syncthreads();
    return {x[0], x[1], x[2], x[3], x[4]};
  }

  // What the warps of all blocks bring, one slot each, in every block. All lanes of a warp bring the same.
  template <typename Slot>
  LONGTAIL_DEVICE const Slot* exchange(Slot mine) {
    static_assert(sizeof(Slot) == 16);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    Slot* slots = dynamic_shared<Slot>() + turn_ * cluster_ * warps_;
    meet();
    if (cluster_ > 1) {
      if (lane() < cluster_) *map_shared(slots + rank_ * warps_ + warp, lane()) = mine;
      cluster_arrive();
      cluster_wait();
    } else {
      if (lane() == 0) slots[warp] = mine;
      __syncthreads();
    }
    return slots;
  }

  LONGTAIL_DEVICE void next_row() { turn_ ^= 1; }

  // After it, no thread of another block is before it.
  LONGTAIL_DEVICE void wait_for_blocks() {
    if (cluster_ == 1) return;
    meet();
    cluster_arrive();
    cluster_wait();
  }

  // To be called by every thread, at the end.
  LONGTAIL_DEVICE void meet() {
    if (cluster_ > 1 && !met_) cluster_wait();
    met_ = true;
  }

  // Bytes of shared memory that it takes, a multiple of 16: joint_bytes of plan.h.
  LONGTAIL_DEVICE int bytes() const { return 16 * 2 * cluster_ * warps_ + 64; }
  LONGTAIL_DEVICE int cluster() const { return cluster_; }
  LONGTAIL_DEVICE int rank() const { return rank_; }
  LONGTAIL_DEVICE int lane() const { return static_cast<int>(threadIdx.x) % kWarpSize; }
  LONGTAIL_DEVICE int slots() const { return cluster_ * warps_; }

 private:
  int cluster_, rank_, warps_, turn_ = 0;
  bool met_ = false;
};

}  // namespace gpu
}  // namespace longtail
