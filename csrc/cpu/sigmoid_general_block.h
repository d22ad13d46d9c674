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
  bool simple_negatives;  // see Negatives
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

// What negatives have in common: numbers of a block that stores to the gradient could not change.
template <typename T>
struct Negatives {
  Vec<T> scale, inverse_scale, clip, dead_below, gamma;
  int bits;
  bool pulls;

  LONGTAIL_INLINE explicit Negatives(const SigmoidBlock<T>& b)
      : scale(b.general.scale),
        inverse_scale(b.general.inverse_scale),
        clip(b.general.clip),
        dead_below(b.dead_below),
        gamma(b.gamma_negative),
        bits(b.general.negative_bits),
        pulls(b.general.pull != T(0)) {}

  // What most elements are, as short as it goes: y = 0, and a whole exponent. kClip: p is shifted.
  template <bool kClip>
  LONGTAIL_INLINE Element<Vec<T>> at(Vec<T> u) const {
    using V = Vec<T>;
    const V zero = T(0), unit = T(1), x = scale * u;
    V cost, slope, miss, rise = zero;  // as in general_hard
    if constexpr (kClip) {
      if (all(x < dead_below)) return {zero, zero};
      const V e = exp_minus(x), p = reciprocal(unit + e), q = e * p, pq = p * q, over = p - clip;
      miss = maximum(zero, over);
      const V hit = minimum(q + clip, unit);  // 1 of NaN, which miss keeps: minus_log1m takes bits apart
      cost = minus_log1m(miss, hit);
      slope = pq * reciprocal(hit);
      if (bits == 0) slope = select(zero < over, slope, miss);  // of others a focal factor of 0 says so
      if (pulls) rise = select(zero < over, pq * cost / miss, zero);
    } else {
      const Logistic<V> s = logistic(x, ExpRange<T>::kLowest);
      cost = s.plus, slope = miss = s.p;
      if (pulls) rise = select(s.q == zero, zero, s.q * s.plus);
    }
    const V focal = whole_power(miss, bits);
    if (pulls) slope = slope + gamma * rise;
    return {focal * cost * inverse_scale, focal * slope};
  }
};

// The weights of the distribution-balanced loss, as `rebalanced`.
template <typename T>
LONGTAIL_INLINE Vec<T> rebalanced_weight(Vec<T> inverse_count, Vec<T> row, Vec<T> shift, Vec<T> alpha) {
  return alpha + reciprocal(Vec<T>(T(1)) + exp_minus(inverse_count * row - shift));
}

// Whole registers of [begin, end) up to the first that has more than simple negatives; where that is. Adds the losses
// to `sum`. For blocks without factors, losses or upstream gradients of each element, of which none is ignored.
template <Pass kPass, bool kClip, bool kRebalanced, typename T, typename Target>
LONGTAIL_INLINE int64_t negative_run(const Target& target, const SigmoidBlock<T>& b, int64_t begin, int64_t end,
                                     Vec<T>& sum) {
  using V = Vec<T>;
  const Negatives<T> negatives(b);
  const V factor = V(b.alpha_negative) * V(b.factor), upstream = b.upstream, bias = b.bias, row = b.row;
  const V shift = b.general.rebalance_shift, alpha = b.general.rebalance_alpha;
  const T *const z = b.z, *const biases = b.biases, *const counts = b.inverse_counts;
  T* const grad = b.grad;
  const char *const next_z = b.next_z, *const next_y = b.next_y;
  const int64_t z_bytes = b.z_bytes, y_bytes = b.y_bytes;
  V total = sum;
  int64_t k = begin;
  for (; k < end; k += V::kLanes) {
    __builtin_prefetch(next_z + k * z_bytes);
    if constexpr (Target::kDense) {
      __builtin_prefetch(next_y + k * y_bytes);
      if (!all(target.load_y(k, V::kLanes) == V(T(0)))) break;
    } else {
      if (target.some(k)) break;
    }
    const Element<V> found = negatives.template at<kClip>(load(z + k) + (biases ? load(biases + k) : bias));
    const V weight = kRebalanced ? factor * rebalanced_weight(load(counts + k), row, shift, alpha) : factor;
    if (kPass != Pass::backward) total = total + weight * found.loss;
    if (kPass != Pass::loss) store(grad + k, weight * upstream * found.slope);
  }
  sum = total;
  return k;
}

template <Pass kPass, typename T, typename Target>
LONGTAIL_INLINE int64_t negative_run(const Target& target, const SigmoidBlock<T>& b, int64_t begin, int64_t end,
                                     Vec<T>& sum) {
  const bool clip = b.general.clip != T(0);
  if (b.rebalancing) {
    return clip ? negative_run<kPass, true, true>(target, b, begin, end, sum)
                : negative_run<kPass, false, true>(target, b, begin, end, sum);
  }
  return clip ? negative_run<kPass, true, false>(target, b, begin, end, sum)
              : negative_run<kPass, false, false>(target, b, begin, end, sum);
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
    const Negatives<T> negatives(b);
    found = b.general.clip != T(0) ? negatives.template at<true>(u) : negatives.template at<false>(u);
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
    const V row = each_or(b.rows, b.row, k, left);
    factor = factor * rebalanced_weight(count, row, V(b.general.rebalance_shift), V(b.general.rebalance_alpha));
  }
  return {factor * found.loss, factor * found.slope};
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
