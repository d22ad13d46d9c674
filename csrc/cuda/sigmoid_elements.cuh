// What one thread does with neighbouring elements of the sigmoid family: sigmoid_math.h over vectors of logits.
#pragma once

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

template <Focus kFocus>
LONGTAIL_DEVICE Element<float> hard_element(const Logistic<float>& x, float gamma) {
  if (kFocus == Focus::none) return {x.minus, x.q};
  const float focal = kFocus == Focus::square ? x.q * x.q : exp_of(-gamma * x.plus);
  return longtail::generic::focused_element(x, focal, gamma);
}

// Neighbours that share a class target, none of which need be of it: their losses and slopes by the logit.
//   x: logits in, those of the target's place negated; c: their coefficients. Out: x slope, c loss.
template <Focus kFocus, int kCount>
LONGTAIL_DEVICE void class_elements(float (&x)[kCount], float (&c)[kCount], float gamma) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Element<float> element = hard_element<kFocus>(logistic(-x[i]), gamma);
    x[i] = c[i] * element.slope;
    c[i] = c[i] * element.loss;
  }
}

template <int kCount>
LONGTAIL_DEVICE void class_elements(float (&x)[kCount], float (&c)[kCount], float gamma) {
  switch (focus_of(gamma)) {
    case Focus::none:
      return class_elements<Focus::none>(x, c, gamma);
    case Focus::square:
      return class_elements<Focus::square>(x, c, gamma);
    case Focus::power:
      return class_elements<Focus::power>(x, c, gamma);
  }
}

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
template <Focus kFocus, int kCount>
LONGTAIL_DEVICE void dense_elements(float (&z)[kCount], float (&y)[kCount], const float (&c)[kCount],
                                    const float (&positive)[kCount], unsigned ignored, const DenseOptions& o) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool one = y[i] == 1.0f, counts = (ignored >> i & 1u) == 0;
    Element<float> element;
    float factor;
    if (one || y[i] == 0.0f || !counts) {
      element = hard_element<kFocus>(logistic(one ? z[i] : -z[i]), o.gamma);
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

template <int kCount>
LONGTAIL_DEVICE void dense_elements(float (&z)[kCount], float (&y)[kCount], const float (&c)[kCount],
                                    const float (&positive)[kCount], unsigned ignored, const DenseOptions& o) {
  switch (focus_of(o.gamma)) {
    case Focus::none:
      return dense_elements<Focus::none>(z, y, c, positive, ignored, o);
    case Focus::square:
      return dense_elements<Focus::square>(z, y, c, positive, ignored, o);
    case Focus::power:
      return dense_elements<Focus::power>(z, y, c, positive, ignored, o);
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
