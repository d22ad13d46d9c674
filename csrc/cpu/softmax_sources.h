// Where the innermost loops of the softmax family have effective logits from: `whole` reads a register of them, `some`
// what is left, with -inf beyond.
//
// kStored: what was computed for the maximum is kept for the sums, which is cheaper, and rounded once: a multiplication
// fused with the subtraction of the maximum would not leave 0 of the maximum itself. kSloped: the
// gradient is multiplied by `slope`, each class by its own. kComplements: loops for complement entropy are made, too.
#pragma once

#include "capping.h"

namespace longtail {
namespace LONGTAIL_ISA {

template <typename Z>
LONGTAIL_INLINE VecOf<Z> padded(const Z* p, int64_t count, typename Stored<Z>::Arithmetic padding) {
  using T = typename Stored<Z>::Arithmetic;
  return select(lane_numbers<T>() < Vec<T>(T(count)), widen(p, load_raw(p, count)), Vec<T>(padding));
}

// Memory works on the blocks to come while one is computed. Into the second-level cache: the first can wait for too few
// lines at a time to keep memory busy.
template <typename Z>
LONGTAIL_INLINE void prefetch_ahead(const Z* z, int64_t count) {
  constexpr int64_t kAhead = 16384, kLine = 64;
  for (int64_t i = 0; i < count * int64_t(sizeof(Z)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(z) + kAhead + i, 0, 2);
  }
}

constexpr int64_t kBlock = 1024;  // logits whose maximum is taken before they are summed, from the first-level cache

// What the next block reads, from the second-level cache into the first.
template <typename T>
LONGTAIL_INLINE void prefetch_next_block(const T* p, int64_t count) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + kBlock) + i);
  }
}

// The logits themselves.
template <typename Z>
struct Logits {
  using T = typename Stored<Z>::Arithmetic;
  static constexpr bool kStored = false, kSloped = false, kComplements = true;
  const Z* z;
  LONGTAIL_INLINE Vec<T> whole(int64_t j) const { return load(z + j); }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const { return padded(z + j, count, T(-INFINITY)); }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(z + j, 2 * Vec<T>::kLanes); }
};

// Logits plus class_bias.
template <typename Z>
struct BiasedLogits {
  using T = typename Stored<Z>::Arithmetic;
  static constexpr bool kStored = false, kSloped = false, kComplements = true;
  const Z* z;
  const T* bias;
  LONGTAIL_INLINE Vec<T> whole(int64_t j) const { return load(z + j) + load(bias + j); }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const {
    return padded(z + j, count, T(-INFINITY)) + widen(bias + j, load_raw(bias + j, count));
  }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(z + j, 2 * Vec<T>::kLanes); }
};

// Logits times a factor of the row and class_scale, plus class_bias.
template <typename Z, bool kScale, bool kBias>
struct AffineLogits {
  using T = typename Stored<Z>::Arithmetic;
  static constexpr bool kStored = true, kSloped = kScale, kComplements = false;
  const Z* z;
  const T *scale, *bias;
  T factor;

  LONGTAIL_INLINE Vec<T> whole(int64_t j) const { return of(load(z + j), Vec<T>::kLanes, j); }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const {
    const Vec<T> u = of(widen(z + j, load_raw(z + j, count)), count, j);
    return select(lane_numbers<T>() < Vec<T>(T(count)), u, Vec<T>(T(-INFINITY)));
  }
  // What the gradient is multiplied by besides.
  LONGTAIL_INLINE Vec<T> slope(int64_t j, int64_t count) const { return load_some(scale + j, count); }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(z + j, 2 * Vec<T>::kLanes); }
  LONGTAIL_INLINE void prefetch_vectors(int64_t j) const {
    if (kScale) prefetch_next_block(scale + j, 2 * Vec<T>::kLanes);
    if (kBias) prefetch_next_block(bias + j, 2 * Vec<T>::kLanes);
  }

 private:
  LONGTAIL_INLINE Vec<T> of(Vec<T> logits, int64_t count, int64_t j) const {
    Vec<T> u = logits * Vec<T>(factor);
    if (kScale) u = u * load_some(scale + j, count);
    return kBias ? u + load_some(bias + j, count) : u;
  }
};

// Logits, and what class_mitigation and compensation add.
template <typename Z, bool kCompensated>
struct SeesawLogits {
  using T = typename Stored<Z>::Arithmetic;
  static constexpr bool kStored = true, kSloped = false, kComplements = false;
  const Z* z;
  const T* mitigation;
  TargetTerms<T> target;
  T compensation;

  LONGTAIL_INLINE Vec<T> whole(int64_t j) const { return of(load(z + j), load(mitigation + j)); }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const {
    return of(padded(z + j, count, T(-INFINITY)), load_some(mitigation + j, count));
  }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(z + j, 2 * Vec<T>::kLanes); }
  LONGTAIL_INLINE void prefetch_vectors(int64_t j) const { prefetch_next_block(mitigation + j, 2 * Vec<T>::kLanes); }

 private:
  LONGTAIL_INLINE Vec<T> of(Vec<T> x, Vec<T> m) const {
    const TargetTerms<Vec<T>> terms = {target.scale, target.mitigation, target.reference};
    const Vec<T> less = mitigated(m, terms);
    return kCompensated ? x + (less + compensated(x, terms, Vec<T>(compensation))) : x + less;
  }
};

// Effective logits that have been computed.
template <typename Number>
struct Computed {
  using T = Number;
  const T* u;
  LONGTAIL_INLINE Vec<T> whole(int64_t j) const { return load(u + j); }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const { return padded(u + j, count, T(-INFINITY)); }
  LONGTAIL_INLINE void prefetch(int64_t) const {}
};

// The same of a source's logits, while memory works on those to come, and the caches on what the next block asks for.
template <typename Source>
struct ComputedAhead : Computed<typename Source::T> {
  const Source source;
  LONGTAIL_INLINE ComputedAhead(const typename Source::T* u, const Source& from)
      : Computed<typename Source::T>{u}, source(from) {}
  LONGTAIL_INLINE void prefetch(int64_t j) const {
    source.prefetch(j);
    source.prefetch_vectors(j);
  }
};

// The same for the gradient.
template <typename Number, bool kScale>
struct KeptLogits {
  using T = Number;
  static constexpr bool kSloped = kScale, kComplements = true;
  const T *u, *scale;
  LONGTAIL_INLINE Vec<T> whole(int64_t j) const { return load(u + j); }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const { return load_some(u + j, count); }
  LONGTAIL_INLINE Vec<T> slope(int64_t j, int64_t count) const { return load_some(scale + j, count); }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(u + j, 2 * Vec<T>::kLanes); }
};

// Two registers of neighbours, in an order that a maximum or a sum does not ask for.
template <typename T>
struct Two {
  Vec<T> first, second;
};

template <typename U>
LONGTAIL_INLINE Two<typename U::T> two_of(const U u, int64_t j) {
  return {u.whole(j), u.whole(j + Vec<typename U::T>::kLanes)};
}

// The halves of each 32-bit word: widened in place.
LONGTAIL_INLINE Two<float> two_of(const Logits<bfloat16> u, int64_t j) {
  FloatBits words;
  memcpy(&words, u.z + j, sizeof(words));
  return {(Vec<float>::Value)(words << 16), (Vec<float>::Value)(words & 0xffff0000)};
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
