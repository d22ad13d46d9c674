// What one thread does with neighbouring elements of the sigmoid family where more is asked than a focal loss with one
// exponent: sigmoid_general.h over vectors of logits.
#pragma once

#include "../sigmoid_general.h"
#include "lanes.cuh"
#include "sigmoid_elements.cuh"

namespace longtail {
namespace gpu {

using longtail::generic::HardTerms;
using GeneralOptions = longtail::generic::GeneralOptions<float>;

template <int kCount>
LONGTAIL_DEVICE Logistic<Lanes<kCount>> logistic(const Lanes<kCount>& z, HardwareExp) {
  Logistic<Lanes<kCount>> y;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = exp_of(-fabsf(z.x[i])), nearer = reciprocal_fast(1.0f + e), farther = e * nearer;
    const float tail = minus_log1m(farther);
    const bool positive = z.x[i] > 0.0f;
    y.p.x[i] = positive ? nearer : farther;
    y.q.x[i] = positive ? farther : nearer;
    y.plus.x[i] = tail + max_nan(z.x[i], 0.0f);
    y.minus.x[i] = tail + max_nan(-z.x[i], 0.0f);
  }
  return y;
}

// Targets of neighbouring elements, of which the first is the `at`-th.
template <typename Z, int kCount>
LONGTAIL_DEVICE Lanes<kCount> dense_targets(const SigmoidLossArgs& a, int64_t at) {
  Lanes<kCount> y;
  if (a.dense_is_wide) {
    load_constants(static_cast<const float*>(a.dense_target) + at, 0, true, y.x);
  } else {
    Vector<Z, kCount> narrow;
    narrow.load(static_cast<const Z*>(a.dense_target) + at);
    narrow.get(y.x);
  }
  return y;
}

template <int kCount>
LONGTAIL_DEVICE LaneMask<kCount> ignored_targets(const SigmoidLossArgs& a, const Lanes<kCount>& y) {
  const float ignored = static_cast<float>(a.ignore_index);
  return each_bit<kCount>([&](int i) { return a.ignoring && y.x[i] == ignored; });
}

// What the labels among targets y add to the sum of their inverse_counts.
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> label_counts(const SigmoidLossArgs& a, const Lanes<kCount>& y,
                                           const Lanes<kCount>& inverse_counts) {
  return select(ignored_targets(a, y), Lanes<kCount>(0.0f), y * inverse_counts);
}

// Those of sigmoid_general.h, found by overload. Unrolled:
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> whole_power(const Lanes<kCount>& x, const LaneMask<kCount>& one,
                                          const GeneralOptions& o) {
  using V = Lanes<kCount>;
  V found = 1.0f, power = x;
#pragma unroll
  for (int bit = 1; bit <= 4; bit *= 2) {
    if (o.positive_bits & o.negative_bits & bit) {
      found = found * power;
    } else if (o.positive_bits & bit) {
      found = select(one, found * power, found);
    } else if (o.negative_bits & bit) {
      found = select(one, found, found * power);
    }
    if (bit < 4) power = power * power;
  }
  return found;
}

// The terms where the probability of negatives is shifted.
template <int kCount>
LONGTAIL_DEVICE HardTerms<Lanes<kCount>> shifted_terms(const Lanes<kCount>& x, const Lanes<kCount>& p,
                                                       const Lanes<kCount>& q, const LaneMask<kCount>& one,
                                                       const Lanes<kCount>& gamma, const GeneralOptions& o) {
  Lanes<kCount> miss, cost, slope;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float m = one.on[i] ? 0.0f : o.clip, over = p.x[i] - m, hit = q.x[i] + m;
    miss.x[i] = max_nan(over, 0.0f);
    // One series serves both kinds; far from it, all digits are in x, or in the hardware's logarithm.
    const bool far = miss.x[i] > 0.5f;
    const float series = minus_log1m(far ? q.x[i] : miss.x[i]);
    const float beyond = one.on[i] ? series + x.x[i] : -kLn2 * log2_fast(hit);
    cost.x[i] = far ? beyond : series;
    const float moved = over > 0.0f ? p.x[i] : miss.x[i];  // 0 where p does not reach the shift
    slope.x[i] = moved * (one.on[i] ? 1.0f : q.x[i] * reciprocal_fast(hit));
  }
  if (o.pull != 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float rise = miss.x[i] == 0.0f ? 0.0f : p.x[i] * q.x[i];
      const float share = divide_fast(cost.x[i], miss.x[i] == 0.0f ? 1.0f : miss.x[i]);
      slope.x[i] += rise == 0.0f ? 0.0f : gamma.x[i] * (rise * share);
    }
  }
  if (o.whole) return {whole_power(miss, one, o), cost, slope};
  const Lanes<kCount> log_miss = longtail::generic::log_cut(miss, longtail::generic::Smallest<float>::kNormal);
  return {longtail::generic::power_of(log_miss, gamma, HardwareExp()), cost, slope};
}

// p and q = 1 - p come from exp(-x), which may be infinite: then p is 0, and so are q, which only multiplies what tends
// to 0 with p, and all results. NaN stays NaN in p, and in the maxima.
template <int kCount>
LONGTAIL_DEVICE HardTerms<Lanes<kCount>> hard_terms(const Lanes<kCount>& x, const LaneMask<kCount>& one,
                                                    const Lanes<kCount>& gamma, const GeneralOptions& o, HardwareExp) {
  using V = Lanes<kCount>;
  const V e = each_lane<kCount>([&](int i) { return exp_of(-x.x[i]); });
  const V p = reciprocal(V(1.0f) + e);
  const V q = each_lane<kCount>([&](int i) { return multiply_saturated(e.x[i], p.x[i]); });
  if (o.clip != 0.0f) return shifted_terms(x, p, q, one, gamma, o);
  const V tail = each_lane<kCount>([&](int i) { return minus_log1m(fminf(p.x[i], q.x[i])); });
  const V cost = tail + maximum(x, V(0.0f));
  V slope = p;
  if (o.pull != 0.0f) {  // q times the cost, less than 1, tends to 0 with q, also where the cost is infinite
    slope = each_lane<kCount>([&](int i) { return gamma.x[i] * multiply_saturated(q.x[i], cost.x[i]) + p.x[i]; });
  }
  if (o.whole) return {whole_power(p, one, o), cost, slope};
  return {longtail::generic::power_of(-(tail + maximum(-x, V(0.0f))), gamma, HardwareExp()), cost, slope};
}

// With factors of alpha and pos_weight, where targets are 0 or 1. vectors: whether there are any of the classes.
template <int kCount, typename Constants>
LONGTAIL_DEVICE Element<Lanes<kCount>> hard_elements(const SigmoidLossArgs& a, const GeneralOptions& o, bool vectors,
                                                     const Constants& constants, const Lanes<kCount>& u,
                                                     const Lanes<kCount>& y, Lanes<kCount>& factor) {
  using V = Lanes<kCount>;
  const auto one = y == V(1.0f);
  const auto exponent = [&]() -> V {
    const V gamma = select(one, V(a.gamma), V(a.gamma_negative));
    if (!vectors || a.class_gamma == nullptr) return gamma;
    const V each = constants(a.class_gamma);
    return a.same_gamma ? each : select(one, each, gamma);
  };
  const Element<V> found = longtail::generic::general_hard(u, one, exponent, o, HardwareExp());
  const V row = factor;
  factor = select(one, V(a.alpha_positive) * row, V(a.alpha_negative) * row);
  if (vectors) {
    if (a.class_alpha != nullptr) {
      const V each = constants(a.class_alpha);
      factor = row * select(one, each, V(1.0f) - each);
    }
    if (a.pos_weight != nullptr) factor = select(one, factor * constants(a.pos_weight), factor);
  }
  return found;
}

// The same for soft targets.
template <int kCount, typename Constants>
LONGTAIL_DEVICE Element<Lanes<kCount>> soft_elements(const SigmoidLossArgs& a, const GeneralOptions& o,
                                                     const Constants& constants, const Lanes<kCount>& u,
                                                     const Lanes<kCount>& given, const Lanes<kCount>& row,
                                                     Lanes<kCount>& factor) {
  using V = Lanes<kCount>;
  const V y = given + V(o.smoothing) * (V(0.5f) - given), rest = V(1.0f) - y;
  V gamma = a.gamma, alpha = a.alpha_positive, against = a.alpha_negative, positive = 1.0f;
  if (a.class_gamma != nullptr) gamma = constants(a.class_gamma);
  if (!a.same_gamma) gamma = gamma * y + V(a.gamma_negative) * rest;
  if (a.class_alpha != nullptr) {
    alpha = constants(a.class_alpha);
    against = V(1.0f) - alpha;
  }
  if (a.pos_weight != nullptr) positive = constants(a.pos_weight);
  factor = row * (alpha * y + against * rest);
  return longtail::generic::general_soft(u, y, positive, gamma, o, HardwareExp());
}

// Soft targets are computed so many at a time: they take many registers.
template <int kCount>
constexpr int kSoftPart = kCount < 2 ? kCount : 2;

// Neither 0 nor 1.
LONGTAIL_DEVICE bool is_soft(float y) { return !(y * y - y == 0.0f); }

template <int kCount>
LONGTAIL_DEVICE bool any_soft(const SigmoidLossArgs& a, const Lanes<kCount>& y) {
  bool any = false, counted = false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) any = any || is_soft(y.x[i]);
  if (!any || !a.ignoring) return any;
  const auto ignored = ignored_targets(a, y);
#pragma unroll
  for (int i = 0; i < kCount; ++i) counted = counted || (is_soft(y.x[i]) && !ignored.on[i]);
  return counted;
}

template <int kPart, int kCount>
LONGTAIL_DEVICE Lanes<kPart> first_lanes(const Lanes<kCount>& x) {
  return each_lane<kPart>([&](int i) { return x.x[i]; });
}
template <int kPart>
LONGTAIL_DEVICE Lanes<kPart> first_lanes(float all) {
  return all;
}

// Whether there are vectors of the classes.
LONGTAIL_DEVICE bool has_vectors(const SigmoidLossArgs& a) {
  return a.class_bias != nullptr || a.class_alpha != nullptr || a.class_gamma != nullptr || a.pos_weight != nullptr ||
         (a.weight != nullptr && !a.class_weight_by_target) || a.inverse_counts != nullptr;
}

// Losses and their slopes by the logits z. row: what multiplies both; ratio: what `rebalanced` multiplies
// inverse_counts by: one number, or one of each lane. vectors: has_vectors; constants(p, k, one): of one of them, what
// belongs to lanes from k on, as many as there are in `one`.
template <int kCount, typename Constants, typename Row>
LONGTAIL_DEVICE Element<Lanes<kCount>> general_elements(const SigmoidLossArgs& a, const GeneralOptions& o, bool vectors,
                                                        const Constants& constants, const Lanes<kCount>& z,
                                                        Lanes<kCount> y, Row row, const Row& ratio) {
  using V = Lanes<kCount>;
  constexpr int kPart = kSoftPart<kCount>;
  const auto vector = [&](const float* p) { return constants(p, 0, V()); };
  const bool smooth = o.smoothing != 0.0f;
  V u = z, factor = row;
  if (vectors && a.class_bias != nullptr) u = z + vector(a.class_bias);
  Element<V> found = {0.0f, 0.0f};
  if (!smooth) found = hard_elements<kCount>(a, o, vectors, vector, u, y, factor);
  if (smooth || any_soft(a, y)) {
#pragma unroll 1
    for (int k = 0; k < kCount; k += kPart) {
      Lanes<kPart> part_factor;
      const auto some = [&](const float* p) { return constants(p, k, Lanes<kPart>()); };
      const Element<Lanes<kPart>> part = soft_elements<kPart>(a, o, some, first_lanes<kPart>(u), first_lanes<kPart>(y),
                                                              first_lanes<kPart>(row), part_factor);
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        const bool taken = smooth || is_soft(y.x[i]);
        found.loss.x[i] = taken ? part.loss.x[i] : found.loss.x[i];
        found.slope.x[i] = taken ? part.slope.x[i] : found.slope.x[i];
        factor.x[i] = taken ? part_factor.x[i] : factor.x[i];
      }
      u = rotated<kPart>(u);
      y = rotated<kPart>(y);
      row = rotated<kPart>(row);
      factor = rotated<kPart>(factor);
      found = {rotated<kPart>(found.loss), rotated<kPart>(found.slope)};
    }
  }
  if (vectors) {
    if (a.weight != nullptr && !a.class_weight_by_target) factor = factor * vector(a.weight);
    if (a.inverse_counts != nullptr)
      factor = factor * longtail::generic::rebalanced(vector(a.inverse_counts), V(ratio), o, HardwareExp());
  }
  return {factor * found.loss, factor * found.slope};
}

}  // namespace gpu
}  // namespace longtail
