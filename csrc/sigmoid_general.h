// The mathematics of one element with every option of the sigmoid family: see sigmoid_math.h for what is plain.
//
// u: the logit with class_bias. Negatives may have an exponent of their own, a scale lambda (u becomes lambda u, and
// the loss is divided by lambda) and a shift m of their probability (p becomes max(p - m, 0)). T: float, double, or a
// SIMD vector of them.
#pragma once

#include "sigmoid_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

// What a launch's elements have in common; S is a scalar type.
template <typename S>
struct GeneralOptions {
  S clip, scale, inverse_scale;  // of negatives: m, lambda and 1 / lambda
  S pull;                        // 1, or 0 where the gradient takes the focal factor for a constant
  S smoothing;
  S rebalance_alpha, rebalance_beta, rebalance_shift;  // shift: beta mu
  bool whole;  // both exponents are whole numbers of up to three bits, which `positive_bits`, `negative_bits` hold
  int positive_bits, negative_bits;
};

template <typename S, typename Args>
LONGTAIL_INLINE GeneralOptions<S> general_options(const Args& a) {
  GeneralOptions<S> o = {};
  o.clip = static_cast<S>(a.clip);
  o.scale = static_cast<S>(a.negative_scale);
  o.inverse_scale = static_cast<S>(1 / a.negative_scale);
  o.pull = a.detach ? S(0) : S(1);
  o.smoothing = static_cast<S>(a.label_smoothing);
  o.rebalance_alpha = static_cast<S>(a.rebalance_alpha);
  o.rebalance_beta = static_cast<S>(a.rebalance_beta);
  o.rebalance_shift = static_cast<S>(a.rebalance_beta * a.rebalance_mu);
  const auto negative = a.same_gamma ? a.gamma : a.gamma_negative;
  if (a.class_gamma == nullptr && a.gamma < 8 && negative < 8) {
    o.positive_bits = static_cast<int>(a.gamma);
    o.negative_bits = static_cast<int>(negative);
    o.whole = o.positive_bits == a.gamma && o.negative_bits == negative;
  }
  return o;
}

// x to the whole powers of both kinds: `one` says where that of positives is meant.
template <typename T, typename M, typename S>
LONGTAIL_INLINE T whole_power(T x, M one, const GeneralOptions<S>& o) {
  T found = T(S(1)), power = x;
  const int every = o.positive_bits | o.negative_bits;
  for (int bit = 1; bit <= 4 && bit <= every; bit *= 2) {
    if (o.positive_bits & o.negative_bits & bit) {
      found = found * power;
    } else if (o.positive_bits & bit) {
      found = found * select(one, power, T(S(1)));
    } else if (o.negative_bits & bit) {
      found = found * select(one, T(S(1)), power);
    }
    power = power * power;
  }
  return found;
}

// x^gamma from log(x), of which 0^0 is 1.
template <typename T, typename Limit>
LONGTAIL_INLINE T power_of(T log_x, T gamma, Limit lowest) {
  T log_power = select(gamma == T(0), T(0), gamma * log_x);
  return exp_cut(log_power, lowest);
}

// log(x) for 0 <= x <= 1: finite and very low for what is no normal number.
template <typename T, typename S>
LONGTAIL_INLINE T log_cut(T x, S smallest) {
  return log(maximum(T(smallest), x));
}

// Of negatives whose probability p is shifted: q = 1 - p.
template <typename T>
struct Shifted {
  T miss, hit;  // max(p - m, 0), and 1 minus it
  T cost;       // -log(hit)
  T slope;      // d miss / d logit, NaN where miss is
};

template <typename T, typename S>
LONGTAIL_INLINE Shifted<T> shifted(const Logistic<T>& x, const GeneralOptions<S>& o) {
  if (o.clip == S(0)) return {x.p, x.q, x.plus, x.p * x.q};
  const T zero = T(S(0)), one = T(S(1)), over = x.p - T(o.clip);
  const auto live = zero < over;
  const T miss = maximum(zero, over), hit = select(live, x.q + T(o.clip), one);  // NaN stays NaN in miss
  return {miss, hit, minus_log1m(miss, hit), select(live, x.p * x.q, miss)};
}

// What the loss of y in {0, 1} is made of, where x is what it rises with: u scaled for y = 0, and -u for y = 1.
template <typename T>
struct HardTerms {
  T focal;        // (1 - p_t)^gamma
  T cost, slope;  // -log p_t, and the derivative of the loss by x over `focal`
};

template <typename T, typename M, typename S, typename Limit>
LONGTAIL_INLINE HardTerms<T> hard_terms(T x, M one, T gamma, const GeneralOptions<S>& o, Limit lowest) {
  const T zero = T(S(0)), unit = T(S(1));
  const Logistic<T> s = logistic(x, lowest);
  T miss = s.p, log_miss = -s.minus, cost = s.plus, slope = s.p;
  T rise = select(s.q == zero, zero, s.q * cost);  // tends to 0 with q, also where the cost is infinite
  if (o.clip != S(0)) {
    const Shifted<T> shift = shifted(s, o);
    miss = select(one, miss, shift.miss);
    cost = select(one, cost, shift.cost);
    slope = select(one, slope, shift.slope * reciprocal(shift.hit));
    if (!o.whole) log_miss = select(one, log_miss, log_cut(shift.miss, Smallest<S>::kNormal));
    if (o.pull != S(0)) {
      const T share = shift.cost / select(shift.miss == zero, unit, shift.miss);
      rise = select(one, rise, s.p * s.q * share);
    }
  }
  if (o.pull != S(0)) slope = gamma * rise + slope;
  return {o.whole ? whole_power(miss, one, o) : power_of(log_miss, gamma, lowest), cost, slope};
}

// For y in {0, 1}: the loss, and its derivative by u. exponent(): that of each element's kind.
template <typename T, typename M, typename Exponent, typename S, typename Limit>
LONGTAIL_INLINE Element<T> general_hard(T u, M one, const Exponent& exponent, const GeneralOptions<S>& o,
                                        Limit lowest) {
  const bool scaled = o.scale != S(1);
  T gamma = T(S(0));
  if (o.pull != S(0) || !o.whole) gamma = exponent();
  const HardTerms<T> t = hard_terms(select(one, -u, scaled ? T(o.scale) * u : u), one, gamma, o, lowest);
  T loss = t.focal * t.cost, derivative = t.focal * t.slope;
  if (scaled) loss = select(one, loss, loss * T(o.inverse_scale));
  return {loss, select(one, -derivative, derivative)};
}

// For 0 <= y <= 1, with 1 - p_t read as y (1 - p) + (1 - y) p, as the exponent `mixed` has been; `positive` multiplies
// the positive term (pos_weight). The loss, and its derivative by u.
template <typename T, typename S, typename Limit>
LONGTAIL_INLINE Element<T> general_soft(T u, T y, T positive, T mixed, const GeneralOptions<S>& o, Limit lowest) {
  const T zero = T(S(0)), unit = T(S(1)), rest = unit - y, weighted = positive * y;
  const T gamma = maximum(zero, mixed);  // y may be a rounding outside of [0, 1]
  const Logistic<T> x = logistic(u, lowest);
  const Logistic<T> scaled = o.scale == S(1) ? x : logistic(T(o.scale) * u, lowest);
  const Shifted<T> n = shifted(scaled, o);
  const T cost = select(weighted == zero, zero, weighted * x.minus) +
                 select(rest == zero, zero, rest * n.cost * T(o.inverse_scale));
  const T fall = o.clip == S(0) ? n.miss : n.slope * reciprocal(n.hit);
  const T slope = rest * fall - weighted * x.q;
  const T sum = y * x.q + rest * n.miss, miss = select(sum < zero, zero, sum);
  const T miss_slope = rest * T(o.scale) * n.slope - y * (x.p * x.q);
  // It tends to 0 with p or 1 - p, also times a cost that is infinite.
  const T pull = T(o.pull) * gamma * select(miss_slope == zero, zero, miss_slope * cost);
  const T focal = power_of(log_cut(miss, Smallest<S>::kNormal), gamma, lowest);
  return {focal * cost, focal * (slope + pull / select(miss == zero, unit, miss))};
}

// The weight of an element in the distribution-balanced loss, from 1 / n of its class and what the row multiplies it
// by: beta over the sum of those of its labels, which is infinite where there are none.
template <typename T, typename S, typename Limit>
LONGTAIL_INLINE T rebalanced(T inverse_count, T row, const GeneralOptions<S>& o, Limit lowest) {
  const T x = inverse_count * row - T(o.rebalance_shift), unit = T(S(1));
  T distance = minus_absolute(x);
  const T e = exp_cut(distance, lowest), nearer = reciprocal(unit + e);
  return T(o.rebalance_alpha) + select(T(S(0)) < x, nearer, e * nearer);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
