// Exponentials and logarithms from the hardware's base-2 exponential, for every kernel.
#pragma once

#include "platform.cuh"

namespace longtail {
namespace gpu {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// exp(x): exactly 0 below -88, infinite above 89.
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

// -log(1 - x) for 0 <= x <= 1/2: x times a minimax fit of -log(1 - x) / x (relative error 1.6e-7).
LONGTAIL_DEVICE float minus_log1m(float x) {
  float p = 1.1606129407882690f * x - 1.0361658334732056f;
  p = p * x + 0.7516152858734131f;
  p = p * x + 0.0508239306509495f;
  p = p * x + 0.2696628868579865f;
  p = p * x + 0.3321292400360107f;
  p = p * x + 0.5000246167182922f;
  p = p * x + 1.0f;
  return p * x;
}

// -log(hit), where hit is 1 - miss to its own last digit, for 0 <= miss <= 1. The hardware's logarithm of 1/2 and less
// has all digits.
LONGTAIL_DEVICE float minus_log1m(float miss, float hit) {
  return miss > 0.5f ? -kLn2 * log2_fast(hit) : minus_log1m(miss);
}

// minus_log1m(x) to a relative error of 7e-6: for what is rounded to a half type.
LONGTAIL_DEVICE float minus_log1m_rough(float x) {
  float p = 0.8238958716392517f * x - 0.2804425954818726f;
  p = p * x + 0.3882229626178741f;
  p = p * x + 0.3169211447238922f;
  p = p * x + 0.5006147623062134f;
  p = p * x + 1.0f;
  return p * x;
}

}  // namespace gpu
}  // namespace longtail
