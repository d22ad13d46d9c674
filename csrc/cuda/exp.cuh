// Exponentials and logarithms from the hardware's base-2 exponential, for every kernel.
#pragma once

#include "platform.cuh"

namespace longtail {
namespace gpu {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// exp(x) for x <= 0, exactly 0 below -88.
LONGTAIL_DEVICE float exp_of(float x) { return exp2_fast(x * kLog2e); }

// The same, with x cut off where exp(x) is 0, so that 0 * x is 0. NaN stays NaN.
LONGTAIL_DEVICE float exp_cut(float& x) {
  x = max_nan(x, -120.0f);
  return exp_of(x);
}

// In place of loss_math.h's limit: the exponential of this file.
struct HardwareExp {};
LONGTAIL_DEVICE float exp_cut(float& x, HardwareExp) { return exp_cut(x); }

// log(1 + x) for 0 <= x <= 1: x times a minimax fit of log1p(x) / x (relative error 5e-9, 1.6e-7 once rounded).
LONGTAIL_DEVICE float log1p_fast(float x) {
  float p = -0.0032440212089568377f * x + 0.01985144428908825f;
  p = p * x - 0.056959498673677444f;
  p = p * x + 0.10603651404380798f;
  p = p * x - 0.15305590629577637f;
  p = p * x + 0.1967593878507614f;
  p = p * x - 0.24954134225845337f;
  p = p * x + 0.3332996368408203f;
  p = p * x - 0.4999990165233612f;
  p = p * x + 1.0f;
  return p * x;
}

}  // namespace gpu
}  // namespace longtail
