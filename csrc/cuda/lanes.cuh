// Neighbouring numbers of one thread, for mathematics that is written over SIMD vectors: sigmoid_general.h. What all of
// them branch on together is asked once.
#pragma once

#include "exp.cuh"

namespace longtail {
namespace gpu {

template <int kCount>
struct Lanes {
  float x[kCount];

  Lanes() = default;
  LONGTAIL_DEVICE Lanes(float all) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = all;
  }
};

template <int kCount>
struct LaneMask {
  bool on[kCount];
};

template <int kCount, typename F>
LONGTAIL_DEVICE Lanes<kCount> each_lane(const F& f) {
  Lanes<kCount> y;
#pragma unroll
  for (int i = 0; i < kCount; ++i) y.x[i] = f(i);
  return y;
}

template <int kCount, typename F>
LONGTAIL_DEVICE LaneMask<kCount> each_bit(const F& f) {
  LaneMask<kCount> y;
#pragma unroll
  for (int i = 0; i < kCount; ++i) y.on[i] = f(i);
  return y;
}

template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> operator-(const Lanes<kCount>& a) {
  return each_lane<kCount>([&](int i) { return -a.x[i]; });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> operator+(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each_lane<kCount>([&](int i) { return a.x[i] + b.x[i]; });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> operator-(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each_lane<kCount>([&](int i) { return a.x[i] - b.x[i]; });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> operator*(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each_lane<kCount>([&](int i) { return a.x[i] * b.x[i]; });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> operator/(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each_lane<kCount>([&](int i) { return divide_fast(a.x[i], b.x[i]); });
}
template <int kCount>
LONGTAIL_DEVICE LaneMask<kCount> operator==(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each_bit<kCount>([&](int i) { return a.x[i] == b.x[i]; });
}
template <int kCount>
LONGTAIL_DEVICE LaneMask<kCount> operator<(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each_bit<kCount>([&](int i) { return a.x[i] < b.x[i]; });
}
template <int kCount>
LONGTAIL_DEVICE LaneMask<kCount> operator|(const LaneMask<kCount>& a, const LaneMask<kCount>& b) {
  return each_bit<kCount>([&](int i) { return a.on[i] || b.on[i]; });
}

template <int kCount>
LONGTAIL_DEVICE bool all(const LaneMask<kCount>& a) {
  bool found = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) found = found && a.on[i];
  return found;
}

// The lanes from kPart on, then those before: after all of them have been the first ones, they are in order again.
template <int kPart, int kCount>
LONGTAIL_DEVICE Lanes<kCount> rotated(const Lanes<kCount>& a) {
  return each_lane<kCount>([&](int i) { return a.x[(i + kPart) % kCount]; });
}

template <int kPart>
LONGTAIL_DEVICE float rotated(float all) {
  return all;
}

// In the order of the lanes.
template <int kCount>
LONGTAIL_DEVICE float total_of(const Lanes<kCount>& a) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += a.x[i];
  return sum;
}

// ---- The functions of loss_math.h ----

template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> select(const LaneMask<kCount>& mask, const Lanes<kCount>& yes, const Lanes<kCount>& no) {
  return each_lane<kCount>([&](int i) { return mask.on[i] ? yes.x[i] : no.x[i]; });
}
// NaN if either is.
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> maximum(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each_lane<kCount>([&](int i) { return max_nan(a.x[i], b.x[i]); });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> minus_absolute(const Lanes<kCount>& a) {
  return each_lane<kCount>([&](int i) { return -fabsf(a.x[i]); });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> reciprocal(const Lanes<kCount>& a) {
  return each_lane<kCount>([&](int i) { return reciprocal_fast(a.x[i]); });
}
// Not the hardware's, which has few digits near 1.
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> log(const Lanes<kCount>& a) {
  return each_lane<kCount>([&](int i) { return ::logf(a.x[i]); });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> exp_cut(Lanes<kCount>& x, HardwareExp) {
  return each_lane<kCount>([&](int i) { return exp_cut(x.x[i]); });
}
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> minus_log1m(const Lanes<kCount>& miss, const Lanes<kCount>& hit) {
  return each_lane<kCount>([&](int i) { return minus_log1m(miss.x[i], hit.x[i]); });
}

}  // namespace gpu
}  // namespace longtail
