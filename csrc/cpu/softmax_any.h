// The loops of the softmax family over a row with any option: effective logits are computed into a block, and once more
// where the gradient is written.
#pragma once

#include "softmax_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

// A number for each class, or one for all.
template <typename T>
struct Repeated {
  T values[Vec<T>::kLanes];
  constexpr explicit Repeated(T x) : values() {
    for (T& value : values) value = x;
  }
};
template <typename T>
constexpr Repeated<T> kZeros(T(0));
template <typename T>
constexpr Repeated<T> kOnes(T(1));

template <typename T>
struct PerClass {
  const T* values;
  int64_t mask;  // of the index: 0 where one register of numbers serves all

  PerClass(const T* given, const Repeated<T>& otherwise)
      : values(given ? given : otherwise.values), mask(given ? -1 : 0) {}
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const { return load_some(values + (j & mask), count); }
};

// What class_scale, target_scale, class_mitigation and compensation bring to a row.
template <typename T>
struct RowTail {
  PerClass<T> scale, mitigation;
  TargetTerms<T> terms;
  T compensation;
};

// Logits of a row as `factor * x + class_bias`, and what the target's class adds: x is the logit, or what `capping`
// bounds.
template <typename Z, bool kCapped, Tail kTail>
struct AnyLogits {
  using T = typename Stored<Z>::Arithmetic;
  const Z* z;
  T* kept;  // softcap's x from the sums to the gradient, or null
  PerClass<T> bias;
  Capping<T> capping;
  RowTail<T> tail;

  LONGTAIL_INLINE Vec<T> x(int64_t j, int64_t count) const {
    const Vec<T> logits = load_some(z + j, count);
    return kCapped ? capping.ratio(logits) : logits;
  }

  LONGTAIL_INLINE Vec<T> effective(Vec<T> x, int64_t j, int64_t count) const {
    const Vec<T> u =
        stretched(x * Vec<T>(row_factor(kCapped ? capping.softcap : capping.scale)), j, count) + bias.some(j, count);
    if (kTail != Tail::all) return u;
    const TargetTerms<Vec<T>> terms = {tail.terms.scale, tail.terms.mitigation, tail.terms.reference};
    return u + (mitigated(tail.mitigation.some(j, count), terms) + compensated(u, terms, Vec<T>(tail.compensation)));
  }

  // The scale of the target, and those of the classes.
  LONGTAIL_INLINE T row_factor(T factor) const { return kTail == Tail::none ? factor : factor * tail.terms.scale; }
  LONGTAIL_INLINE Vec<T> stretched(Vec<T> x, int64_t j, int64_t count) const {
    return kTail == Tail::none ? x : x * tail.scale.some(j, count);
  }
};

template <typename T>
struct ComputedSums {
  Vec<T> largest, U;
};

// Effective logits of the classes [begin, end) into `u`; their maximum and part of U.
template <bool kSmoothing, typename Z, bool kCapped, Tail kTail, typename T>
LONGTAIL_INLINE ComputedSums<T> compute(const AnyLogits<Z, kCapped, kTail> of, const PerClass<T> omega, int64_t begin,
                                        int64_t end, Vec<T> reference, T* u) {
  constexpr int kLanes = Vec<T>::kLanes;
  ComputedSums<T> sums = {T(-INFINITY), T(0)};
  const auto step = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    prefetch_ahead(of.z + j, kLanes);
    const Vec<T> x = of.x(j, count), logit = of.effective(x, j, count);
    if (kCapped && of.kept) store_some(of.kept + j, x, count);
    store_some(u + (j - begin), logit, count);
    const auto inside = lane_numbers<T>() < Vec<T>(T(count));
    const auto among = [&](Vec<T> yes, Vec<T> no) { return count == kLanes ? yes : select(inside, yes, no); };
    if (kSmoothing) sums.U = among(sums.U + omega.some(j, count) * (logit - reference), sums.U);
    sums.largest = maximum(sums.largest, among(logit, sums.largest));
  };
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) step(j, kLanes);
  if (j < end) step(j, end - j);
  return sums;
}

// As write_gradient, of the classes [0, count).
template <bool kSmoothing, bool kStream, typename Z, bool kCapped, Tail kTail, typename T>
LONGTAIL_INLINE void write_any_gradient(const AnyLogits<Z, kCapped, kTail> of, const PerClass<T> omega, int64_t count,
                                        const RowGrad<Vec<T>> row, Z* grad) {
  constexpr int kLanes = Vec<T>::kLanes;
  const Vec<T> scale = of.row_factor(of.capping.scale), S = row.S * scale;
  const RowGrad<Vec<T>> scaled = {row.m, row.a * scale, row.b * scale, S, row.target};
  const auto step = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    prefetch_ahead(of.z + j, kLanes);
    const Vec<T> x = kCapped && of.kept ? load_some(of.kept + j, n) : of.x(j, n);
    using Digits = std::conditional_t<kSmoothing, CancelledTo<Z>, RoundedTo<Z>>;  // S * omega may cancel e^x
    Vec<T> dz = apply(scaled, of.effective(x, j, n), Digits());
    if (kSmoothing) dz = dz + S * omega.some(j, n);
    dz = of.stretched(dz, j, n);
    return kCapped ? dz - dz * (x * x) : dz;
  };
  write_each<kStream>(step, count, grad);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
