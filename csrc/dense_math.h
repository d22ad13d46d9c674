// The mathematics of one row of the softmax family whose target is a probability for each class.
//
//   q_j = w_j ((1 - epsilon) y_j + epsilon / C),   loss = v sum_j q_j (lse - u_j) + z_loss lse^2
//
// Notation, T and LONGTAIL_ISA as in loss_math.h: accumulate -> DenseStats -> finish -> loss, DenseGrad -> apply.
#pragma once

#include "loss_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Sums of nothing negative, where probabilities and weights are not: loss = v (V + W log d), and no digits cancel.
template <typename T>
struct DenseStats {
  T m;  // max of u_j
  T d;  // sum of exp(u_j - m)
  T V;  // sum of q_j (m - u_j), where 0 * inf is 0
  T W;  // sum of q_j
};

template <typename T>
LONGTAIL_INLINE DenseStats<T> empty_dense_stats() {
  return {T(-INFINITY), T(0), T(0), T(0)};
}

// q_j of the probability y with label smoothing; of no probability at a logit of -inf, 0, whatever the weight.
template <typename T>
LONGTAIL_INLINE T weighted_probability(T w, T y, T u) {
  return select((y == T(0)) & (u == T(-INFINITY)), T(0), w * y);
}

// Adds one class (or a vector of them) with u <= s.m.
template <typename T, typename Limit>
LONGTAIL_INLINE void accumulate(DenseStats<T>& s, T finite_m, T u, T q, Limit lowest) {
  T shift = u - finite_m;
  s.V = s.V - select(q == T(0), T(0), q * shift);
  s.W = s.W + q;
  s.d = s.d + exp_cut(shift, lowest);
}

// Moves the sums to a new maximum m >= s.m.
template <typename T, typename Limit>
LONGTAIL_INLINE void raise_max(DenseStats<T>& s, T m, Limit lowest) {
  T shift;
  const T factor = shifted_exp(s.m, finite_max(m), shift, lowest);
  s.V = s.V + select(s.W == T(0), T(0), s.W * (finite_max(m) - finite_max(s.m)));
  s.d = factor * s.d;
  s.m = m;
}

// Joins two disjoint pieces of one row.
template <typename T, typename Limit>
LONGTAIL_INLINE DenseStats<T> combine(DenseStats<T> a, DenseStats<T> b, Limit lowest) {
  const T m = maximum(a.m, b.m);
  raise_max(a, m, lowest);
  raise_max(b, m, lowest);
  return {m, a.d + b.d, a.V + b.V, a.W + b.W};
}

// dloss/du_j = v (mass exp(u_j - m) - q_j) + z exp(u_j - m): exactly 0 where p_j W is q_j.
template <typename T>
struct DenseGrad {
  T m, mass, v, z;
};

template <typename T>
struct DenseLoss {
  T loss;
  DenseGrad<T> grad;
};

// The gradient needs no V. v: the sample weight. A row of nothing but -inf has no softmax: NaN, as in torch.
template <typename T, typename Options>
LONGTAIL_INLINE DenseLoss<T> finish(const DenseStats<T>& s, const Options& o, T v) {
  const T d = select(s.d == T(0), T(NAN), s.d), log_d = log(d);
  const T inverse_d = reciprocal(d);
  T loss = v * (s.V + s.W * log_d), z = T(0);
  if (o.z_loss != decltype(o.z_loss)(0)) {
    const T lse = s.m + log_d;
    loss = loss + T(o.z_loss) * lse * lse;
    z = T(decltype(o.z_loss)(2) * o.z_loss) * lse * inverse_d;
  }
  return {loss, {finite_max(s.m), s.W * inverse_d, v, z}};
}

// z stays 0 where its option is off, whatever the upstream gradient.
template <typename T>
LONGTAIL_INLINE void scale_grad(DenseGrad<T>& g, T upstream) {
  g.v = g.v * upstream;
  g.z = select(g.z == T(0), g.z, g.z * upstream);
}

template <typename T, typename Limit>
LONGTAIL_INLINE T apply(const DenseGrad<T>& g, T u, T q, Limit lowest) {
  T shift;
  const T e = shifted_exp(u, g.m, shift, lowest);
  return g.v * (g.mass * e - q) + g.z * e;
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
