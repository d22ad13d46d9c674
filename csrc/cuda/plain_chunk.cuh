// What a thread does with a chunk of logits that are their own effective logits, in base 2: one multiply-add and one
// exponential each.
//
// With m2 = m * log2(e), rounded, exp2(u * log2(e) - m2) is exp(u - m) * 2^gap, gap = m * log2(e) - m2 being the same
// for all of them: sums and coefficients are freed of it once per chunk or row. It is small while m is moderate.
#pragma once

#include "exp.cuh"
#include "vectors.cuh"

namespace longtail {
namespace gpu {

// Vectors that a thread takes together, and has under way.
constexpr int kPlainGroup = 4;

struct BaseTwo {
  float m2, gap, inverse;  // inverse: 2^-gap

  LONGTAIL_DEVICE explicit BaseTwo(float m) {
    m2 = m * kLog2e;
    gap = fmaf(m, kLog2e, -m2);
    inverse = exp2_fast(-gap);
  }
};

template <typename Z, int kCount, int kVectors>
LONGTAIL_DEVICE float max_of(const Vector<Z, kCount> (&held)[kVectors]) {
  uint32_t word = very_low(Z());
#pragma unroll
  for (int k = 0; k < kVectors; ++k) word = held[k].max_with(word);
  float x[kCount / 4];
  unpack(word, x, Z());
  float m = x[0];
#pragma unroll
  for (int i = 1; i < kCount / 4; ++i) m = fmaxf(m, x[i]);
  return m;
}

struct ChunkSums {
  float d, t;  // sums of exp(u - m), and of exp(u - m) * (u - m)

  LONGTAIL_DEVICE bool valid() const { return t == t; }
};

// Of a moderate m, and of logits none of which is -inf, else t is NaN. `next(k)` is called when vector k has been read.
template <bool kEntropy, typename Z, int kCount, int kVectors, typename Next>
LONGTAIL_DEVICE ChunkSums sums_of(const Vector<Z, kCount> (&held)[kVectors], float m, const Next& next) {
  const BaseTwo base(m);
  float d = 0.0f, t = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    float x[kCount];
    held[k].get(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float shift = fmaf(x[i], kLog2e, -base.m2);
      const float e = exp2_fast(shift);
      d += e;
      if (kEntropy) t = fmaf(e, shift, t);
    }
    next(k);
  }
  return {d * base.inverse, kEntropy ? fmaf(-base.gap, d, t) * (base.inverse * kLn2) : 0.0f};
}

// A row's gradient, from coefficients with a moderate m.
template <bool kComplement>
struct PlainGrad {
  float m2, a, b;

  LONGTAIL_DEVICE PlainGrad(float m, float a_, float b_) {
    const BaseTwo base(m);
    m2 = base.m2;
    b = kComplement ? b_ * kLn2 * base.inverse : 0.0f;
    a = kComplement ? fmaf(-b, base.gap, a_ * base.inverse) : a_ * base.inverse;
  }

  // dloss/dlogits of non-target classes, in place.
  template <int kCount>
  LONGTAIL_DEVICE void apply(float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float shift = fmaf(x[i], kLog2e, -m2);
      if (kComplement) shift = max_nan(shift, -150.0f);  // its exponential is 0, and 0 * shift too
      const float e = exp2_fast(shift);
      x[i] = e * (kComplement ? fmaf(b, shift, a) : a);
    }
  }
};

}  // namespace gpu
}  // namespace longtail
