// The mathematics of one row of hierarchical cross-entropy, shared by every C++ and CUDA kernel; see
// longtail.reference.hierarchical.
//
//   logits, target --> (m, d) of each ring, u_g --climb, descend--> loss, a coefficient for each ring
//
// Of the path A_0 (all classes) > A_1 > ... > A_L = {g}, ring k is A_k without A_{k+1}; S(A) is the sum of exp(u_j).
#pragma once

#include "hierarchical_args.h"
#include "loss_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

// S(A) as s * exp(top), top one of the logits and s >= 1: differences of logits keep their digits at any offset.
template <typename T>
struct Mass {
  T top, s;
};

// The step from A_{l-1} down to A_l, P = S(A_l) / S(A_{l-1}).
template <typename T>
struct Level {
  T nll;        // -log P
  T miss, hit;  // 1 - P, P
  T unit;       // exp(m) / S(A_{l-1}), m that of the ring around A_l
};

// From S(A_l) to S(A_{l-1}), by the ring between them. An empty one, d = 0, changes nothing: P is 1 exactly.
template <typename T, typename Limit>
LONGTAIL_INLINE Level<T> climb(Mass<T>& mass, T m, T d, Limit lowest) {
  const T zero = T(0), one = T(1), far = T(40);
  const T lag = select(d == zero, T(-INFINITY), m - mass.top);
  const auto behind = zero < lag;
  T distance = minus_absolute(lag);
  const T e = exp_cut(distance, lowest);
  const T of_ring = select(behind, one, e), ring = d * of_ring, child = mass.s * select(behind, e, one);
  const T total = ring + child, inverse = reciprocal(total);
  // The ratio of the two may be too large for T; its logarithm is not.
  const T ratio = ring / select(far < lag, one, child);
  const T nll = select(far < lag, lag + log(total / mass.s), log1p(ratio, reciprocal(one + ratio)));
  mass = {select(behind, m, mass.top), total};
  return {nll, ring * inverse, child * inverse, of_ring * inverse};
}

// What is carried down the path. `missed` is sum_{l<=k} lambda_l miss_l hit_{l+1} ... hit_k, and `kept` is
// lambda_{k+1} - missed, from that difference or from the step of lambda and what was kept above, whichever cancels
// less: the one where lambda falls steeply, the other where all of it has been missed.
template <typename T>
struct Descent {
  T loss, kept, missed;
};

template <typename T>
LONGTAIL_INLINE Descent<T> start(T first_weight) {
  return {T(0), first_weight, T(0)};
}

// Past one level, whose node has `weight` and the next one `next_weight`. Returns the coefficient of the ring around
// it: dloss/du_j = exp(u_j - m) * coefficient.
template <typename T>
LONGTAIL_INLINE T descend(Descent<T>& s, const Level<T>& level, T weight, T next_weight) {
  const T coefficient = level.unit * s.kept;
  s.loss = s.loss + weight * level.nll;
  s.missed = s.missed * level.hit + weight * level.miss;
  const T step = next_weight - weight, carried = level.hit * s.kept;
  const T size = -(minus_absolute(step) + minus_absolute(carried));
  s.kept = select(size < next_weight + s.missed, step + carried, next_weight - s.missed);
  return coefficient;
}

// 0, or NaN where S(A_0) is no positive number: all logits -inf, or the target at +inf.
template <typename T>
LONGTAIL_INLINE T poison(const Mass<T>& root) {
  return root.top - root.top;
}

template <typename T>
struct HierarchicalRow {
  T loss;
  T ring[kDeepestTree];  // dloss/du_j = exp(u_j - m_k) * ring[k]
  T target;              // dloss/du_g
};

// stats: m and d of each ring, then u_g; weight: lambda of the `depth` nodes of the path; factor: v w_g.
template <typename T>
LONGTAIL_INLINE HierarchicalRow<T> finish_rings(int depth, const T* stats, const T* weight, T factor) {
  Level<T> levels[kDeepestTree];
  Mass<T> mass = {stats[2 * depth], T(1)};
  for (int k = depth - 1; k >= 0; --k) {
    levels[k] = climb(mass, stats[2 * k], stats[2 * k + 1], ExpRange<T>::kLowest);
  }
  const T nothing = poison(mass);
  HierarchicalRow<T> row = {};
  Descent<T> state = start(weight[0]);
  for (int k = 0; k < depth; ++k) {
    const T coefficient = descend(state, levels[k], weight[k], weight[k + 1 < depth ? k + 1 : k]);
    row.ring[k] = factor * (coefficient + nothing);
  }
  row.loss = factor * (state.loss + nothing);
  row.target = factor * (nothing - state.missed);
  return row;
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
