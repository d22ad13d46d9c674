// A block of neighbouring elements with every option of the sigmoid family; see sigmoid_block.h.
#pragma once

#include "../sigmoid_general.h"
#include "kernels.h"
#include "simd_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

template <typename T>
struct SigmoidBlock {
  int64_t count;
  T alpha_positive, alpha_negative, gamma;
  T factor, pos_weight, upstream;  // times those of each element, where there are any
  const T *factors, *pos_weights, *upstreams;
  const T* z;
  // Where the next block's logits and dense targets lie, and the bytes of one: fetched while this block is computed,
  // because the arithmetic on a line outlasts what the processor fetches ahead by itself.
  const char *next_z, *next_y;
  int64_t z_bytes, y_bytes;
  T* loss;  // of each element, or null
  bool add_loss;
  T* grad;
  // Of Focus::general alone. Numbers of one class, or those of each of the block's classes.
  GeneralOptions<T> general;
  T bias, gamma_positive, gamma_negative, inverse_count;
  const T *biases, *alphas, *gammas, *inverse_counts;
  bool same_gamma, rebalancing;
  bool simple_negatives;  // see general_negatives
  T dead_below;           // scaled logits of negatives whose shifted probability is 0 whatever the rounding
  T row;                  // what `rebalanced` multiplies the counts by, or those of each pixel
  const T* rows;
};

template <typename T>
LONGTAIL_INLINE Vec<T> each_or(const T* each, T all, int64_t k, int64_t left) {
  return each ? load_some(each + k, left) : Vec<T>(all);
}

// e^-x, from which p = 1 / (1 + e^-x) and 1 - p = e^-x p come without a comparison; x is cut off where p is 0. NaN
// stays.
template <typename T>
LONGTAIL_INLINE Vec<T> exp_minus(Vec<T> x) {
  Vec<T> away = -maximum(Vec<T>(ExpRange<T>::kLowest), x);
  return exp_cut(away, Summed<T>());  // up to 2e-7 at the far end, where p or 1 - p is 1e-38
}

// x to a whole power of up to three bits.
template <typename T>
LONGTAIL_INLINE Vec<T> whole_power(Vec<T> x, int bits) {
  const Vec<T> square = x * x, first = bits & 1 ? x : Vec<T>(T(1));
  const Vec<T> low = bits & 2 ? first * square : first;
  return bits & 4 ? low * (square * square) : low;
}

// What most elements are, as short as it goes: y = 0, and whole exponents.
template <typename T>
LONGTAIL_INLINE Element<Vec<T>> general_negatives(const SigmoidBlock<T>& b, Vec<T> u) {
  using V = Vec<T>;
  const GeneralOptions<T>& o = b.general;
  const V zero = T(0), unit = T(1), x = o.scale == T(1) ? u : V(o.scale) * u, gamma = b.gamma_negative;
  if (all(x < V(b.dead_below))) return {zero, zero};
  V cost, slope, miss, rise = zero;  // as in general_hard
  if (o.clip == T(0)) {
    const Logistic<V> s = logistic(x, ExpRange<T>::kLowest);
    cost = s.plus, slope = miss = s.p;
    if (o.pull != T(0)) rise = select(s.q == zero, zero, s.q * s.plus);
  } else {
    const V e = exp_minus(x), p = reciprocal(unit + e), q = e * p, pq = p * q, over = p - V(o.clip);
    miss = maximum(zero, over);
    const V hit = minimum(q + V(o.clip), unit);  // 1 of NaN, which miss keeps: minus_log1m takes bits apart
    cost = minus_log1m(miss, hit);
    slope = pq * reciprocal(hit);
    if (o.negative_bits == 0) slope = select(zero < over, slope, miss);  // of others a focal factor of 0 says so
    if (o.pull != T(0)) rise = select(zero < over, pq * cost / miss, zero);
  }
  const V focal = whole_power(miss, o.negative_bits);
  if (o.pull != T(0)) slope = slope + gamma * rise;
  return {focal * cost * V(o.inverse_scale), focal * slope};
}

// All others. `settled`: where y is 0 or 1, or does not count. A function of its own, lest it takes the registers of
// the loop that rarely calls it.
template <typename T>
__attribute__((noinline)) Element<Vec<T>> general_others(const SigmoidBlock<T>& b, Vec<T> u, Vec<T> y, Mask<T> one,
                                                         Mask<T> settled, Vec<T> alpha, Vec<T> rest, int64_t k,
                                                         int64_t left) {
  using V = Vec<T>;
  constexpr T kLowest = ExpRange<T>::kLowest;
  const GeneralOptions<T>& o = b.general;
  const V weights = each_or(b.pos_weights, b.pos_weight, k, left);
  const V gamma_positive = each_or(b.gammas, b.gamma_positive, k, left);
  const V gamma_negative = b.same_gamma ? gamma_positive : V(b.gamma_negative);
  const auto soft = [&](V soft_y) {
    const V soft_rest = V(T(1)) - soft_y;
    const V gamma = b.same_gamma ? gamma_positive : gamma_positive * soft_y + gamma_negative * soft_rest;
    const Element<V> found = general_soft(u, soft_y, weights, gamma, o, kLowest);
    const V factor = alpha * soft_y + rest * soft_rest;
    return Element<V>{factor * found.loss, factor * found.slope};
  };
  if (o.smoothing != T(0)) return soft(y + V(o.smoothing) * (V(T(0.5)) - y));
  const auto exponent = [&] { return select(one, gamma_positive, gamma_negative); };
  const Element<V> hard = general_hard(u, one, exponent, o, kLowest);
  const V factor = select(one, alpha * weights, rest);
  const Element<V> found = {factor * hard.loss, factor * hard.slope};
  if (all(settled)) return found;
  const Element<V> between = soft(y);
  return {select(settled, found.loss, between.loss), select(settled, found.slope, between.slope)};
}

// With every option: the losses and their slopes by the logits, factors of alpha, pos_weight and the row included.
template <typename T, typename Target>
LONGTAIL_INLINE Element<Vec<T>> general_elements(const Target& target, const SigmoidBlock<T>& b, Vec<T> z, Vec<T> raw,
                                                 int64_t k, int64_t left) {
  using V = Vec<T>;
  const V zero = T(0), unit = T(1), u = b.biases ? z + load_some(b.biases + k, left) : z + V(b.bias);
  const auto one = target.one(raw);
  const V y = Target::kDense ? raw : select(one, unit, zero);
  V alpha = b.alpha_positive, rest = b.alpha_negative, factor = b.factor;
  if (b.alphas) {
    alpha = load_some(b.alphas + k, left);
    rest = unit - alpha;
  }
  Element<V> found;
  if (b.simple_negatives && all(y == zero)) {
    found = general_negatives(b, u);
    factor = rest * factor;
  } else {
    auto settled = one | (y == zero);
    if constexpr (Target::kDense) {
      if (target.ignoring()) settled = settled | (y == V(target.ignored));
    }
    found = general_others(b, u, y, one, settled, alpha, rest, k, left);
  }
  if (b.rebalancing) {
    const V count = each_or(b.inverse_counts, b.inverse_count, k, left);
    const V x = count * each_or(b.rows, b.row, k, left) - V(b.general.rebalance_shift);
    const V capped = minimum(V(-ExpRange<T>::kLowest), x);
    factor = factor * (V(b.general.rebalance_alpha) + reciprocal(unit + exp_minus(capped)));
  }
  return {factor * found.loss, factor * found.slope};
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
