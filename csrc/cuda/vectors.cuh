// Logits in memory: storage types, and neighbours read, converted and written together.
#pragma once

#include "platform.cuh"

namespace longtail {
namespace gpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LONGTAIL_DEVICE float to_float(float x) { return x; }
LONGTAIL_DEVICE float to_float(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
LONGTAIL_DEVICE float to_float(Float16 x) { return unpack_float16(x.bits).x; }
LONGTAIL_DEVICE void from_float(float x, float& to) { to = x; }
LONGTAIL_DEVICE void from_float(float x, BFloat16& to) { to.bits = static_cast<uint16_t>(pack_bfloat16(x, 0.0f)); }
LONGTAIL_DEVICE void from_float(float x, Float16& to) { to.bits = static_cast<uint16_t>(pack_float16(x, 0.0f)); }

LONGTAIL_DEVICE void unpack(uint32_t bits, float* x, float) { x[0] = float_from_bits(bits); }
LONGTAIL_DEVICE void unpack(uint32_t bits, float* x, BFloat16) {
  x[0] = float_from_bits(bits << 16);
  x[1] = float_from_bits(bits & 0xffff0000u);
}
LONGTAIL_DEVICE void unpack(uint32_t bits, float* x, Float16) {
  const float2 pair = unpack_float16(bits);
  x[0] = pair.x;
  x[1] = pair.y;
}
LONGTAIL_DEVICE uint32_t pack(const float* x, float) { return bits_of_float(x[0]); }
LONGTAIL_DEVICE uint32_t pack(const float* x, BFloat16) { return pack_bfloat16(x[0], x[1]); }
LONGTAIL_DEVICE uint32_t pack(const float* x, Float16) { return pack_float16(x[0], x[1]); }

// A very low number, in every place of a word. Its exponential is 0 beside any maximum that `is_moderate`.
LONGTAIL_DEVICE uint32_t very_low(float) { return 0xf1800000u; }     // -2^100
LONGTAIL_DEVICE uint32_t very_low(BFloat16) { return 0xf180f180u; }  // -2^100
LONGTAIL_DEVICE uint32_t very_low(Float16) { return 0xfbfffbffu; }   // -65504, the lowest
LONGTAIL_DEVICE bool is_moderate(float m, float) { return fabsf(m) < 0x1p20f; }
LONGTAIL_DEVICE bool is_moderate(float m, BFloat16) { return is_moderate(m, float()); }
LONGTAIL_DEVICE bool is_moderate(float m, Float16) { return m > -65000.0f && m < 0x1p20f; }

// The larger in each place of a word; NaN is passed over.
LONGTAIL_DEVICE uint32_t max_word(uint32_t a, uint32_t b, float) {
  return bits_of_float(fmaxf(float_from_bits(a), float_from_bits(b)));
}
LONGTAIL_DEVICE uint32_t max_word(uint32_t a, uint32_t b, BFloat16) { return max_bfloat16(a, b); }
LONGTAIL_DEVICE uint32_t max_word(uint32_t a, uint32_t b, Float16) { return max_float16(a, b); }

// kCount neighbours of storage type Z as they are in memory: 16 bytes of them, or one.
template <typename Z, int kCount>
struct Vector {
  static_assert(kCount * sizeof(Z) == 16, "a vector is 16 bytes");
  static constexpr int kWidth = kCount;
  uint4 bits;

  LONGTAIL_DEVICE void load(const Z* p) { bits = load_16(p); }
  LONGTAIL_DEVICE void load_streaming(const Z* p) { bits = load_16_streaming(p); }
  LONGTAIL_DEVICE void get(float (&x)[kCount]) const {
    constexpr int kPerWord = kCount / 4;
    unpack(bits.x, x, Z());
    unpack(bits.y, x + kPerWord, Z());
    unpack(bits.z, x + 2 * kPerWord, Z());
    unpack(bits.w, x + 3 * kPerWord, Z());
  }
  // Elements of one register, kPerWord of them from element i on, which the compiler knows.
  static constexpr int kPerWord = kCount / 4;
  LONGTAIL_DEVICE void get_word(int i, float (&x)[kPerWord]) const {
    unpack(i < kPerWord ? bits.x : i < 2 * kPerWord ? bits.y : i < 3 * kPerWord ? bits.z : bits.w, x, Z());
  }
  LONGTAIL_DEVICE void set_word(int i, const float (&x)[kPerWord]) { word_of(i) = pack(x, Z()); }
  LONGTAIL_DEVICE uint32_t& word_of(int i) {
    return i < kPerWord ? bits.x : i < 2 * kPerWord ? bits.y : i < 3 * kPerWord ? bits.z : bits.w;
  }

  LONGTAIL_DEVICE void fill_very_low() { bits.x = bits.y = bits.z = bits.w = very_low(Z()); }
  // Element `place`, where there is such a one.
  LONGTAIL_DEVICE void make_very_low(int place) {
    constexpr uint32_t kAll = 0xffffffffu, kLow = kPerWord == 1 ? kAll : 0xffffu;
    const uint32_t here = (place & (kPerWord - 1)) == 0 ? kLow : ~kLow;
#pragma unroll
    for (int i = 0; i < kCount; i += kPerWord) {
      uint32_t& word = word_of(i);
      if (place >= i && place < i + kPerWord) word = (word & ~here) | (very_low(Z()) & here);
    }
  }
  // The largest element in each place of a word, `so_far` included.
  LONGTAIL_DEVICE uint32_t max_with(uint32_t so_far) const {
    so_far = max_word(max_word(so_far, bits.x, Z()), bits.y, Z());
    return max_word(max_word(so_far, bits.z, Z()), bits.w, Z());
  }
  // As it is, to shared memory; to device memory for good.
  LONGTAIL_DEVICE void keep(Z* p) const { store_16(p, bits); }
  LONGTAIL_DEVICE void store(Z* p) const { store_16_streaming(p, bits); }
  static LONGTAIL_DEVICE void store(Z* p, const float (&x)[kCount]) {
    constexpr int kPerWord = kCount / 4;
    uint4 out;
    out.x = pack(x, Z());
    out.y = pack(x + kPerWord, Z());
    out.z = pack(x + 2 * kPerWord, Z());
    out.w = pack(x + 3 * kPerWord, Z());
    store_16_streaming(p, out);
  }
};

template <typename Z>
struct Vector<Z, 1> {
  static constexpr int kWidth = 1;
  Z value;

  LONGTAIL_DEVICE void load(const Z* p) { value = *p; }
  LONGTAIL_DEVICE void load_streaming(const Z* p) { value = *p; }
  LONGTAIL_DEVICE void get(float (&x)[1]) const { x[0] = to_float(value); }
  static constexpr int kPerWord = 1;
  LONGTAIL_DEVICE void get_word(int, float (&x)[1]) const { x[0] = to_float(value); }
  LONGTAIL_DEVICE void set_word(int, const float (&x)[1]) { from_float(x[0], value); }
  LONGTAIL_DEVICE void keep(Z* p) const { *p = value; }
  LONGTAIL_DEVICE void store(Z* p) const { *p = value; }
  static LONGTAIL_DEVICE void store(Z* p, const float (&x)[1]) { from_float(x[0], *p); }
};

// Four neighbours of a half type, at an 8-byte boundary.
template <typename Z>
struct FourHalves {
  uint2 bits;

  LONGTAIL_DEVICE void load(const Z* p) { bits = load_8(p); }
  LONGTAIL_DEVICE void get(float (&x)[4]) const {
    unpack(bits.x, x, Z());
    unpack(bits.y, x + 2, Z());
  }
  static LONGTAIL_DEVICE void store(Z* p, const float (&x)[4]) {
    uint2 out;
    out.x = pack(x, Z());
    out.y = pack(x + 2, Z());
    store_8_streaming(p, out);
  }
};
template <>
struct Vector<BFloat16, 4> : FourHalves<BFloat16> {};
template <>
struct Vector<Float16, 4> : FourHalves<Float16> {};

// Elements of a row before its first 16-byte boundary; all of them if it has none.
template <typename Z>
LONGTAIL_DEVICE int head_of(const Z* row, int count) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
  return min(count, (16 - past) % 16 / static_cast<int>(sizeof(Z)));
}

// Rows of `element` bytes a number, equal distances apart, so that two of them speak for all.
struct RowsInMemory {
  const void* first;
  int64_t stride;
  int element;
};

// Whether the first vector of each row of logits is one of the other matrix's row, too.
inline bool lie_alike(const RowsInMemory& logits, const RowsInMemory& other, int64_t rows) {
  for (int64_t row = 0; row < (rows < 2 ? rows : 2); ++row) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(logits.first) + row * logits.stride * logits.element;
    const uintptr_t head = (0 - begin) % 16 / logits.element;
    if ((reinterpret_cast<uintptr_t>(other.first) + (row * other.stride + head) * other.element) % 16 != 0)
      return false;
  }
  return true;
}

// Whether every class's pixels in images [N, C, P], of `size` bytes each, begin and end at a 16-byte boundary.
inline bool aligned_pixels(const void* p, int size, int64_t images, int64_t classes, int64_t pixels, int64_t stride,
                           int64_t class_stride) {
  const auto whole = [&](int64_t n) { return n * size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && whole(pixels) && (images <= 1 || whole(stride)) &&
         (classes <= 1 || whole(class_stride));
}

// kCount class constants from class `column` on; `vector`: all of them together lie at 16-byte boundaries.
template <int kCount>
LONGTAIL_DEVICE void load_constants(const float* p, int column, bool vector, float (&x)[kCount]) {
  if constexpr (kCount % 4 == 0) {
    if (vector) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float4 four = load_constant_16(p + column + i);
        x[i] = four.x;
        x[i + 1] = four.y;
        x[i + 2] = four.z;
        x[i + 3] = four.w;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = load_constant(p + column + i);
}

}  // namespace gpu
}  // namespace longtail
