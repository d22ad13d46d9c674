// What one thread does with neighbouring elements of the sigmoid family: sigmoid_math.h over vectors of logits.
#pragma once

#include <type_traits>

#include "../sigmoid_math.h"
#include "exp.cuh"
#include "sigmoid_loss.h"
#include "vectors.cuh"

namespace longtail {
namespace gpu {

using longtail::generic::Element;
using longtail::generic::ExpRange;
using longtail::generic::Focus;
using longtail::generic::Logistic;

template <typename PassOf>
constexpr bool kOne = std::is_same_v<PassOf, Fixed<Pass::loss>> || std::is_same_v<PassOf, Fixed<Pass::backward>>;

LONGTAIL_DEVICE Focus focus_of(float gamma) {
  if (gamma == 0.0f) return Focus::none;
  return gamma == 2.0f ? Focus::square : Focus::power;
}

LONGTAIL_DEVICE Logistic<float> logistic(float z) {
  const float e = exp_of(-fabsf(z));
  const float tail = log1p_fast(e), nearer = divide_fast(1.0f, 1.0f + e), farther = e * nearer;
  const bool positive = z > 0.0f;
  return {positive ? nearer : farther, positive ? farther : nearer, longtail::generic::maximum(0.0f, z) + tail,
          longtail::generic::maximum(0.0f, -z) + tail};
}

// The elements of a pass over logits of type Z: what hard ones need.
template <typename Z, typename PassOf>
struct HardElements {
  static constexpr bool kLossAlone = std::is_same_v<PassOf, Fixed<Pass::loss>>;
  // Of a gradient that is rounded to a half type, a logarithm has digits to spare.
  static constexpr bool kRough = std::is_same_v<PassOf, Fixed<Pass::backward>> && sizeof(Z) == 2;

  // For y = 0 by the logit, for y = 1 by the logit negated; `slope` is the derivative by that, never negative.
  // p and q = 1 - p come from exp(-z), which may be infinite: then p is 0, and so are q, which only multiplies what
  // tends to 0 with p, and all results. NaN stays NaN in p, and in the maximum.
  template <Focus kFocus>
  static LONGTAIL_DEVICE Element<float> at(float z, float gamma) {
    const float linear = max_nan(z, 0.0f);
    if (kFocus == Focus::none && kLossAlone) return {log1p_fast(exp_of(-fabsf(z))) + linear, 0.0f};
    const float e = exp_of(-z), p = reciprocal_fast(1.0f + e), q = multiply_saturated(e, p);
    const float nearer = fminf(p, q), tail = kRough ? minus_log1m_rough(nearer) : minus_log1m(nearer);
    const float cost = tail + linear;
    if (kFocus == Focus::none) return {cost, p};
    const float focal = kFocus == Focus::square ? p * p : exp_of(-gamma * (tail - fminf(z, 0.0f)));
    const float factor = kFocus == Focus::square ? 2.0f : gamma;
    // q * cost, less than 1, tends to 0 with q, also where cost is infinite.
    return {focal * cost, focal * (factor * multiply_saturated(q, cost) + p)};
  }
};

// What dense targets have in common over a launch.
struct DenseOptions {
  float alpha_positive, alpha_negative, gamma;
};

// Bit i: whether the i-th target does not count.
template <int kCount>
LONGTAIL_DEVICE unsigned ignored_of(const float (&y)[kCount], float ignore_index) {
  unsigned ignored = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) ignored |= y[i] == ignore_index ? 1u << i : 0u;
  return ignored;
}

// Neighbours with a target each. z: logits in, slopes out; y: targets in, losses out; c: their factors; positive: what
// multiplies the positive term beside them (pos_weight). Elements that do not count have loss and slope 0.
template <typename Hard, Focus kFocus, int kCount>
LONGTAIL_DEVICE void dense_elements(float (&z)[kCount], float (&y)[kCount], const float (&c)[kCount],
                                    const float (&positive)[kCount], unsigned ignored, const DenseOptions& o) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool one = y[i] == 1.0f, counts = (ignored >> i & 1u) == 0;
    Element<float> element;
    float factor;
    if (one || y[i] == 0.0f || !counts) {
      element = Hard::template at<kFocus>(one ? -z[i] : z[i], o.gamma);
      factor = c[i] * (one ? o.alpha_positive * positive[i] : o.alpha_negative);
      element.slope = one ? -element.slope : element.slope;
    } else {
      element =
          longtail::generic::soft_element<kFocus>(logistic(z[i]), y[i], positive[i], o.gamma, ExpRange<float>::kLowest);
      factor = c[i] * (o.alpha_positive * y[i] + o.alpha_negative * (1.0f - y[i]));
    }
    z[i] = counts ? factor * element.slope : 0.0f;
    y[i] = counts ? factor * element.loss : 0.0f;
  }
}

// float32 neighbours; whole vectors begin at a 16-byte boundary.
template <int kCount>
LONGTAIL_DEVICE void store_floats(float* p, const float (&x)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
      Vector<float, 4>::store(p + i, four);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) p[i] = x[i];
  }
}

}  // namespace gpu
}  // namespace longtail
