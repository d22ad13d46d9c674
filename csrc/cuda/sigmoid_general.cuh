// What one thread does with neighbouring elements of the sigmoid family where more is asked than a focal loss with one
// exponent: sigmoid_general.h over vectors of logits.
#pragma once

#include "../sigmoid_general.h"
#include "lanes.cuh"
#include "sigmoid_elements.cuh"

namespace longtail {
namespace gpu {

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

// Lanes that are computed together: as many as there are registers for.
template <int kCount>
constexpr int kPartOf = kCount < 2 ? kCount : 2;

// Losses and their slopes by the logits z, factors of alpha and of the classes included. constants: of a vector of the
// classes, what these elements take; ratio: what `rebalanced` multiplies inverse_counts by.
template <int kCount, typename Constants>
LONGTAIL_DEVICE Element<Lanes<kCount>> general_part(const SigmoidLossArgs& a, const GeneralOptions& o,
                                                    const Constants& constants, Lanes<kCount> z, const Lanes<kCount>& y,
                                                    const LaneMask<kCount>& ignored, const Lanes<kCount>& ratio) {
  using V = Lanes<kCount>;
  const V zero = 0.0f, unit = 1.0f;
  const bool smooth = o.smoothing != 0.0f;
  if (a.class_bias != nullptr) z = z + constants(a.class_bias);
  Element<V> found = {zero, zero};
  V factor = zero;
  const auto one = y == unit, null = y == zero;
  if (!smooth) {
    V gamma = select(one, V(a.gamma), V(a.gamma_negative));
    if (a.class_gamma != nullptr) {
      const V each = constants(a.class_gamma);
      gamma = a.same_gamma ? each : select(one, each, gamma);
    }
    factor = select(one, V(a.alpha_positive), V(a.alpha_negative));
    if (a.class_alpha != nullptr) {
      const V each = constants(a.class_alpha);
      factor = select(one, each, unit - each);
    }
    if (a.pos_weight != nullptr) factor = select(one, factor * constants(a.pos_weight), factor);
    found = longtail::generic::general_hard(z, one, gamma, o, HardwareExp());
  }
  const auto settled = each_bit<kCount>([&](int i) { return !smooth && (one.on[i] || null.on[i] || ignored.on[i]); });
  if (!all(settled)) {
    const V soft_y = y + V(o.smoothing) * (V(0.5f) - y), rest = unit - soft_y;
    V gamma = a.gamma, alpha = a.alpha_positive;
    if (a.class_gamma != nullptr) gamma = constants(a.class_gamma);
    if (!a.same_gamma) gamma = gamma * soft_y + V(a.gamma_negative) * rest;
    V against = a.alpha_negative, positive = unit;
    if (a.class_alpha != nullptr) {
      alpha = constants(a.class_alpha);
      against = unit - alpha;
    }
    if (a.pos_weight != nullptr) positive = constants(a.pos_weight);
    const Element<V> soft = longtail::generic::general_soft(z, soft_y, positive, gamma, o, HardwareExp());
    found = {select(settled, found.loss, soft.loss), select(settled, found.slope, soft.slope)};
    factor = select(settled, factor, alpha * soft_y + against * rest);
  }
  if (a.weight != nullptr && !a.class_weight_by_target) factor = factor * constants(a.weight);
  if (a.inverse_counts != nullptr) {
    factor = factor * longtail::generic::rebalanced(constants(a.inverse_counts), ratio, o, HardwareExp());
  }
  return {factor * found.loss, factor * found.slope};
}

// The same of any number of elements; constants: of a vector of the classes and the first of kPartOf<kCount> lanes.
template <int kCount, typename Constants>
LONGTAIL_DEVICE Element<Lanes<kCount>> general_elements(const SigmoidLossArgs& a, const GeneralOptions& o,
                                                        const Constants& constants, const Lanes<kCount>& z,
                                                        const Lanes<kCount>& y, const LaneMask<kCount>& ignored,
                                                        const Lanes<kCount>& ratio) {
  constexpr int kPart = kPartOf<kCount>;
  Element<Lanes<kCount>> found;
#pragma unroll
  for (int k = 0; k < kCount; k += kPart) {
    const auto part = [&](const Lanes<kCount>& x) { return each_lane<kPart>([&](int i) { return x.x[k + i]; }); };
    const auto bits = each_bit<kPart>([&](int i) { return ignored.on[k + i]; });
    const Element<Lanes<kPart>> some =
        general_part<kPart>(a, o, [&](const float* p) { return constants(p, k); }, part(z), part(y), bits, part(ratio));
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      found.loss.x[k + i] = some.loss.x[i];
      found.slope.x[k + i] = some.slope.x[i];
    }
  }
  return found;
}

}  // namespace gpu
}  // namespace longtail
