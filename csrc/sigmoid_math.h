// The mathematics of one element of the sigmoid family, shared by every C++ and CUDA kernel.
//
// Notation of the documentation: z logit, y target, p = sigmoid(z), p_t = p for y = 1 and 1 - p for y = 0.
//   loss = factor * (1 - p_t)^gamma * -log p_t,  gamma = 0: binary cross-entropy
// Both p and 1 - p, and both logarithms, come from exp(-|z|): none is ever one minus the other.
#pragma once

#include "loss_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

// How (1 - p_t)^gamma is computed: gamma 0, gamma 2, or any other; `general`: see sigmoid_general.h.
enum class Focus { none, square, power, general };

template <typename T>
struct Logistic {
  T p, q;         // sigmoid(z), sigmoid(-z)
  T plus, minus;  // softplus(z), softplus(-z)
};

template <typename T, typename Limit>
LONGTAIL_INLINE Logistic<T> logistic(T z, Limit lowest) {
  const T zero = T(0), one = T(1);
  T distance = minus_absolute(z);
  const T e = exp_cut(distance, lowest);
  const T tail = log1p(e), nearer = reciprocal(one + e), farther = e * nearer;
  const auto positive = zero < z;
  return {select(positive, nearer, farther), select(positive, farther, nearer), maximum(zero, z) + tail,
          maximum(zero, -z) + tail};
}

// The loss and its derivative; the factor (alpha, weights) is still to be multiplied.
template <typename T>
struct Element {
  T loss, slope;
};

template <Focus kFocus, typename T, typename Limit>
LONGTAIL_INLINE T focal_factor(T miss, T log_miss, T gamma, Limit lowest) {
  if (kFocus == Focus::square) return miss * miss;
  T log_focal = gamma * log_miss;
  return exp_cut(log_focal, lowest);
}

// For y in {0, 1}, from the logistic of x_t: z for y = 1, -z for y = 0, and the focal factor (1 - p_t)^gamma.
// `slope` is -dloss/dx_t, never negative.
template <typename T>
LONGTAIL_INLINE Element<T> focused_element(const Logistic<T>& x, T focal, T gamma) {
  const T zero = T(0);
  // p_t * cost tends to 0 with p_t, also where cost is infinite.
  const T hit_cost = select(x.p == zero, zero, x.p * x.minus);
  return {focal * x.minus, focal * (gamma * hit_cost + x.q)};
}

template <Focus kFocus, typename T, typename Limit>
LONGTAIL_INLINE Element<T> hard_element(const Logistic<T>& x, T gamma, Limit lowest) {
  if (kFocus == Focus::none) return {x.minus, x.q};
  return focused_element(x, focal_factor<kFocus>(x.q, -x.plus, gamma, lowest), gamma);
}

// For 0 < y < 1, with 1 - p_t read as y (1 - p) + (1 - y) p; `positive` multiplies the positive term (pos_weight).
// `slope` is dloss/dz.
template <Focus kFocus, typename T, typename Limit>
LONGTAIL_INLINE Element<T> soft_element(const Logistic<T>& x, T y, T positive, T gamma, Limit lowest) {
  const T zero = T(0), one = T(1), weighted = positive * y, rest = one - y;
  const T cost = weighted * x.minus + rest * x.plus;
  const T slope = rest * x.p - weighted * x.q;
  if (kFocus == Focus::none) return {cost, slope};
  const T sum = y * x.q + rest * x.p;
  const T miss = select(sum < zero, zero, sum);  // y may be a rounding outside of [0, 1]
  const T miss_slope = x.p * x.q * (rest - y);
  // It tends to 0 with p or 1 - p, also times a cost that is infinite.
  const T pull = gamma * select(miss_slope == zero, zero, miss_slope * cost);
  if (kFocus == Focus::square) return {miss * miss * cost, miss * (miss * slope + pull)};
  const T focal = focal_factor<kFocus>(miss, log(miss), gamma, lowest);
  return {focal * cost, focal * (slope + pull / select(miss == zero, one, miss))};
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
