// What a mean over targets divides by, and the mean: each in one launch of one block, or of one cluster of them.
#pragma once

#include <type_traits>

#include "../row_args.h"
#include "reduce.cuh"

namespace longtail {
namespace gpu {

constexpr int kTargetThreads = 512;  // at most
constexpr int kTargetGroup = 16;     // targets of a thread that are under way together

// A sum, and what its additions have rounded off: millions of terms cost it no digits. Nothing is lost of integers.
template <typename T>
struct alignas(16) Total {
  T sum, lost;

  LONGTAIL_DEVICE void add(const Total& x) {
    const T before = sum;
    sum += x.sum;
    const T added = sum - before;
    lost = (lost + x.lost) + ((before - (sum - added)) + (x.sum - added));
  }
  // Of all lanes of the warp.
  LONGTAIL_DEVICE void join_lanes() {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      add({__shfl_xor_sync(kAllLanes, sum, offset), __shfl_xor_sync(kAllLanes, lost, offset)});
    }
  }
  // Infinite terms have no rounding.
  LONGTAIL_DEVICE T value() const { return lost == lost ? sum + lost : sum; }
};

// Of all threads, in the warp that leads.
template <typename T>
LONGTAIL_DEVICE Total<T> joined(Joint& joint, Total<T> total) {
  total.join_lanes();
  const Total<T>* slots = joint.exchange(total);
  total = {};
  if (!joint.leads()) return total;
  for (int i = joint.lane(); i < joint.slots(); i += kWarpSize) total.add(slots[i]);
  total.join_lanes();
  return total;
}

// T: of the weights, or int64_t without.
// reads: target [R], weight [C] where a target is. writes: result [1].
// bytes: 8 R, and a weight for each target that the caches do not have: the least there is.
template <typename T>
LONGTAIL_KERNEL(kTargetThreads, 1)
mean_denominator_kernel(LONGTAIL_PARAMETER MeanDenominatorArgs a) {
  Joint joint;
  Total<T> total = {};
  const auto* weight = static_cast<const T*>(a.weight);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x),
            tile = kTargetGroup * threads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * tile; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * tile) {
    const int left = a.rows - row < tile ? static_cast<int>(a.rows - row) : tile;
    const int64_t* first = a.target + (row + thread) * a.target_stride;
    int64_t target[kTargetGroup];
#pragma unroll
    for (int k = 0; k < kTargetGroup; ++k) {
      target[k] = k * threads + thread < left ? first[k * threads * a.target_stride] : a.ignore_index;
    }
    bool counted[kTargetGroup], valid = true;
#pragma unroll
    for (int k = 0; k < kTargetGroup; ++k) {
      counted[k] = target[k] != a.ignore_index;
      valid = valid && (!counted[k] || static_cast<uint64_t>(target[k]) < static_cast<uint64_t>(a.num_classes));
    }
    LONGTAIL_DEVICE_ASSERT(valid, "target is out of bounds");
    if constexpr (std::is_same_v<T, int64_t>) {
      int count = 0;
#pragma unroll
      for (int k = 0; k < kTargetGroup; ++k) count += counted[k];
      total.sum += count;
    } else {
      T term[kTargetGroup];
#pragma unroll
      for (int k = 0; k < kTargetGroup; ++k) term[k] = counted[k] ? weight[target[k]] : T(0);
#pragma unroll
      for (int k = 0; k < kTargetGroup; ++k) total.add({term[k], T(0)});
    }
  }
  const Total<T> sum = joined(joint, total);
  if (joint.rank() == 0 && threadIdx.x == 0) *static_cast<T*>(a.result) = sum.value();
}

// T: of the losses.
// reads: loss [R], denominator [1]. writes: mean [1], divisor [1].
// bytes: R losses: the least there is.
template <typename T>
LONGTAIL_KERNEL(kTargetThreads, 1)
mean_loss_kernel(LONGTAIL_PARAMETER MeanLossArgs a) {
  Joint joint;
  Total<T> total = {};
  const auto* loss = static_cast<const T*>(a.loss);
  const int threads = static_cast<int>(blockDim.x), tile = kTargetGroup * threads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * tile + static_cast<int>(threadIdx.x); row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * tile) {
    T term[kTargetGroup];
#pragma unroll
    for (int k = 0; k < kTargetGroup; ++k) {
      const int64_t at = row + k * threads;
      term[k] = at < a.rows ? loss[at * a.loss_stride] : T(0);
    }
#pragma unroll
    for (int k = 0; k < kTargetGroup; ++k) total.add({term[k], T(0)});
  }
  const Total<T> sum = joined(joint, total);
  if (joint.rank() > 0 || threadIdx.x > 0) return;
  const T denominator = a.denominator_type == Counted::integers  ? T(*static_cast<const int64_t*>(a.denominator))
                        : a.denominator_type == Counted::float32 ? T(*static_cast<const float*>(a.denominator))
                                                                 : T(*static_cast<const double*>(a.denominator));
  *static_cast<T*>(a.mean) = sum.value() / denominator;
  *static_cast<T*>(a.divisor) = denominator == T(0) ? T(INFINITY) : denominator;
}

// A cluster's further blocks take what one does not have under way at once.
inline Plan mean_plan_of(int64_t rows, const Device& device) {
  const int64_t blocks = ceil_div(rows, kTargetThreads * kTargetGroup);
  return {Regime::sweep, false, power_of_two(rows, kWarpSize, kTargetThreads), 0,
          power_of_two(blocks, 1, largest_cluster(device))};
}

inline void mean_denominator_launch(const MeanDenominatorArgs& a, const Plan& plan, void* stream) {
  const auto kernel = a.weight_size == 0   ? mean_denominator_kernel<int64_t>
                      : a.weight_size == 4 ? mean_denominator_kernel<float>
                                           : mean_denominator_kernel<double>;
  launch(kernel, plan.cluster, plan.threads, plan.cluster, joint_bytes(plan.threads, plan.cluster), stream, a);
}

inline void mean_loss_launch(const MeanLossArgs& a, const Plan& plan, void* stream) {
  const auto kernel = a.loss_size == 4 ? mean_loss_kernel<float> : mean_loss_kernel<double>;
  launch(kernel, plan.cluster, plan.threads, plan.cluster, joint_bytes(plan.threads, plan.cluster), stream, a);
}

}  // namespace gpu
}  // namespace longtail
