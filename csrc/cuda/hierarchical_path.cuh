// The rings of one row of hierarchical cross-entropy, and its end: hierarchical_math.h in one warp, a lane for each
// ring.
#pragma once

#include "../hierarchical_math.h"
#include "hierarchical_loss.h"
#include "reduce.cuh"

namespace longtail {
namespace gpu {

// Of the classes of a ring that a thread has seen: the largest logit, and the sum of exp(u - m).
struct RingSum {
  float m = -INFINITY, d = 0.0f;
};

// Moves the sum to a new maximum m >= s.m.
LONGTAIL_DEVICE void raise_max(RingSum& s, float m) {
  s.d *= exp_of(s.m - finite_max(m));
  s.m = m;
}

template <int kCount>
LONGTAIL_DEVICE void add(RingSum& s, const float (&u)[kCount]) {
  float m = s.m;
#pragma unroll
  for (int i = 0; i < kCount; ++i) m = fmaxf(m, u[i]);
  if (m > s.m) raise_max(s, m);
  const float at = finite_max(m);
  float d = 0.0f;  // summed apart: long rows would lose digits in one running sum
#pragma unroll
  for (int i = 0; i < kCount; ++i) d += exp_of(u[i] - at);
  s.d += d;
}

LONGTAIL_DEVICE RingSum join_lanes(RingSum s, int lanes) {
  raise_max(s, max_lanes(s.m, lanes));
  s.d = sum_lanes(s.d, lanes);
  return s;
}

// What the threads of a row share.
struct SharedPath {
  int begin[kDeepestTree + 1], end[kDeepestTree + 1];  // positions of the classes of A_0, A_1, ...
  float m[kDeepestTree], c[kDeepestTree];              // dloss/du_j = exp(u_j - m[k]) * c[k] in ring k
  float target;                                        // dloss/du_g
  int padding;
};

// Bytes of shared memory, with one RingSum for each ring and warp behind.
constexpr int hierarchical_shared_bytes(int threads) {
  return static_cast<int>(sizeof(SharedPath)) +
         kDeepestTree * (threads / kWarpSize) * static_cast<int>(sizeof(RingSum));
}

// Of lane k, the k-th node on the path; nothing beyond the depth.
struct PathNode {
  int begin = 0, end = 0;
  float weight = 0.0f;
};

// The path of target g, a node for each lane of a warp, which has to nest.
LONGTAIL_DEVICE PathNode load_path(const HierarchicalLossArgs& a, int64_t g, int lane) {
  PathNode node;
  if (lane < a.depth) {
    const int index = a.path[g * a.depth + lane];
    LONGTAIL_DEVICE_ASSERT(index >= 0 && index < a.nodes, "path is out of bounds");
    node = {a.node_begin[index], a.node_end[index], load_constant(a.node_weight + index)};
  }
  const int above = lane > 0 ? lane - 1 : 0;
  const int begin = __shfl_sync(kAllLanes, node.begin, above), end = __shfl_sync(kAllLanes, node.end, above);
  const bool inside = lane > 0 ? node.begin >= begin && node.end <= end : node.begin >= 0 && node.end <= a.num_classes;
  LONGTAIL_DEVICE_ASSERT(lane >= a.depth || inside, "nodes do not nest");
  return node;
}

// The column of target g, at which its path has to end; -1 where another shard has it. By all lanes of a warp.
LONGTAIL_DEVICE int target_column(const HierarchicalLossArgs& a, int64_t g, const PathNode& node) {
  const int begin = __shfl_sync(kAllLanes, node.begin, a.depth - 1);
  const int count = __shfl_sync(kAllLanes, node.end, a.depth - 1) - begin;
  const bool sharded = a.tree_classes > a.num_classes;
  if (count == 0 && sharded) return -1;
  LONGTAIL_DEVICE_ASSERT(count == 1, "path does not end at its class");
  const int column = a.order != nullptr ? a.order[begin] : begin;
  LONGTAIL_DEVICE_ASSERT(column >= 0 && column < a.num_classes, "order is out of bounds");
  LONGTAIL_DEVICE_ASSERT(a.position == nullptr || a.position[column] == begin, "order and position differ");
  LONGTAIL_DEVICE_ASSERT(column == g || sharded, "path does not end at its class");
  return column;
}

// What the end of a row gives: the loss and the target's gradient in every lane, the coefficient of ring k in lane k.
struct PathEnd {
  float loss, target, c;
};

// By all lanes of a warp. ring, node: of lane k ring k, and the node below it; factor: v w_g.
LONGTAIL_DEVICE PathEnd finish_path(int depth, int lane, const RingSum& ring, const PathNode& node, float u_g,
                                    float factor) {
  using longtail::generic::climb;
  using longtail::generic::Level;
  Level<float> level = {}, mine = {};
  longtail::generic::Mass<float> mass = {u_g, 1.0f};
#pragma unroll 1
  for (int k = depth - 1; k >= 0; --k) {
    level = climb(mass, __shfl_sync(kAllLanes, ring.m, k), __shfl_sync(kAllLanes, ring.d, k), HardwareExp());
    if (lane == k) mine = level;
  }
  const float nothing = longtail::generic::poison(mass);
  auto state = longtail::generic::start(__shfl_sync(kAllLanes, node.weight, 0));
  float own = 0.0f;
#pragma unroll 1
  for (int k = 0; k < depth; ++k) {
    level = {__shfl_sync(kAllLanes, mine.nll, k), __shfl_sync(kAllLanes, mine.miss, k),
             __shfl_sync(kAllLanes, mine.hit, k), __shfl_sync(kAllLanes, mine.unit, k)};
    const float weight = __shfl_sync(kAllLanes, node.weight, k);
    const float next = __shfl_sync(kAllLanes, node.weight, k + 1 < depth ? k + 1 : k);
    const float c = longtail::generic::descend(state, level, weight, next);
    if (lane == k) own = factor * (c + nothing);
  }
  return {factor * (state.loss + nothing), factor * (nothing - state.missed), own};
}

}  // namespace gpu
}  // namespace longtail
