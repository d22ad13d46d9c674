// The innermost loops of ZLPR and the two-way loss: where a register of logits and the sides of its lanes come from,
// and what one adds to both sums. A lane of one side alone costs one exponential.
#pragma once

#include "../two_way_math.h"
#include "kernels.h"
#include "softmax_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

template <typename T>
struct Lanes {
  Vec<T> u, y;
  Mask<T> positive, negative;
  bool hard;  // no lane is on both sides
};

template <typename T>
LONGTAIL_INLINE Mask<T> first_lanes(int64_t count) {
  return lane_numbers<T>() < Vec<T>(T(count));
}

// Of targets of elements; those equal to `ignored` are on no side.
template <typename T>
LONGTAIL_INLINE Lanes<T> dense_lanes(Vec<T> u, Vec<T> y, bool ignoring, T ignored) {
  const Vec<T> zero = T(0), one = T(1);
  Mask<T> positive = {~(y.v <= zero.v)}, negative = {~(y.v >= one.v)};  // NaN is on both
  auto settled = y * y == y;
  if (ignoring) {
    const Mask<T> counts = {y.v != Vec<T>(ignored).v};
    positive = positive & counts;
    negative = negative & counts;
    settled = settled | Mask<T>{~counts.v};
  }
  return {u, y, positive, negative, all(settled)};
}

template <typename Z, bool kBiased>
LONGTAIL_INLINE VecOf<Z> biased(const Z* z, const typename Stored<Z>::Arithmetic* bias, int64_t j, int64_t left) {
  const VecOf<Z> u = load_some(z + j, left);
  return kBiased ? u + load_some(bias + j, left) : u;
}

// Classes of one row with a target for each, of type Y.
template <typename Z, typename Y, bool kBiased>
struct DenseRow {
  using T = typename Stored<Z>::Arithmetic;
  static constexpr bool kDense = true;
  const Z* z;
  const T* bias;
  const Y* y;
  bool ignoring;
  T ignored;
  LONGTAIL_INLINE DenseRow from(int64_t j) const {
    return {z + j, kBiased ? bias + j : bias, y + j, ignoring, ignored};
  }
  LONGTAIL_INLINE bool some(int64_t) const { return true; }
  LONGTAIL_INLINE Vec<T> load_u(int64_t j, int64_t left) const { return biased<Z, kBiased>(z, bias, j, left); }
  LONGTAIL_INLINE Lanes<T> at(int64_t j, int64_t left) const {
    Lanes<T> x = dense_lanes<T>(load_u(j, left), load_some(y + j, left), ignoring, ignored);
    if (left < Vec<T>::kLanes) {
      x.positive = x.positive & first_lanes<T>(left);
      x.negative = x.negative & first_lanes<T>(left);
    }
    return x;
  }
  LONGTAIL_INLINE void prefetch(int64_t j) const {
    prefetch_ahead(z + j, Vec<T>::kLanes);
    prefetch_ahead(y + j, Vec<T>::kLanes);
  }
};

// Classes of one row whose target is the g-th, or none of them.
template <typename Z, bool kBiased>
struct ClassRow {
  using T = typename Stored<Z>::Arithmetic;
  static constexpr bool kDense = false, ignoring = false;
  const Z* z;
  const T* bias;
  int64_t g;
  LONGTAIL_INLINE ClassRow from(int64_t j) const { return {z + j, kBiased ? bias + j : bias, g - j}; }
  LONGTAIL_INLINE bool some(int64_t j) const { return g >= j && g < j + Vec<T>::kLanes; }
  LONGTAIL_INLINE Vec<T> load_u(int64_t j, int64_t left) const { return biased<Z, kBiased>(z, bias, j, left); }
  LONGTAIL_INLINE Lanes<T> at(int64_t j, int64_t left) const {
    const Mask<T> positive = lane_numbers<T>() == Vec<T>(T(g - j)), there = first_lanes<T>(left);
    return {load_u(j, left), Vec<T>(T(0)), positive, Mask<T>{~positive.v & there.v}, true};
  }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(z + j, Vec<T>::kLanes); }
};

// Of both sides: the largest exponents m, 0 where they are infinite but for gradients, and 1 / T.
template <typename T>
struct Exponents {
  Vec<T> negative, positive, inverse_negative, inverse_positive;
};

template <typename T>
struct Largest {
  Vec<T> negative = T(-INFINITY), positive = T(-INFINITY);
  Mask<T> any = {};  // lanes in which a positive has been
  LONGTAIL_INLINE void add(const Lanes<T>& x) {
    const Vec<T> none = T(-INFINITY);
    negative = maximum(select(x.negative, x.u, none), negative);
    positive = maximum(select(x.positive, -x.u, none), positive);
    any = any | x.positive;
  }
};

template <typename T>
struct SideSums {
  Vec<T> negative = T(0), positive = T(0);

  // Lanes that are all negatives.
  LONGTAIL_INLINE void add_negatives(Vec<T> u, const Exponents<T>& m) {
    Vec<T> shift = minimum(Vec<T>(T(0)), (u - m.negative) * m.inverse_negative);
    negative = negative + exp_cut(shift, Summed<T>());
  }

  LONGTAIL_INLINE void add(const Lanes<T>& x, const Exponents<T>& m) {
    const Vec<T> zero = T(0);
    if (x.hard) {
      const Vec<T> far = select(x.positive, -x.u - m.positive, x.u - m.negative);
      Vec<T> shift = minimum(zero, far * select(x.positive, m.inverse_positive, m.inverse_negative));
      const Vec<T> e = exp_cut(shift, Summed<T>());
      negative = negative + select(x.negative, e, zero);
      positive = positive + select(x.positive, e, zero);
      return;
    }
    Vec<T> shift_n = minimum(zero, (x.u - m.negative) * m.inverse_negative);
    Vec<T> shift_p = minimum(zero, (-x.u - m.positive) * m.inverse_positive);
    negative = negative + select(x.negative, (Vec<T>(T(1)) - x.y) * exp_cut(shift_n, T(0)), zero);
    positive = positive + select(x.positive, x.y * exp_cut(shift_p, T(0)), zero);
  }
};

// by: what multiplies the terms of both sides.
template <typename Z, typename T>
LONGTAIL_INLINE Vec<T> negative_gradient(Vec<T> u, const Exponents<T>& m, Vec<T> by) {
  Vec<T> shift = (u - m.negative) * m.inverse_negative;
  return by * exp_cut(shift, RoundedTo<Z>());
}

template <typename Z, typename T>
LONGTAIL_INLINE Vec<T> gradient_of(const Lanes<T>& x, const Exponents<T>& m, Vec<T> by_negative, Vec<T> by_positive,
                                   bool ignoring) {
  const Vec<T> zero = T(0);
  if (x.hard) {
    const Vec<T> far = select(x.positive, -x.u - m.positive, x.u - m.negative);
    Vec<T> shift = far * select(x.positive, m.inverse_positive, m.inverse_negative);
    const Vec<T> du = exp_cut(shift, RoundedTo<Z>()) * select(x.positive, -by_positive, by_negative);
    return ignoring ? select(x.positive | x.negative, du, zero) : du;
  }
  Vec<T> shift_n = (x.u - m.negative) * m.inverse_negative, shift_p = (-x.u - m.positive) * m.inverse_positive;
  const Vec<T> of_n = (Vec<T>(T(1)) - x.y) * exp_cut(shift_n, CancelledTo<Z>()) * by_negative;
  const Vec<T> of_p = x.y * exp_cut(shift_p, CancelledTo<Z>()) * by_positive;
  return select(x.negative, of_n, zero) - select(x.positive, of_p, zero);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
