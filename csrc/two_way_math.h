// The mathematics of one row of ZLPR and of the two-way loss, shared by every C++ and CUDA kernel.
//
// Notation of longtail.reference.two_way: a side has the largest exponent m of its classes, u of a negative and -u of a
// positive, and the sum d of their weights times exp((exponent - m) / T); its log-sum-exp is l = m + T log d.
#pragma once

#include "loss_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

template <typename T>
struct Side {
  T m, d;
};

// m as a number that can be subtracted: an infinite one stands in as 0.
template <typename T>
LONGTAIL_INLINE T finite_exponent(T m) {
  return select(minus_absolute(m) == T(-INFINITY), T(0), m);
}

// Moves d to a new maximum m > s.m; inverse: 1 / T.
template <typename T, typename Limit>
LONGTAIL_INLINE void raise_side(Side<T>& s, T m, T inverse, Limit lowest) {
  T shift = (s.m - m) * inverse;
  s.d = select(s.m < m, s.d * exp_cut(shift, lowest), s.d);
  s.m = select(s.m < m, m, s.m);
}

// What an infinite exponent makes of d, whatever was added to it; NaN stays NaN.
template <typename T>
LONGTAIL_INLINE void settle_side(Side<T>& s) {
  s.d = select(s.m == T(INFINITY), s.d + T(INFINITY), s.d);
}

// softplus(l), and its derivative.
template <typename T>
struct Softplus {
  T value, slope;
};

template <typename T, typename Limit>
LONGTAIL_INLINE Softplus<T> softplus(T l, Limit lowest) {
  const T zero = T(0);
  T distance = minus_absolute(l);
  const T e = exp_cut(distance, lowest), inverse = T(1) / (T(1) + e);
  return {maximum(zero, l) + log1p(e), select(zero < l, inverse, e * inverse)};
}

// dloss/du_j is weight * exp((u_j - m) / T) times `negative`, less weight * exp((-u_j - m) / T) times `positive`.
template <typename T>
struct TwoWayRow {
  T loss, negative, positive;
};

// Scalar: the type under T; v: the sample weight.
template <typename T, typename Scalar>
LONGTAIL_INLINE TwoWayRow<T> finish_sides(const Side<T>& n, const Side<T>& p, Scalar negative_temperature,
                                          Scalar positive_temperature, bool joint, T v) {
  constexpr Scalar kLowest = ExpRange<Scalar>::kLowest;
  const T zero = T(0), one = T(1), none = T(-INFINITY);
  const auto no_n = n.d == zero, no_p = p.d == zero;
  const T log_n = T(negative_temperature) * log(select(no_n, one, n.d));
  const T log_p = T(positive_temperature) * log(select(no_p, one, p.d));
  TwoWayRow<T> row;
  if (joint) {
    const T lag = select(no_n | no_p, none, (n.m + p.m) + (log_n + log_p));
    const T total = n.d + p.d, poison = select(total == total, zero, total);  // of one side, where the other is empty
    const Softplus<T> both = softplus(lag, kLowest);
    row = {both.value + poison, both.slope + poison, both.slope + poison};
  } else {
    const Softplus<T> of_n = softplus(select(no_n, none, n.m + log_n), kLowest);
    const Softplus<T> of_p = softplus(select(no_p, none, p.m + log_p), kLowest);
    row = {of_n.value + of_p.value, of_n.slope, of_p.slope};
  }
  return {v * row.loss, select(no_n, zero, v * row.negative / n.d), select(no_p, zero, v * row.positive / p.d)};
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
