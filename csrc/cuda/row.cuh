// What the threads of one row do, whichever of them there are: loss_math.h over vectors of logits.
//
// kExtras: whether any option touches every element: class_bias, label smoothing, scale, softcap, scales of classes and
// targets, mitigation, compensation. Without, a logit is its own effective logit.
#pragma once

#include "../loss_math.h"
#include "plain_chunk.cuh"
#include "softmax_loss.h"

namespace longtail {
namespace gpu {

using longtail::generic::empty_stats;
using longtail::generic::finite_max;
using longtail::generic::RowGrad;
using longtail::generic::RowStats;
using longtail::generic::select;
using Stats = RowStats<float>;
using Grad = RowGrad<float>;
using Terms = longtail::generic::TargetTerms<float>;

LONGTAIL_DEVICE Terms no_terms() { return longtail::generic::no_terms<float>(); }

// Whether t is needed: by complement entropy, or by whom the stats are for.
LONGTAIL_DEVICE bool wants_entropy(const SoftmaxLossArgs& a, Pass pass) {
  return a.entropy || a.options.complement_coefficient != 0.0f || pass == Pass::accumulate;
}

// Whether the target's class changes the effective logits of the others.
LONGTAIL_INLINE bool is_by_target(const SoftmaxLossArgs& a) {
  return a.target_scale != nullptr || a.class_mitigation != nullptr || a.options.compensation != 0.0f;
}

inline bool has_extras(const SoftmaxLossArgs& a) {
  return a.class_bias != nullptr || a.options.label_smoothing != 0.0f || a.options.scale != 1.0f ||
         a.options.softcap != 0.0f || a.class_scale != nullptr || is_by_target(a);
}

// Moves the sums to a new maximum m >= s.m.
LONGTAIL_DEVICE void raise_max(Stats& s, float m) { longtail::generic::raise_max(s, m, HardwareExp()); }

// Of two disjoint pieces of one row.
LONGTAIL_DEVICE Stats combine(const Stats& a, const Stats& b) {
  return longtail::generic::combine(a, b, HardwareExp());
}

template <bool kCut, int kCount>
LONGTAIL_DEVICE void sum_exp(const float (&u)[kCount], float m, float& d, float& t) {
  d = t = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float shift = u[i] - m;
    const float e = kCut ? exp_cut(shift) : exp_of(shift);
    d += e;
    t += e * shift;
  }
}

// Adds non-target logits: one exp each, and one more.
template <int kCount>
LONGTAIL_DEVICE void add(Stats& s, const float (&u)[kCount]) {
  float m = s.m;
#pragma unroll
  for (int i = 0; i < kCount; ++i) m = fmaxf(m, u[i]);
  raise_max(s, m);
  float d, t;  // summed apart: long rows would lose digits in one running sum
  sum_exp<false>(u, finite_max(m), d, t);
  if (t != t) sum_exp<true>(u, finite_max(m), d, t);  // 0 * -inf, rarely: one comparison instead of one per element
  s.d += d;
  s.t += t;
}

// x P(x^2) / Q(x^2), the minimax fit of csrc/cpu/simd_math.h (relative error 2.1e-8); beyond 9.02, tanh rounds to 1.
LONGTAIL_DEVICE float tanh_fast(float x) {
  const float c = -max_nan(-max_nan(x, -9.02f), -9.02f);
  const float s = c * c;
  float p = 1.3319008461603048e-08f * s + 2.0583435844878837e-05f;
  p = p * s + 0.0034940318775660427f;
  p = p * s + 0.13379715732344968f;
  p = p * s + 0.9999999790274084f;
  float q = 7.761993488081781e-07f * s + 0.00032830883840931406f;
  q = q * s + 0.025871063137131018f;
  q = q * s + 0.46713030976665915f;
  q = q * s + 1.0f;
  const float y = c * divide_fast(p, q);
  return -max_nan(-max_nan(y, -1.0f), -1.0f);
}

// The options that touch every element, and how a row's columns lie towards the class constants.
template <bool kExtras>
struct Elements {
  float scale, softcap, inverse_softcap, compensation;
  const float* bias;
  const float* omega;  // null: ones
  const float *class_scale, *mitigation;
  bool smoothing;
  bool stretching;  // by scales of classes or of targets
  bool by_target;
  bool vector;  // a vector's constants lie at 16-byte boundaries

  LONGTAIL_DEVICE Elements(const SoftmaxLossArgs& a, int first_column)
      : scale(a.options.scale),
        softcap(a.options.softcap),
        inverse_softcap(1.0f / a.options.softcap),
        compensation(a.options.compensation),
        bias(a.class_bias),
        omega(a.weight),
        class_scale(a.class_scale),
        mitigation(a.class_mitigation),
        smoothing(a.options.label_smoothing != 0.0f),
        stretching(a.class_scale != nullptr || a.target_scale != nullptr),
        by_target(kExtras && is_by_target(a)),
        vector(first_column % 4 == 0 && (reinterpret_cast<uintptr_t>(a.class_bias) % 16 == 0) &&
               (reinterpret_cast<uintptr_t>(a.weight) % 16 == 0) &&
               (reinterpret_cast<uintptr_t>(a.class_scale) % 16 == 0) &&
               (reinterpret_cast<uintptr_t>(a.class_mitigation) % 16 == 0)) {}

  // Whether classes or targets scale or shift logits by more than class_bias.
  LONGTAIL_DEVICE bool shaped() const { return kExtras && (stretching || by_target); }

  // The same where they do not, of which the compiler knows it.
  LONGTAIL_DEVICE Elements unshaped() const {
    Elements same = *this;
    same.class_scale = same.mitigation = nullptr;
    same.compensation = 0.0f;
    same.stretching = same.by_target = false;
    return same;
  }

  // softcap(scale * x), in place.
  template <int kCount>
  LONGTAIL_DEVICE void cap(float (&x)[kCount]) const {
    if constexpr (kExtras) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] *= scale;
      if (softcap == 0.0f) return;
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = softcap * tanh_fast(x[i] * inverse_softcap);
    }
  }

  // Capped logits, or a gradient on its way back, times class_scale_j target_scale_g, in place.
  template <int kCount>
  LONGTAIL_DEVICE void stretch(float (&x)[kCount], int column, float target_scale) const {
    if (!kExtras || !stretching) return;
    float c[kCount];
    const bool each = class_scale != nullptr;
    if (each) load_constants(class_scale, column, vector, c);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= each ? c[i] * target_scale : target_scale;
  }

  // From capped logits to u_j of other classes than the target.
  template <int kCount>
  LONGTAIL_DEVICE void to_effective(const float (&capped)[kCount], int column, const Terms& terms,
                                    float (&u)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) u[i] = capped[i];
    if constexpr (kExtras) {
      stretch(u, column, terms.scale);
      if (bias != nullptr) add_constants(u, bias, column);
      if (by_target) shift(u, column, terms);
    }
  }

  template <int kCount>
  LONGTAIL_DEVICE void add_constants(float (&x)[kCount], const float* constants, int column) const {
    float b[kCount];
    load_constants(constants, column, vector, b);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += b[i];
  }

  // From x_j to u_j, in place: compensation and mitigation.
  template <int kCount>
  LONGTAIL_DEVICE void shift(float (&x)[kCount], int column, const Terms& terms) const {
    if (compensation != 0.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] += longtail::generic::compensated(x[i], terms, compensation);
    }
    if (mitigation == nullptr) return;
    float m[kCount];
    load_constants(mitigation, column, vector, m);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += longtail::generic::mitigated(m[i], terms);
  }

  template <int kCount>
  LONGTAIL_DEVICE void load_omega(int column, float (&w)[kCount]) const {
    if (omega != nullptr) {
      load_constants(omega, column, vector, w);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) w[i] = 1.0f;
    }
  }

  // Effective logits; their share of U goes to `s`.
  template <int kCount>
  LONGTAIL_DEVICE void effective(float (&u)[kCount], int column, int target, const Terms& terms, Stats& s) const {
    if constexpr (!kExtras) return;
    cap(u);
    float x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = u[i];
    to_effective(x, column, terms, u);
    if (!smoothing) return;
    load_omega(column, x);
    const float reference = finite_max(s.u_g);
#pragma unroll
    for (int i = 0; i < kCount; ++i) s.U += column + i == target ? 0.0f : x[i] * (u[i] - reference);
  }

  // dloss/dlogits of neighbouring classes, from their logits, in place.
  template <int kCount>
  LONGTAIL_DEVICE void gradient(float (&x)[kCount], int column, int target, const Terms& terms, const Grad& g) const {
    float u[kCount];
    cap(x);
    to_effective(x, column, terms, u);
    if (g.b == 0.0f) {  // no complement entropy
#pragma unroll
      for (int i = 0; i < kCount; ++i) u[i] = exp_of(u[i] - g.m) * g.a;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float shift = u[i] - g.m;
        const float e = exp_cut(shift);
        u[i] = e * (g.a + g.b * shift);
      }
    }
    if (kExtras && smoothing) {
      float w[kCount];
      load_omega(column, w);
#pragma unroll
      for (int i = 0; i < kCount; ++i) u[i] += g.S * w[i];
    }
    replace(u, target - column, g.target);
    stretch(u, column, terms.scale);
    uncap(x, u);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = u[i];
  }

  // From a gradient by capped logits x to one by logits, in place.
  template <int kCount>
  LONGTAIL_DEVICE void uncap(const float (&x)[kCount], float (&u)[kCount]) const {
    if constexpr (kExtras) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float y = x[i] * inverse_softcap;
        u[i] *= softcap == 0.0f ? scale : scale - scale * y * y;
      }
    }
  }

  // Whether a logit is its own effective logit.
  LONGTAIL_DEVICE bool plain() const {
    return !kExtras || (scale == 1.0f && softcap == 0.0f && bias == nullptr && !shaped());
  }

  // u[place] = value where there is such a place: a comparison per vector, not per element.
  template <int kCount>
  static LONGTAIL_DEVICE void replace(float (&u)[kCount], int place, float value) {
    if (static_cast<unsigned>(place) >= static_cast<unsigned>(kCount)) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) u[i] = select(i == place, value, u[i]);
  }
};

// Adds a vector of plain logits from memory, whatever they are; `place`: of the target in it.
template <int kCount, typename Z>
LONGTAIL_DEVICE void add_from_memory(Stats& s, const Z* from, int place) {
  Vector<Z, kCount> held;
  held.load(from);
  float u[kCount];
  held.get(u);
  Elements<false>::replace(u, place, -INFINITY);
  add(s, u);
}

// Adds kVectors vectors, `step` apart from vector `first` on; those from `vectors` on do not count, unless kWhole says
// that there are none. Vector 0 begins at class `origin`.
template <bool kWhole, typename Z, int kCount, int kVectors, bool kExtras>
LONGTAIL_DEVICE void add_some(Stats& s, const Vector<Z, kCount> (&held)[kVectors], int first, int step, int vectors,
                              int origin, int target, const Terms& terms, const Elements<kExtras>& elements) {
  float u[kVectors * kCount];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int i = first + k * step, column = origin + i * kCount;
    float x[kCount];
    if (kWhole || i < vectors) {
      held[k].get(x);
      elements.effective(x, column, target, terms, s);
      elements.replace(x, target - column, -INFINITY);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) u[k * kCount + j] = x[j];
  }
  add(s, u);
}

template <typename Z, int kCount, int kVectors, bool kExtras>
LONGTAIL_DEVICE void add_vectors(Stats& s, const Vector<Z, kCount> (&held)[kVectors], int first, int step, int vectors,
                                 int origin, int target, const Terms& terms, const Elements<kExtras>& elements) {
  if (first + (kVectors - 1) * step < vectors) {
    add_some<true>(s, held, first, step, vectors, origin, target, terms, elements);
  } else if (first < vectors) {
    add_some<false>(s, held, first, step, vectors, origin, target, terms, elements);
  }
}

}  // namespace gpu
}  // namespace longtail
