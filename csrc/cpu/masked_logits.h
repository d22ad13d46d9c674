// Logits of a row without some of its classes, which a bit of each names.
#pragma once

#include "softmax_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

// `yes` in the lanes whose bits are set, from bit j on, a multiple of the lanes.
LONGTAIL_INLINE uint32_t bits_at(const uint8_t* bits, int64_t j, int lanes) {
  uint32_t found = bits[j / 8];
  if (lanes > 8) found |= static_cast<uint32_t>(bits[j / 8 + 1]) << 8;
  return lanes < 8 ? found >> (j % 8) : found;
}

#if defined(__AVX512F__)
LONGTAIL_INLINE Vec<float> select_bits(const uint8_t* bits, int64_t j, Vec<float> yes, Vec<float> no) {
  const __mmask16 mask = static_cast<__mmask16>(bits_at(bits, j, 16));
  return (Vec<float>::Value)_mm512_mask_blend_ps(mask, (__m512)no.v, (__m512)yes.v);
}
LONGTAIL_INLINE Vec<double> select_bits(const uint8_t* bits, int64_t j, Vec<double> yes, Vec<double> no) {
  const __mmask8 mask = static_cast<__mmask8>(bits_at(bits, j, 8));
  return (Vec<double>::Value)_mm512_mask_blend_pd(mask, (__m512d)no.v, (__m512d)yes.v);
}
#else
template <typename T>
LONGTAIL_INLINE Vec<T> select_bits(const uint8_t* bits, int64_t j, Vec<T> yes, Vec<T> no) {
  using Bits = typename Vec<T>::Bits;
  constexpr int kLanes = Vec<T>::kLanes;
  Bits lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  const Bits found = Bits{} + static_cast<int32_t>(bits_at(bits, j, kLanes));
  return select(Mask<T>{(found & lane) != Bits{}}, yes, no);
}
#endif

// Logits, -inf in the place of those whose bit is set.
template <typename Z, bool kBiased>
struct MaskedLogits {
  using T = typename Stored<Z>::Arithmetic;
  const Z* z;
  const T* bias;
  const uint8_t* bits;

  LONGTAIL_INLINE Vec<T> whole(int64_t j) const {
    const Vec<T> u = load(z + j);
    return select_bits(bits, j, Vec<T>(T(-INFINITY)), kBiased ? u + load(bias + j) : u);
  }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const {
    const Vec<T> u = padded(z + j, count, T(-INFINITY));
    return select_bits(bits, j, Vec<T>(T(-INFINITY)), kBiased ? u + widen(bias + j, load_raw(bias + j, count)) : u);
  }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(z + j, 2 * Vec<T>::kLanes); }
};

#if defined(__AVX512BW__)
// Masked as they are stored, and widened in place.
LONGTAIL_INLINE Two<float> two_of(const MaskedLogits<bfloat16, false> u, int64_t j) {
  __mmask32 mask;
  memcpy(&mask, u.bits + j / 8, sizeof(mask));
  constexpr short kNegativeInfinity = static_cast<short>(0xff80);
  const auto words =
      (FloatBits)_mm512_mask_mov_epi16(_mm512_loadu_si512(u.z + j), mask, _mm512_set1_epi16(kNegativeInfinity));
  return {(Vec<float>::Value)(words << 16), (Vec<float>::Value)(words & 0xffff0000)};
}
#endif

}  // namespace LONGTAIL_ISA
}  // namespace longtail
