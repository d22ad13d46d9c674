// Rows of few classes turned into columns in the first-level cache, and back: one lane per row there.
//
// What is moved are units of 32 bits: one float, or two neighbouring classes of a half type.
#pragma once

#include <type_traits>

#include "simd.h"

namespace longtail {
namespace LONGTAIL_ISA {

using Units = Vec<float>::Value;

// ---- Registers made of blocks: block b comes from p + 4 b stride ----

LONGTAIL_INLINE Units load_blocks(const char* p, int64_t stride) {
#if defined(__AVX512F__)
  const auto block = [&](int b) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + 4 * b * stride)); };
  __m512 x = _mm512_castps128_ps512(block(0));
  x = _mm512_insertf32x4(x, block(1), 1);
  x = _mm512_insertf32x4(x, block(2), 2);
  return (Units)_mm512_insertf32x4(x, block(3), 3);
#elif defined(__AVX__)
  const auto block = [&](int b) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + 4 * b * stride)); };
  return (Units)_mm256_insertf128_ps(_mm256_castps128_ps256(block(0)), block(1), 1);
#else
  Units x;
  memcpy(&x, p, sizeof(x));
  return x;
#endif
}

LONGTAIL_INLINE void store_blocks(char* p, int64_t stride, Units x) {
#if defined(__AVX512F__)
  const auto at = [&](int b) { return reinterpret_cast<float*>(p + 4 * b * stride); };
  _mm_storeu_ps(at(0), _mm512_maskz_extractf32x4_ps(0xf, (__m512)x, 0));
  _mm_storeu_ps(at(1), _mm512_maskz_extractf32x4_ps(0xf, (__m512)x, 1));
  _mm_storeu_ps(at(2), _mm512_maskz_extractf32x4_ps(0xf, (__m512)x, 2));
  _mm_storeu_ps(at(3), _mm512_maskz_extractf32x4_ps(0xf, (__m512)x, 3));
#elif defined(__AVX__)
  _mm_storeu_ps(reinterpret_cast<float*>(p), _mm256_castps256_ps128((__m256)x));
  _mm_storeu_ps(reinterpret_cast<float*>(p + 4 * stride), _mm256_extractf128_ps((__m256)x, 1));
#else
  memcpy(p, &x, sizeof(x));
#endif
}

// Of each block, the lower or upper pairs of a and b, unit by unit or pair by pair.
#if defined(__AVX512F__)
#define LONGTAIL_INTERLEAVE(name, function) \
  LONGTAIL_INLINE Units name(Units a, Units b) { return (Units)_mm512_maskz_##function(0xffff, (__m512)a, (__m512)b); }
#define LONGTAIL_INTERLEAVE_PAIRS(name, function) \
  LONGTAIL_INLINE Units name(Units a, Units b) { return (Units)_mm512_maskz_##function(0xff, (__m512d)a, (__m512d)b); }
#elif defined(__AVX__)
#define LONGTAIL_INTERLEAVE(name, function) \
  LONGTAIL_INLINE Units name(Units a, Units b) { return (Units)_mm256_##function((__m256)a, (__m256)b); }
#define LONGTAIL_INTERLEAVE_PAIRS(name, function) \
  LONGTAIL_INLINE Units name(Units a, Units b) { return (Units)_mm256_##function((__m256d)a, (__m256d)b); }
#endif
#if defined(__AVX__)
LONGTAIL_INTERLEAVE(lower_units, unpacklo_ps)
LONGTAIL_INTERLEAVE(upper_units, unpackhi_ps)
LONGTAIL_INTERLEAVE_PAIRS(lower_pairs, unpacklo_pd)
LONGTAIL_INTERLEAVE_PAIRS(upper_pairs, unpackhi_pd)
#undef LONGTAIL_INTERLEAVE
#undef LONGTAIL_INTERLEAVE_PAIRS
#else
LONGTAIL_INLINE Units lower_units(Units a, Units b) { return Units{a[0], b[0], a[1], b[1]}; }
LONGTAIL_INLINE Units upper_units(Units a, Units b) { return Units{a[2], b[2], a[3], b[3]}; }
LONGTAIL_INLINE Units lower_pairs(Units a, Units b) { return Units{a[0], a[1], b[0], b[1]}; }
LONGTAIL_INLINE Units upper_pairs(Units a, Units b) { return Units{a[2], a[3], b[2], b[3]}; }
#endif

// Transposes the 4 x 4 units that four registers hold in each block; twice is nothing.
LONGTAIL_INLINE void transpose_blocks(Units (&x)[4]) {
  const Units a = lower_units(x[0], x[1]), b = lower_units(x[2], x[3]);
  const Units c = upper_units(x[0], x[1]), d = upper_units(x[2], x[3]);
  x[0] = lower_pairs(a, b);
  x[1] = upper_pairs(a, b);
  x[2] = lower_pairs(c, d);
  x[3] = upper_pairs(c, d);
}

// ---- Units and the numbers they hold: class by class into a column every `width` numbers ----

LONGTAIL_INLINE void store_columns(const float*, Units x, float* column, int64_t) { store(column, Vec<float>(x)); }
LONGTAIL_INLINE void store_columns(const bfloat16*, Units x, float* column, int64_t width) {
  store(column, Vec<float>((Units)((FloatBits)x << 16)));
  store(column + width, Vec<float>((Units)((FloatBits)x & 0xffff0000)));
}
LONGTAIL_INLINE void store_columns(const float16* z, Units x, float* column, int64_t width) {
  store(column, widen(z, __builtin_convertvector((FloatBits)x & 0xffff, HalfBits)));
  store(column + width, widen(z, __builtin_convertvector((FloatBits)x >> 16, HalfBits)));
}

LONGTAIL_INLINE Units load_columns(const float*, const float* column, int64_t) { return load(column).v; }
template <typename Z>
LONGTAIL_INLINE Units load_columns(const Z* z, const float* column, int64_t width) {
  const FloatBits even = __builtin_convertvector(narrow(z, load(column)), FloatBits);
  const FloatBits odd = __builtin_convertvector(narrow(z, load(column + width)), FloatBits);
  return (Units)(even | odd << 16);
}

// ---- Whole tiles: `columns` holds class c of row k at c * width + k ----

constexpr int64_t kMostRows = 256;

// Classes that are moved at once, or 0: one number at a time.
template <typename Z>
constexpr int64_t kBundle = sizeof(Z) == 8 ? 0 : 16 / sizeof(Z);

// Calls move(c) for bundles of classes; the last one overlaps the one before where it has to.
template <int64_t kSize, typename Move>
LONGTAIL_INLINE void for_bundles(int64_t classes, const Move& move) {
  for (int64_t c = 0; c < classes; c += kSize) move(c + kSize <= classes ? c : classes - kSize);
}

// One class of kLanes rows, or of the `count` that are left, a number at a time where they lie apart.
template <typename Z, typename T>
LONGTAIL_INLINE void read_column(const Z* z, int64_t stride, int64_t count, T* column) {
  if (stride == 1) return store(column, load_some(z, count));
  if (count > VecOf<Z>::kLanes) count = VecOf<Z>::kLanes;
  Z numbers[VecOf<Z>::kLanes] = {};
  for (int64_t k = 0; k < count; ++k) numbers[k] = z[k * stride];
  store(column, load(numbers));
}

template <typename Z, typename T>
LONGTAIL_INLINE void write_column(const T* column, int64_t stride, int64_t count, Z* z) {
  Z numbers[VecOf<Z>::kLanes];
  store(numbers, load(column));
  for (int64_t k = 0; k < count; ++k) z[k * stride] = numbers[k];
}

// Rows of so few classes, without gaps, that the compiler takes them apart and puts them together in registers.
template <int kClasses, typename T>
void read_pairs(const T* __restrict__ z, int64_t rows, T* __restrict__ columns, int64_t width) {
  for (int64_t k = 0; k < rows; ++k) {
    for (int c = 0; c < kClasses; ++c) columns[c * width + k] = z[k * kClasses + c];
  }
}

template <int kClasses, typename T>
void write_pairs(const T* __restrict__ columns, int64_t width, int64_t rows, T* __restrict__ z) {
  for (int64_t k = 0; k < rows; ++k) {
    for (int c = 0; c < kClasses; ++c) z[k * kClasses + c] = columns[c * width + k];
  }
}

// Whether rows of a half type, too short for a bundle and without gaps, are widened before and narrowed afterwards.
template <typename Z, typename T>
LONGTAIL_INLINE bool goes_through_wide(int64_t stride, int64_t classes) {
  return !std::is_same_v<Z, T> && stride == classes && classes < kBundle<Z>;
}

// `rows` rows of logits, at most kMostRows, into columns; lanes up to a whole register are zero.
template <typename Z, typename T>
void read_rows(const Z* z, int64_t stride, int64_t rows, int64_t classes, T* columns, int64_t width) {
  constexpr int kLanes = Vec<T>::kLanes;
  if (goes_through_wide<Z, T>(stride, classes)) {
    T wide[kMostRows * kBundle<float16>];
    const int64_t n = rows * classes;
    for (int64_t i = 0; i < n; i += kLanes) store(wide + i, load_some(z + i, n - i));
    return read_rows(wide, stride, rows, classes, columns, width);
  }
  if constexpr (std::is_same_v<Z, T>) {
    if (stride == classes && rows % kLanes == 0 && classes == 2) return read_pairs<2>(z, rows, columns, width);
    if (stride == classes && rows % kLanes == 0 && classes == 3) return read_pairs<3>(z, rows, columns, width);
  }
  for (int64_t k = 0; k < rows; k += kLanes) {
    const int64_t count = rows - k < kLanes ? rows - k : kLanes;
    const Z* row = z + k * stride;
    if constexpr (kBundle<Z> > 0) {
      if (count == kLanes && classes >= kBundle<Z>) {
        const int64_t bytes = stride * static_cast<int64_t>(sizeof(Z));
        for_bundles<kBundle<Z>>(classes, [&](int64_t c) {
          const char* first = reinterpret_cast<const char*>(row + c);
          Units x[4];
          for (int i = 0; i < 4; ++i) x[i] = load_blocks(first + i * bytes, bytes);
          transpose_blocks(x);
          T* column = columns + c * width + k;
          for (int i = 0; i < 4; ++i) store_columns(z, x[i], column + i * (kBundle<Z> / 4) * width, width);
        });
        continue;
      }
    }
    for (int64_t c = 0; c < classes; ++c) read_column(row + c, stride, count, columns + c * width + k);
  }
}

// The way back.
template <typename Z, typename T>
void write_rows(const T* columns, int64_t width, int64_t rows, int64_t classes, Z* z, int64_t stride) {
  constexpr int kLanes = Vec<T>::kLanes;
  if (goes_through_wide<Z, T>(stride, classes)) {
    T wide[kMostRows * kBundle<float16>];
    const int64_t n = rows * classes;
    write_rows(columns, width, rows, classes, wide, stride);
    for (int64_t i = 0; i < n; i += kLanes) store_some(z + i, load(wide + i), n - i);
    return;
  }
  if constexpr (std::is_same_v<Z, T>) {
    if (stride == classes && classes == 2) return write_pairs<2>(columns, width, rows, z);
    if (stride == classes && classes == 3) return write_pairs<3>(columns, width, rows, z);
  }
  for (int64_t k = 0; k < rows; k += kLanes) {
    const int64_t count = rows - k < kLanes ? rows - k : kLanes;
    Z* row = z + k * stride;
    if constexpr (kBundle<Z> > 0) {
      if (count == kLanes && classes >= kBundle<Z>) {
        const int64_t bytes = stride * static_cast<int64_t>(sizeof(Z));
        for_bundles<kBundle<Z>>(classes, [&](int64_t c) {
          const T* column = columns + c * width + k;
          Units x[4];
          for (int i = 0; i < 4; ++i) x[i] = load_columns(z, column + i * (kBundle<Z> / 4) * width, width);
          transpose_blocks(x);
          char* first = reinterpret_cast<char*>(row + c);
          for (int i = 0; i < 4; ++i) store_blocks(first + i * bytes, bytes, x[i]);
        });
        continue;
      }
    }
    for (int64_t c = 0; c < classes; ++c) write_column(columns + c * width + k, stride, count, row + c);
  }
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
