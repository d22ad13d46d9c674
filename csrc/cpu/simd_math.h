// Elementary functions of one register. Accuracy is tested in ULP against float64.
#pragma once

#include "simd.h"

namespace longtail {
namespace LONGTAIL_ISA {

// e^x for x in [-87, 88], at most 1 ULP off (tested); NaN stays NaN, other arguments are the caller's business.
// x = n ln 2 + r; e^r = 1 + r + r^2 q(r), q a minimax polynomial for |r| <= ln(2) / 2 (relative error 3e-9).
LONGTAIL_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec<float> z = x * Vec<float>(1.44269504088896341f) + magic;
  const Vec<float> n = z - magic;
  Vec<float> r = x - n * Vec<float>(0.693359375f);
  r = r - n * Vec<float>(-2.12194440054690583e-4f);
  Vec<float> q = Vec<float>(0x1.6a2448p-10f) * r + Vec<float>(0x1.1239d6p-7f);
  q = q * r + Vec<float>(0x1.5558f2p-5f);
  q = q * r + Vec<float>(0x1.555492p-3f);
  q = q * r + Vec<float>(0x1.fffffcp-2f);
  const Vec<float> p = (q * r * r + r) + Vec<float>(1.0f);
  const auto exponent = ((Vec<float>::Unsigned)z.v << 23) + 0x3f800000;
  return p * Vec<float>((Vec<float>::Value)exponent);  // a multiplication, not an integer add: NaN must survive
}

// e^x for x in [-708, 709]; the same scheme, e^r by its Taylor series to degree 13 (truncation 5e-18 relative).
LONGTAIL_INLINE Vec<double> exp(Vec<double> x) {
  const Vec<double> magic = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> z = x * Vec<double>(1.4426950408889634) + magic;
  const Vec<double> n = z - magic;
  Vec<double> r = x - n * Vec<double>(6.93147180369123816490e-01);
  r = r - n * Vec<double>(1.90821492927058770002e-10);
  const double inverse_factorial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                      1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                      1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
  Vec<double> q = inverse_factorial[0];
  for (int i = 1; i < 12; ++i) q = q * r + Vec<double>(inverse_factorial[i]);
  const Vec<double> p = (q * r * r + r) + Vec<double>(1.0);
  const auto exponent = ((Vec<double>::Unsigned)z.v << 52) + 0x3ff0000000000000;
  return p * Vec<double>((Vec<double>::Value)exponent);
}

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

// x P(x^2) / Q(x^2), a minimax fit of tanh on [0, 9.02] (relative error 2.1e-8); beyond, tanh rounds to 1.
LONGTAIL_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> limit = 9.02f, one = 1.0f;
  const Vec<float> c = minimum(limit, maximum(-limit, x));  // NaN, as the second operand, passes
  const Vec<float> s = c * c;
  Vec<float> p = Vec<float>(1.3319008461603048e-08f) * s + Vec<float>(2.0583435844878837e-05f);
  p = p * s + Vec<float>(0.0034940318775660427f);
  p = p * s + Vec<float>(0.13379715732344968f);
  p = p * s + Vec<float>(0.9999999790274084f);
  Vec<float> q = Vec<float>(7.761993488081781e-07f) * s + Vec<float>(0.00032830883840931406f);
  q = q * s + Vec<float>(0.025871063137131018f);
  q = q * s + Vec<float>(0.46713030976665915f);
  q = q * s + Vec<float>(1.0f);
  return minimum(one, maximum(-one, c * p / q));
}

// log(x) for normal x > 0. x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2/2 + f^3 q(f), q a
// minimax polynomial (relative error 6e-9).
LONGTAIL_INLINE Vec<float> log(Vec<float> x) {
  using Bits = Vec<float>::Bits;
  using Unsigned = Vec<float>::Unsigned;
  const Bits k = (Bits)((Unsigned)x.v - 0x3f3504f3) >> 23;
  const Vec<float> f = Vec<float>((Vec<float>::Value)((Unsigned)x.v - ((Unsigned)k << 23))) - Vec<float>(1.0f);
  const float c[] = {-0.07634496688842773f, 0.1276157647371292f,  -0.13160182535648346f, 0.14201757311820984f,
                     -0.16623356938362122f, 0.20001226663589478f, -0.2500081956386566f,  0.3333333134651184f};
  Vec<float> q = c[0];
  for (int i = 1; i < 8; ++i) q = q * f + Vec<float>(c[i]);
  const Vec<float> n = __builtin_convertvector(k, Vec<float>::Value);
  const Vec<float> square = f * f;
  const Vec<float> low = n * Vec<float>(-2.12194440054690583e-4f) + (square * f * q - Vec<float>(0.5f) * square);
  const Vec<float> y = n * Vec<float>(0.693359375f) + (f + low);
  return select(Mask<float>{x.v == x.v}, y, x);
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
