// The names of csrc/cuda/platform.cuh for the host's compiler: what they do on a GPU, with none of its mercy.
//
// Numbers that a GPU gives to some ULP are off by as much here; asynchronous copies arrive at the last moment; shuffles
// order no memory; shared memory holds NaN at first, and is gone when its block has exited.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <tuple>

#include "scheduler.h"

#define LONGTAIL_DEVICE inline
#define LONGTAIL_KERNEL(...) void
#define LONGTAIL_PARAMETER const

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline void __syncthreads(const emulation::Site& site = emulation::Site::current()) {
  emulation::synchronise(emulation::Scope::block, site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const emulation::Site& site = emulation::Site::current()) {
  if (mask != 0xffffffffu) emulation::fail("__syncwarp without all lanes");
  emulation::synchronise(emulation::Scope::warp, site);
}

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane, int width = 32, const emulation::Site& site = emulation::Site::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (mask != 0xffffffffu || width != 32) emulation::fail("a shuffle without all lanes");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = emulation::exchange(bits, static_cast<unsigned>(lane), site);
  memcpy(&x, &bits, sizeof(T));
  return x;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int flip, int width = 32,
                  const emulation::Site& site = emulation::Site::current()) {
  return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ flip, width, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T x, int by, int width = 32,
                   const emulation::Site& site = emulation::Site::current()) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, x, lane + by < 32 ? lane + by : lane, width, site);
}

namespace longtail {
namespace gpu {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Arithmetic ----

inline float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// A normal number moved by -2 to 2 ULP, always the same for the same bits.
inline float nudged(float x) {
  if (!(fabsf(x) >= 1e-37f && fabsf(x) < 1e38f) || x == 1.0f) return x;
  const uint32_t bits = bits_of_float(x);
  return float_from_bits(bits + (bits * 2654435761u >> 16) % 5 - 2);
}

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : nudged(y);
}

inline float log2_fast(float x) { return nudged(log2f(x)) + (x > 0.5f && x < 2.0f ? 0x1p-23f : 0.0f); }

inline float reciprocal_fast(float x) {
  const float y = 1.0f / x;
  return fabsf(y) < 1.17549435e-38f ? 0.0f : nudged(y);
}

inline float multiply_saturated(float a, float b) {
  const float y = a * b;
  return y > 0.0f ? fminf(y, 1.0f) : 0.0f;  // 0 for NaN
}

inline float divide_fast(float a, float b) { return nudged(a / b); }

inline float max_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }

inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t float16_bits(float x) {
  const uint32_t sign = bits_of_float(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  // Where halves of this size are `step` apart, adding 2^23 steps rounds to a multiple of them, ties to even.
  const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
  const float magic = ldexpf(0x1p23f, exponent - 10);
  const float rounded = ((size + magic) - magic) * ldexpf(1.0f, 10 - exponent);  // [0, 2048], an integer
  return sign | static_cast<uint32_t>((exponent + 14) * 1024 + static_cast<int>(rounded));
}

inline float float_from_float16(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
  float x = exponent == 31  ? (fraction ? NAN : INFINITY)
            : exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                            : ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -x : x;
}

inline uint32_t pack_bfloat16(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
inline uint32_t pack_float16(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }
inline float2 unpack_float16(uint32_t bits) {
  return {float_from_float16(bits & 0xffff), float_from_float16(bits >> 16)};
}

// Of each half: the larger, or what is a number.
inline uint32_t max_of_halves(uint32_t a, uint32_t b, float (*value)(uint32_t)) {
  uint32_t y = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t p = a >> shift & 0xffff, q = b >> shift & 0xffff;
    const float x = value(p), z = value(q);
    y |= (z != z || x >= z ? p : q) << shift;
  }
  return y;
}
inline uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  return max_of_halves(a, b, [](uint32_t bits) { return float_from_bits(bits << 16); });
}
inline uint32_t max_float16(uint32_t a, uint32_t b) { return max_of_halves(a, b, float_from_float16); }

inline bool any_lane(bool x, const emulation::Site& site = emulation::Site::current()) {
  int any = x;
  for (int flip = 1; flip < 32; flip *= 2) any |= __shfl_xor_sync(kAllLanes, any, flip, 32, site);
  return any != 0;
}

template <typename T>
T* kept(T* p) {
  return p;
}

inline int log2_of(int n) {
  if (n < 1 || (n & (n - 1)) != 0) emulation::fail("log2_of(" + std::to_string(n) + ")");
  return 31 - __builtin_clz(static_cast<unsigned>(n));
}

// ---- Memory ----

inline uint4 load_16(const void* p) { return *static_cast<const uint4*>(p); }
inline uint4 load_16_streaming(const void* p) { return load_16(p); }
inline void store_16(void* p, uint4 x) { *static_cast<uint4*>(p) = x; }
inline void store_16_streaming(void* p, uint4 x) { store_16(p, x); }
inline uint2 load_8(const void* p) { return *static_cast<const uint2*>(p); }
inline void store_8_streaming(void* p, uint2 x) { *static_cast<uint2*>(p) = x; }
inline float load_constant(const float* p) { return *p; }
inline float4 load_constant_16(const float* p) { return *reinterpret_cast<const float4*>(p); }

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_memory());
}

inline void copy_async_16(void* shared, const void* p) {
  constexpr uint32_t kUnread = 0xffffffffu;
  load_16(p);
  store_16(shared, {kUnread, kUnread, kUnread, kUnread});
  emulation::copy_later(shared, p);
}

inline void copy_async_commit() { emulation::close_group(); }

template <int kPending>
void copy_async_wait() {
  emulation::finish_copies(kPending, [](void* to, const void* from) { store_16(to, load_16(from)); });
}

// ---- Clusters ----

inline int cluster_size() { return emulation::cluster_size(); }
inline int cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_arrive(const emulation::Site& site = emulation::Site::current()) {
  emulation::arrive(emulation::Scope::cluster, site);
}
inline void cluster_wait(const emulation::Site& site = emulation::Site::current()) {
  emulation::wait(emulation::Scope::cluster, site);
}

template <typename T>
T* map_shared(T* local, int rank) {
  return reinterpret_cast<T*>(emulation::shared_of(local, rank));
}

// ---- Assertions and launches ----

#define LONGTAIL_DEVICE_ASSERT(condition, message)                        \
  do {                                                                    \
    if (!(condition)) emulation::fail("device-side assertion: " message); \
  } while (0)

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t grid, int threads, int cluster, int shared_bytes, void*,
            Parameters... parameters) {
  const int64_t most = emulation::control.most_blocks;
  if (most > 0 && grid > most) grid = most;  // kernels go on to the rows beyond
  auto thread = [&] { kernel(parameters...); };
  const emulation::Launch shape = {grid, threads, cluster, shared_bytes};
  const std::string failure = emulation::run(shape, [](void* f) { (*static_cast<decltype(thread)*>(f))(); }, &thread);
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace gpu
}  // namespace longtail
