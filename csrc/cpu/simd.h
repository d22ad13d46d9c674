// A thin SIMD layer: arithmetic on one register of float or double, conversions from and to the storage types.
// Built on the vector extension that GCC and Clang share; LONGTAIL_VECTOR_BYTES is the register width of the file's
// instruction set. Everything lives in the namespace of that instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../loss_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
struct Native;
template <>
struct Native<float> {
  typedef float Value __attribute__((vector_size(LONGTAIL_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(LONGTAIL_VECTOR_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(LONGTAIL_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(LONGTAIL_VECTOR_BYTES / 2)));
};
template <>
struct Native<double> {
  typedef double Value __attribute__((vector_size(LONGTAIL_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(LONGTAIL_VECTOR_BYTES)));
  typedef uint64_t Unsigned __attribute__((vector_size(LONGTAIL_VECTOR_BYTES)));
};

template <typename T>
struct Vec {
  using Value = typename Native<T>::Value;
  using Bits = typename Native<T>::Bits;
  using Unsigned = typename Native<T>::Unsigned;  // whose arithmetic wraps around
  static constexpr int kLanes = LONGTAIL_VECTOR_BYTES / sizeof(T);
  Value v;

  LONGTAIL_INLINE Vec() : v() {}
  LONGTAIL_INLINE Vec(Value value) : v(value) {}
  LONGTAIL_INLINE Vec(T scalar) : v(scalar - Value{}) {}
};

template <typename T>
struct Mask {
  typename Native<T>::Bits v;
};

#define LONGTAIL_SIMD_OPERATORS(T)                                                \
  LONGTAIL_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) { return a.v + b.v; }      \
  LONGTAIL_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) { return a.v - b.v; }      \
  LONGTAIL_INLINE Vec<T> operator-(Vec<T> a) { return -a.v; }                     \
  LONGTAIL_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) { return a.v * b.v; }      \
  LONGTAIL_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) { return a.v / b.v; }      \
  LONGTAIL_INLINE Mask<T> operator<(Vec<T> a, Vec<T> b) { return {a.v < b.v}; }   \
  LONGTAIL_INLINE Mask<T> operator==(Vec<T> a, Vec<T> b) { return {a.v == b.v}; } \
  LONGTAIL_INLINE Mask<T> operator&(Mask<T> a, Mask<T> b) { return {a.v & b.v}; } \
  LONGTAIL_INLINE Mask<T> operator|(Mask<T> a, Mask<T> b) { return {a.v | b.v}; } \
  LONGTAIL_INLINE Vec<T> select(Mask<T> m, Vec<T> yes, Vec<T> no) { return m.v ? yes.v : no.v; }
LONGTAIL_SIMD_OPERATORS(float)
LONGTAIL_SIMD_OPERATORS(double)
#undef LONGTAIL_SIMD_OPERATORS

// `a > b ? a : b` and `a < b ? a : b`: of a NaN and a number, b. One instruction, which GCC does not find by itself.
#if defined(__AVX512F__)
#define LONGTAIL_EXTREME(name, op)                                                                    \
  LONGTAIL_INLINE Vec<float> name(Vec<float> a, Vec<float> b) {                                       \
    return Vec<float>((Vec<float>::Value)_mm512_maskz_##op##_ps(0xffff, (__m512)a.v, (__m512)b.v));   \
  }                                                                                                   \
  LONGTAIL_INLINE Vec<double> name(Vec<double> a, Vec<double> b) {                                    \
    return Vec<double>((Vec<double>::Value)_mm512_maskz_##op##_pd(0xff, (__m512d)a.v, (__m512d)b.v)); \
  }
#elif defined(__AVX__)
#define LONGTAIL_EXTREME(name, op)                                                        \
  LONGTAIL_INLINE Vec<float> name(Vec<float> a, Vec<float> b) {                           \
    return Vec<float>((Vec<float>::Value)_mm256_##op##_ps((__m256)a.v, (__m256)b.v));     \
  }                                                                                       \
  LONGTAIL_INLINE Vec<double> name(Vec<double> a, Vec<double> b) {                        \
    return Vec<double>((Vec<double>::Value)_mm256_##op##_pd((__m256d)a.v, (__m256d)b.v)); \
  }
#elif defined(__SSE2__)
#define LONGTAIL_EXTREME(name, op)                                                     \
  LONGTAIL_INLINE Vec<float> name(Vec<float> a, Vec<float> b) {                        \
    return Vec<float>((Vec<float>::Value)_mm_##op##_ps((__m128)a.v, (__m128)b.v));     \
  }                                                                                    \
  LONGTAIL_INLINE Vec<double> name(Vec<double> a, Vec<double> b) {                     \
    return Vec<double>((Vec<double>::Value)_mm_##op##_pd((__m128d)a.v, (__m128d)b.v)); \
  }
#else
#define LONGTAIL_FIRST_IF_max >
#define LONGTAIL_FIRST_IF_min <
#define LONGTAIL_EXTREME(name, op)                                                                                   \
  LONGTAIL_INLINE Vec<float> name(Vec<float> a, Vec<float> b) { return a.v LONGTAIL_FIRST_IF_##op b.v ? a.v : b.v; } \
  LONGTAIL_INLINE Vec<double> name(Vec<double> a, Vec<double> b) { return a.v LONGTAIL_FIRST_IF_##op b.v ? a.v : b.v; }
#endif
LONGTAIL_EXTREME(maximum, max)
LONGTAIL_EXTREME(minimum, min)
#undef LONGTAIL_EXTREME

template <typename T>
LONGTAIL_INLINE Vec<T> minus_absolute(Vec<T> a) {
  using Bits = typename Vec<T>::Bits;
  return (typename Vec<T>::Value)((Bits)a.v | (Bits)Vec<T>(T(-0.0)).v);
}

template <typename T>
LONGTAIL_INLINE bool all(Mask<T> mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask.v) == 0xffff;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)mask.v) == 0xff;
#elif defined(__SSE__)
  return _mm_movemask_ps((__m128)mask.v) == 0xf;
#else
  int64_t halves[2];
  static_assert(sizeof(halves) == sizeof(mask.v), "one register of 16 bytes");
  memcpy(halves, &mask.v, sizeof(halves));
  return (halves[0] & halves[1]) == -1;
#endif
}

// 0, 1, 2, ... in the lanes.
template <typename T>
LONGTAIL_INLINE Vec<T> lane_numbers() {
  Vec<T> x;
  for (int i = 0; i < Vec<T>::kLanes; ++i) x.v[i] = T(i);
  return x;
}

// Halves of a register, down to one lane: `op` joins them.
template <typename T, int Bytes, typename Op>
LONGTAIL_INLINE T fold(const void* lanes, Op op) {
  if constexpr (Bytes == sizeof(T)) {
    return *static_cast<const T*>(lanes);
  } else {
    typedef T Part __attribute__((vector_size(Bytes / 2)));
    Part low, high;
    memcpy(&low, lanes, sizeof(low));
    memcpy(&high, static_cast<const char*>(lanes) + sizeof(low), sizeof(high));
    const Part joined = op(low, high);
    return fold<T, Bytes / 2>(&joined, op);
  }
}

template <typename T>
LONGTAIL_INLINE T horizontal_sum(Vec<T> x) {
  return fold<T, LONGTAIL_VECTOR_BYTES>(&x.v, [](auto a, auto b) { return a + b; });
}

// Like `maximum`, may lose a NaN: the sums that follow keep it.
template <typename T>
LONGTAIL_INLINE T horizontal_max(Vec<T> x) {
  return fold<T, LONGTAIL_VECTOR_BYTES>(&x.v, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- Loads and stores: one register from and to unaligned memory ----

// The register that holds kLanes elements of storage type E, and the arithmetic type it widens to.
template <typename E>
struct Stored {
  using Arithmetic = E;
  using Raw = typename Vec<E>::Value;
};
template <>
struct Stored<bfloat16> {
  using Arithmetic = float;
  using Raw = Native<float>::Half;
};
template <>
struct Stored<float16> : Stored<bfloat16> {};

template <typename E>
using RawOf = typename Stored<E>::Raw;
template <typename E>
using VecOf = Vec<typename Stored<E>::Arithmetic>;

using FloatBits = Native<float>::Unsigned;
using HalfBits = Native<float>::Half;

LONGTAIL_INLINE FloatBits choose(Native<float>::Bits mask, FloatBits yes, FloatBits no) { return mask ? yes : no; }

LONGTAIL_INLINE Vec<float> widen(const float*, Vec<float>::Value raw) { return raw; }
LONGTAIL_INLINE Vec<double> widen(const double*, Vec<double>::Value raw) { return raw; }
LONGTAIL_INLINE Vec<float>::Value narrow(const float*, Vec<float> x) { return x.v; }
LONGTAIL_INLINE Vec<double>::Value narrow(const double*, Vec<double> x) { return x.v; }

LONGTAIL_INLINE Vec<float> widen(const bfloat16*, HalfBits raw) {
  return Vec<float>((Vec<float>::Value)(__builtin_convertvector(raw, FloatBits) << 16));
}

// Round to nearest, ties to even; NaN stays NaN.
LONGTAIL_INLINE HalfBits narrow(const bfloat16*, Vec<float> x) {
#if defined(__AVX512BF16__)
  return (HalfBits)_mm512_cvtneps_pbh((__m512)x.v);
#else
  const FloatBits bits = (FloatBits)x.v;
  const FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const FloatBits result = choose(x.v == x.v, rounded, (bits >> 16) | 0x40);
  return __builtin_convertvector(result, HalfBits);
#endif
}

LONGTAIL_INLINE Vec<float> widen(const float16*, HalfBits raw) {
#if defined(__AVX512F__)
  return Vec<float>((Vec<float>::Value)_mm512_maskz_cvtph_ps(0xffff, (__m256i)raw));
#elif defined(__F16C__)
  return Vec<float>((Vec<float>::Value)_mm256_cvtph_ps((__m128i)raw));
#else
  const FloatBits half = __builtin_convertvector(raw, FloatBits);
  const FloatBits magnitude = half & 0x7fff;
  // The exponent moves by a multiplication with 2^112, which also normalises half's subnormals.
  const Vec<float> moved = Vec<float>((Vec<float>::Value)(magnitude << 13)) * Vec<float>(0x1p112f);
  const FloatBits special = (magnitude << 13) | 0x7f800000;
  const FloatBits value = choose((Native<float>::Bits)(magnitude >= 0x7c00), special, (FloatBits)moved.v);
  return Vec<float>((Vec<float>::Value)(value | ((half & 0x8000) << 16)));
#endif
}

LONGTAIL_INLINE HalfBits narrow(const float16*, Vec<float> x) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)x.v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfBits)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT);
#else
  const FloatBits bits = (FloatBits)x.v;
  const FloatBits magnitude = bits & 0x7fffffff;
  const FloatBits normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 puts the last bit of half's subnormals at the last bit of the sum, rounded to nearest even.
  const Vec<float> aligned = Vec<float>((Vec<float>::Value)magnitude) + Vec<float>(0.5f);
  FloatBits result = choose((Native<float>::Bits)(magnitude < 0x38800000), (FloatBits)aligned.v - 0x3f000000, normal);
  result = choose((Native<float>::Bits)(magnitude >= 0x477ff000), FloatBits{} + 0x7c00, result);
  result = choose((Native<float>::Bits)(magnitude > 0x7f800000), FloatBits{} + 0x7e00, result);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), HalfBits);
#endif
}

template <typename E>
LONGTAIL_INLINE VecOf<E> load(const E* p) {
  RawOf<E> raw;
  memcpy(&raw, p, sizeof(raw));
  return widen(p, raw);
}

template <typename E>
LONGTAIL_INLINE void store(E* p, VecOf<E> x) {
  const RawOf<E> raw = narrow(p, x);
  memcpy(p, &raw, sizeof(raw));
}

// Past the caches: p is a multiple of a line's 64 bytes. Only where a register fills a line: half of one, which half
// types would write, is slower than a store (measured).
#if defined(__AVX512F__)
template <typename E>
constexpr bool kStreams = sizeof(RawOf<E>) == 64;

template <typename E>
LONGTAIL_INLINE void stream(E* p, VecOf<E> x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)narrow(p, x));
}

// Once, after the last: other threads see what was streamed.
inline void stream_end() { _mm_sfence(); }
#else
template <typename E>
constexpr bool kStreams = false;

inline void stream_end() {}
#endif

// Part of a register: `count` elements, 1 <= count <= lanes. What is not loaded reads as zero.
#if defined(__AVX512F__)
template <typename E>
LONGTAIL_INLINE RawOf<E> load_raw(const E* p, int64_t count) {
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(E) == 8) return (RawOf<E>)_mm512_maskz_loadu_epi64(mask, p);
  if constexpr (sizeof(E) == 4) return (RawOf<E>)_mm512_maskz_loadu_epi32(mask, p);
  if constexpr (sizeof(E) == 2) return (RawOf<E>)_mm256_maskz_loadu_epi16(mask, p);
}
template <typename E>
LONGTAIL_INLINE void store_raw(E* p, RawOf<E> raw, int64_t count) {
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(E) == 8) _mm512_mask_storeu_epi64(p, mask, (__m512i)raw);
  if constexpr (sizeof(E) == 4) _mm512_mask_storeu_epi32(p, mask, (__m512i)raw);
  if constexpr (sizeof(E) == 2) _mm256_mask_storeu_epi16(p, mask, (__m256i)raw);
}
#else
template <typename E>
LONGTAIL_INLINE RawOf<E> load_raw(const E* p, int64_t count) {
  RawOf<E> raw = {};
  memcpy(&raw, p, count * sizeof(E));
  return raw;
}
template <typename E>
LONGTAIL_INLINE void store_raw(E* p, RawOf<E> raw, int64_t count) {
  memcpy(p, &raw, count * sizeof(E));
}
#endif

// `left` elements or a whole register, whichever is less.
template <typename E>
LONGTAIL_INLINE VecOf<E> load_some(const E* p, int64_t left) {
  return left >= VecOf<E>::kLanes ? load(p) : widen(p, load_raw(p, left));
}

template <typename E>
LONGTAIL_INLINE void store_some(E* p, VecOf<E> x, int64_t left) {
  if (left >= VecOf<E>::kLanes) return store(p, x);
  store_raw(p, narrow(p, x), left);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
