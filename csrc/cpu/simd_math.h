// Elementary functions of one register. Accuracy is tested in ULP against float64.
#pragma once

#include "simd.h"

namespace longtail {
namespace LONGTAIL_ISA {

// ---- e^x = 2^n e^r: n the integer next to x / ln 2, e^r a polynomial for |r| <= ln(2) / 2 ----

template <typename T>
struct Power;
template <>
struct Power<float> {
  static constexpr float kInverse = 1.44269504088896341f;  // 1 / ln 2
  static constexpr float kMagic = 12582912.0f + 127.0f;    // 1.5 * 2^23: adding it leaves n + 127 in the lowest bits
  static constexpr int kMantissa = 23;
  static constexpr float kHigh = 0.693359375f, kLow = -2.12194440054690583e-4f;  // ln 2
#if defined(__FMA__) || defined(__aarch64__)
  static constexpr float kBriefHigh = 0.693147182464599609f, kBriefLow = 0.0f;  // 1.9e-9 above it: n * kHigh is exact
#else
  static constexpr float kBriefHigh = kHigh, kBriefLow = kLow;
#endif
  static constexpr float kZero = -88.02969f;  // where n = -127, of which 2^n is 0 in bits
};
template <>
struct Power<double> {
  static constexpr double kInverse = 1.4426950408889634;
  static constexpr double kMagic = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr double kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10;
  static constexpr double kBriefHigh = kHigh, kBriefLow = kLow;
  static constexpr double kZero = -709.0895657128241;
};

template <typename T, int kCount>
LONGTAIL_INLINE Vec<T> polynomial(const T (&coefficients)[kCount], Vec<T> x) {
  Vec<T> p = coefficients[0];
  for (int i = 1; i < kCount; ++i) p = p * x + Vec<T>(coefficients[i]);
  return p;
}

// e^x for x <= 0, exactly 0 where it would not be a normal number; x is cut off there. NaN stays NaN: `maximum` passes
// its second operand, and 2^n is a factor, not a shift of the exponent. `coefficients`: of e^r, the highest first.
// kBrief: with an error of up to 2e-9 |x| where it saves an instruction.
template <bool kBrief, typename T, int kCount>
LONGTAIL_INLINE Vec<T> exp_cut_by(const T (&coefficients)[kCount], Vec<T>& x) {
  using P = Power<T>;
  x = maximum(Vec<T>(P::kZero), x);
  const Vec<T> z = x * Vec<T>(P::kInverse) + Vec<T>(P::kMagic);
  const Vec<T> n = z - Vec<T>(P::kMagic);
  const Vec<T> power = (typename Vec<T>::Value)((typename Vec<T>::Unsigned)z.v << P::kMantissa);
  const T high = kBrief ? P::kBriefHigh : P::kHigh, low = kBrief ? P::kBriefLow : P::kLow;
  Vec<T> r = x - n * Vec<T>(high);
  if (low != T(0)) r = r - n * Vec<T>(low);
  return polynomial(coefficients, r) * power;
}

// Minimax polynomials for e^r by their relative error.
template <bool kBrief>
LONGTAIL_INLINE Vec<float> exp_cut_to_3e9(Vec<float>& x) {
  const float to_3e9[] = {0x1.6a2434p-10f, 0x1.1239e2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f, 1.0f, 1.0f};
  return exp_cut_by<kBrief>(to_3e9, x);
}
LONGTAIL_INLINE Vec<float> exp_cut(Vec<float>& x, float) { return exp_cut_to_3e9<false>(x); }

// e^r by its Taylor series to degree 13 (truncation 5e-18 relative).
LONGTAIL_INLINE Vec<double> exp_cut(Vec<double>& x, double) {
  const double to_5e18[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  return exp_cut_by<false>(to_5e18, x);
}

// What is added to a sum of at least 1 needs no relative accuracy where it is small.
template <typename T>
struct Summed {};

LONGTAIL_INLINE Vec<float> exp_cut(Vec<float>& x, Summed<float>) { return exp_cut_to_3e9<true>(x); }
LONGTAIL_INLINE Vec<double> exp_cut(Vec<double>& x, Summed<double>) { return exp_cut(x, 0.0); }

// What is rounded to Z afterwards needs no more digits than Z has.
template <typename Z>
struct RoundedTo {};

LONGTAIL_INLINE Vec<float> exp_cut(Vec<float>& x, RoundedTo<bfloat16>) {
  const float to_8e5[] = {0x1.5349dcp-3f, 0x1.028aacp-1f, 0x1.000ac4p+0f, 0x1.fff692p-1f};
  return exp_cut_by<true>(to_8e5, x);
}
LONGTAIL_INLINE Vec<float> exp_cut(Vec<float>& x, RoundedTo<float16>) {
  const float to_3e6[] = {0x1.53a0eap-5f, 0x1.57e0d8p-3f, 0x1.0005b8p-1f, 0x1.fffb34p-1f, 0x1.ffffe8p-1f};
  return exp_cut_by<true>(to_3e6, x);
}
LONGTAIL_INLINE Vec<float> exp_cut(Vec<float>& x, RoundedTo<float>) { return exp_cut(x, 0.0f); }
LONGTAIL_INLINE Vec<double> exp_cut(Vec<double>& x, RoundedTo<double>) { return exp_cut(x, 0.0); }

// What is rounded to Z after some of its digits have cancelled: a thousandth of bfloat16's last, or all.
template <typename Z>
struct CancelledTo {};

template <typename Z>
LONGTAIL_INLINE VecOf<Z> exp_cut(VecOf<Z>& x, CancelledTo<Z>) {
  return exp_cut(x, typename Stored<Z>::Arithmetic(0));
}
LONGTAIL_INLINE Vec<float> exp_cut(Vec<float>& x, CancelledTo<bfloat16>) { return exp_cut(x, RoundedTo<float16>()); }

// 1 / x for normal x; one Newton step on the estimate that AVX-512 has costs a third of a division (1 ULP).
LONGTAIL_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> estimate = Vec<float>((Vec<float>::Value)_mm512_maskz_rcp14_ps(0xffff, (__m512)x.v));
  return estimate + estimate * (Vec<float>(1.0f) - x * estimate);
#else
  return Vec<float>(1.0f) / x;
#endif
}
LONGTAIL_INLINE Vec<double> reciprocal(Vec<double> x) { return Vec<double>(1.0) / x; }

// x P(s) / Q(s) with s = x^2, a minimax fit of tanh on [0, 9.02] (relative error 2.1e-8); beyond, tanh rounds to 1.
// NaN, as the second operand of minimum and maximum, passes. A division costs fewer instructions than `reciprocal`.
LONGTAIL_INLINE Vec<float> tanh(Vec<float> x) {
  const float numerator[] = {1.3319008461603048e-08f, 2.0583435844878837e-05f, 0.0034940318775660427f,
                             0.13379715732344968f, 0.9999999790274084f};
  const float denominator[] = {7.761993488081781e-07f, 0.00032830883840931406f, 0.025871063137131018f,
                               0.46713030976665915f, 1.0f};
  const Vec<float> s = minimum(Vec<float>(9.02f * 9.02f), x * x), one = 1.0f;
  return minimum(one, maximum(-one, x * polynomial(numerator, s) / polynomial(denominator, s)));
}

// log(2^k (1 + f)), 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2/2 + f^3 q(f), q a minimax polynomial (relative
// error 6e-9). kBrief: with an error of 5e-9 |k| where it saves instructions.
template <bool kBrief>
LONGTAIL_INLINE Vec<float> log_of(Vec<float>::Bits k, Vec<float> f) {
  const float c[] = {-0.07634496688842773f, 0.1276157647371292f,  -0.13160182535648346f, 0.14201757311820984f,
                     -0.16623356938362122f, 0.20001226663589478f, -0.2500081956386566f,  0.3333333134651184f};
  Vec<float> q = c[0];
  for (int i = 1; i < 8; ++i) q = q * f + Vec<float>(c[i]);
  const Vec<float> n = __builtin_convertvector(k, Vec<float>::Value);
  const Vec<float> square = f * f;
  Vec<float> low = square * f * q - Vec<float>(0.5f) * square;
  const float high = kBrief ? Power<float>::kBriefHigh : Power<float>::kHigh;
  const float rest = kBrief ? Power<float>::kBriefLow : Power<float>::kLow;
  if (rest != 0.0f) low = n * Vec<float>(rest) + low;
  return n * Vec<float>(high) + (f + low);
}

// The k of x.
LONGTAIL_INLINE Vec<float>::Bits log_exponent(Vec<float> x) {
  using Bits = Vec<float>::Bits;
  using Unsigned = Vec<float>::Unsigned;
  return (Bits)((Unsigned)x.v - 0x3f3504f3) >> 23;
}

// Its f.
LONGTAIL_INLINE Vec<float> log_fraction(Vec<float> x, Vec<float>::Bits k) {
  using Unsigned = Vec<float>::Unsigned;
  return Vec<float>((Vec<float>::Value)((Unsigned)x.v - ((Unsigned)k << 23))) - Vec<float>(1.0f);
}

// log(x) for normal x > 0.
LONGTAIL_INLINE Vec<float> log(Vec<float> x) {
  const Vec<float>::Bits k = log_exponent(x);
  const Vec<float> y = log_of<false>(k, log_fraction(x, k));
  return select(Mask<float>{x.v == x.v}, y, x);
}

// -log(hit), where hit is 1 - miss to its own last digit: none of those of either is lost.
LONGTAIL_INLINE Vec<float> minus_log1m(Vec<float> miss, Vec<float> hit) {
  const Vec<float>::Bits k = log_exponent(hit);
  return -log_of<true>(k, select(Mask<float>{k == 0}, -miss, log_fraction(hit, k)));
}
LONGTAIL_INLINE Vec<double> minus_log1m(Vec<double> miss, Vec<double> hit) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) {
    miss.v[i] = hit.v[i] > 0.5 ? -::log1p(-miss.v[i]) : -::log(hit.v[i]);
  }
  return miss;
}

// log(1 + x) for 0 <= x <= 1, as x q(x), q a minimax polynomial (relative error 4.7e-9).
LONGTAIL_INLINE Vec<float> log1p(Vec<float> x) {
  const float c[] = {-0x1.a93370p-9f, 0x1.453f22p-6f,  -0x1.d29cecp-5f, 0x1.b2537cp-4f,  -0x1.39756ep-3f,
                     0x1.92f69cp-3f,  -0x1.ff0f88p-3f, 0x1.554c80p-2f,  -0x1.ffffbep-2f, 1.0f};
  Vec<float> q = c[0];
  for (int i = 1; i < 10; ++i) q = q * x + Vec<float>(c[i]);
  return x * q;
}

// The same to degree 21 (relative error 1.5e-18).
LONGTAIL_INLINE Vec<double> log1p(Vec<double> x) {
  const double c[] = {-1.641933803771922e-05, 0.0001975175507541973,
                      -0.001130000178622488,  0.004110066573666255,
                      -0.010744401294427218,  0.02170879351823372,
                      -0.035758958818503134,  0.05028151422238588,
                      -0.06303032831432498,   0.07336884513578268,
                      -0.08210583930641063,   0.09056735768965751,
                      -0.09992438919187194,   0.11109804645871843,
                      -0.12499827631455827,   0.14285697430417085,
                      -0.1666666549373564,    0.1999999994518333,
                      -0.24999999998423855,   0.33333333333309234,
                      -0.49999999999999856,   1.0};
  Vec<double> q = c[0];
  for (int i = 1; i < 22; ++i) q = q * x + Vec<double>(c[i]);
  return x * q;
}

#define LONGTAIL_PER_LANE(function)                                            \
  LONGTAIL_INLINE Vec<double> function(Vec<double> x) {                        \
    for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = ::function(x.v[i]); \
    return x;                                                                  \
  }
LONGTAIL_PER_LANE(tanh)
LONGTAIL_PER_LANE(log)
#undef LONGTAIL_PER_LANE

}  // namespace LONGTAIL_ISA
}  // namespace longtail
