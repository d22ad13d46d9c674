// The mathematics of one row of the softmax family, shared by every C++ and CUDA kernel.
//
//   logits, target --accumulate--> RowStats --finish--> loss, RowGrad --apply--> dloss/dlogits
//
// Notation of the documentation: u_j effective logits, g the target class, omega_j class weights (1 without weights).
// T is float or double, or a SIMD vector of them that overloads the functions in "Scalar functions" below.
// A file compiled for one instruction set defines LONGTAIL_ISA, so that the linker can never merge its inline
// functions with those of a file compiled for another.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define LONGTAIL_INLINE __host__ __device__ __forceinline__
#else
#define LONGTAIL_INLINE inline __attribute__((always_inline))
#endif

#ifndef LONGTAIL_ISA
#define LONGTAIL_ISA generic
#endif

namespace longtail {

// The numbers of a loss, in the order of the operators' schemas: `number` is a macro that is told each name.
// clang-format off
#define LONGTAIL_LOSS_NUMBERS(number)                                                   \
  number(label_smoothing)           /* epsilon */                                       \
  number(focal_gamma)               /* gamma */                                         \
  number(complement_coefficient)    /* kappa without w_g: complement_gamma / (C - 1) */ \
  number(cross_entropy_coefficient) /* 1, or 0 for complement entropy alone */          \
  number(scale)                     /* logits become softcap(scale * z) */              \
  number(softcap)                   /* 0: off */                                        \
  number(z_loss)                                                                        \
  number(compensation)              /* of the logits above the target's */
// clang-format on

// Plain data, which every instruction set may share. S is a scalar type.
template <typename S>
struct LossOptions {
#define LONGTAIL_FIELD(name) S name;
  LONGTAIL_LOSS_NUMBERS(LONGTAIL_FIELD)
#undef LONGTAIL_FIELD
};

namespace LONGTAIL_ISA {

template <typename To, typename From>
LONGTAIL_INLINE LossOptions<To> convert(const LossOptions<From>& o) {
#define LONGTAIL_CONVERTED(name) static_cast<To>(o.name),
  return {LONGTAIL_LOSS_NUMBERS(LONGTAIL_CONVERTED)};
#undef LONGTAIL_CONVERTED
}

// ---- Scalar functions ----

LONGTAIL_INLINE float exp(float x) { return ::expf(x); }
LONGTAIL_INLINE double exp(double x) { return ::exp(x); }
LONGTAIL_INLINE float log(float x) { return ::logf(x); }
LONGTAIL_INLINE double log(double x) { return ::log(x); }
LONGTAIL_INLINE float log1p(float x) { return ::log1pf(x); }
LONGTAIL_INLINE double log1p(double x) { return ::log1p(x); }
// -log(hit), where hit is 1 - miss to its own last digit: none of those of either is lost.
LONGTAIL_INLINE float minus_log1m(float miss, float hit) { return hit > 0.5f ? -::log1pf(-miss) : -::logf(hit); }
LONGTAIL_INLINE double minus_log1m(double miss, double hit) { return hit > 0.5 ? -::log1p(-miss) : -::log(hit); }
LONGTAIL_INLINE float tanh(float x) { return ::tanhf(x); }
LONGTAIL_INLINE double tanh(double x) { return ::tanh(x); }
LONGTAIL_INLINE float reciprocal(float x) { return 1.0f / x; }
LONGTAIL_INLINE double reciprocal(double x) { return 1.0 / x; }
LONGTAIL_INLINE float minus_absolute(float x) { return -::fabsf(x); }
LONGTAIL_INLINE double minus_absolute(double x) { return -::fabs(x); }
// `condition ? yes : no`, and a maximum that returns `b` when one operand is NaN.
LONGTAIL_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
LONGTAIL_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }
LONGTAIL_INLINE float maximum(float a, float b) { return a > b ? a : b; }
LONGTAIL_INLINE double maximum(double a, double b) { return a > b ? a : b; }

// The smallest normal number.
template <typename T>
struct Smallest;
template <>
struct Smallest<float> {
  static constexpr float kNormal = 1.17549435e-38f;
};
template <>
struct Smallest<double> {
  static constexpr double kNormal = 2.2250738585072014e-308;
};

// Below this, exp(x) is treated as exactly 0; above it, exp(x) is a normal number.
template <typename T>
struct ExpRange;
template <>
struct ExpRange<float> {
  static constexpr float kLowest = -87.0f;
};
template <>
struct ExpRange<double> {
  static constexpr double kLowest = -708.0;
};

// ---- Effective logits: what the class of the target brings to the others ----

// Of a row: target_scale_g, class_mitigation_g, and the target's x_g, 0 in the place of -inf.
template <typename T>
struct TargetTerms {
  T scale, mitigation, reference;
};

// Those that change nothing.
template <typename T>
LONGTAIL_INLINE TargetTerms<T> no_terms() {
  return {T(1), T(-INFINITY), T(INFINITY)};
}

// min(0, class_mitigation_j - class_mitigation_g)
template <typename T>
LONGTAIL_INLINE T mitigated(T mitigation, const TargetTerms<T>& terms) {
  return select(mitigation < terms.mitigation, mitigation - terms.mitigation, T(0));
}

// compensation * max(0, x_j - x_g)
template <typename T>
LONGTAIL_INLINE T compensated(T x, const TargetTerms<T>& terms, T compensation) {
  return compensation * maximum(x - terms.reference, T(0));
}

// ---- Accumulate: five numbers describe a row ----

// m, d, t cover the classes other than the target: 1 - p_g from p_g itself loses every digit on confident rows.
template <typename T>
struct RowStats {
  T m;    // max of u_j
  T d;    // sum of exp(u_j - m)
  T t;    // sum of exp(u_j - m) * (u_j - m), where 0 * -inf is 0
  T u_g;  // the target's effective logit
  T U;    // sum over all classes of omega_j * (u_j - u_g); relative to u_g, so that it survives large common offsets
};

template <typename T>
LONGTAIL_INLINE RowStats<T> empty_stats(T u_g) {
  return {T(-INFINITY), T(0), T(0), u_g, T(0)};
}

// m as a number that can be subtracted: -inf (nothing but -inf seen so far) stands in as 0.
template <typename T>
LONGTAIL_INLINE T finite_max(T m) {
  return select(m == T(-INFINITY), T(0), m);
}

// exp(x) for x <= 0, exactly 0 where it would underflow; x is cut off there, so that 0 * x is 0. NaN stays NaN.
// `lowest` is that limit; a type of its own brings an exponential of its own, which argument-dependent lookup finds.
template <typename T, typename Limit>
LONGTAIL_INLINE T exp_cut(T& x, Limit lowest) {
  const T low = T(lowest);
  const auto underflow = x < low;
  x = select(underflow, low, x);
  return select(underflow, T(0), exp(x));
}

// exp(u - m); `shift` becomes u - m.
template <typename T, typename Limit>
LONGTAIL_INLINE T shifted_exp(T u, T m, T& shift, Limit lowest) {
  shift = u - m;
  return exp_cut(shift, lowest);
}

// Adds one non-target logit (or a vector of them) with u <= s.m.
template <typename T, typename Limit>
LONGTAIL_INLINE void accumulate(RowStats<T>& s, T finite_m, T u, Limit lowest) {
  T shift;
  const T e = shifted_exp(u, finite_m, shift, lowest);
  s.d = s.d + e;
  s.t = s.t + e * shift;
}

// Moves the sums to a new maximum m >= s.m.
template <typename T, typename Limit>
LONGTAIL_INLINE void raise_max(RowStats<T>& s, T m, Limit lowest) {
  T shift;
  const T factor = shifted_exp(s.m, finite_max(m), shift, lowest);
  s.t = factor * (s.t + s.d * shift);
  s.d = factor * s.d;
  s.m = m;
}

// Joins two disjoint pieces of one row. `b` need not know the target; both hold U relative to the same u_g.
template <typename T, typename Limit>
LONGTAIL_INLINE RowStats<T> combine(RowStats<T> a, RowStats<T> b, Limit lowest) {
  const T m = maximum(a.m, b.m);
  raise_max(a, m, lowest);
  raise_max(b, m, lowest);
  return {m, a.d + b.d, a.t + b.t, a.u_g, a.U + b.U};
}

// ---- Finish: the loss and the five coefficients of its gradient ----

// dloss/du_j = exp(u_j - m) * (a + b * (u_j - m)) + S * omega_j for j != g, and `target` for j == g.
// This is the documented A, B, S, T form with the division by d and the centring by H folded in: no cancellation
// between A and B * (u_j - l), and one multiply-add per element.
template <typename T>
struct RowGrad {
  T m, a, b, S, target;
};

template <typename T>
struct RowLoss {
  T loss;
  RowGrad<T> grad;
};

// log(1 + x) of x >= 0, given 1 / (1 + x): what rounding took from the sum is put back.
template <typename T>
LONGTAIL_INLINE T log1p(T x, T inverse) {
  const T sum = T(1) + x;
  return log(sum) + (x - (sum - T(1))) * inverse;
}

// Scalar is the type under T; Options: LossOptions, or some of them as constants. smooth: label_smoothing / C;
// weight_sum: Omega, the sum of omega_j; w_g: the class weight of the target; v: the sample weight.
template <typename T, typename Options, typename Scalar>
LONGTAIL_INLINE RowLoss<T> finish(const RowStats<T>& s, const Options& o, Scalar smooth, Scalar weight_sum, T w_g,
                                  T v) {
  constexpr Scalar kLowest = ExpRange<Scalar>::kLowest;
  const T zero = T(0), one = T(1);
  const auto alone = s.d == zero;  // no other class has any mass: p_g = 1, H = 0
  const T d = select(alone, one, s.d), inverse_d = select(alone, zero, reciprocal(d));
  // How far the target is behind m; a target at +inf has no probability (inf - inf), as in torch.
  const T lag = select(s.u_g == T(INFINITY), s.u_g - s.u_g, s.m - s.u_g);
  const auto behind = zero < lag;
  T distance = minus_absolute(lag);
  const T e = exp_cut(distance, kLowest);
  // In units of the larger of exp(m) and exp(u_g) the row sums to 1 + rest: p_g and 1 - p_g both keep all digits.
  const T rest = select(behind, (s.d - one) + e, s.d * e);
  const T inverse = reciprocal(one + rest), tail = log1p(rest, inverse);
  const T nll = maximum(zero, lag) + tail;
  const T unit = select(behind, one, e) * inverse;  // p_j = unit * exp(u_j - m)
  const T p = select(behind, e, one) * inverse, miss = s.d * unit;

  const T kept = T(Scalar(1) - o.label_smoothing) * w_g;
  const bool focusing = o.focal_gamma != Scalar(0);
  T vF = v * T(o.cross_entropy_coefficient);
  if (o.focal_gamma == Scalar(2)) {
    vF = vF * (miss * miss);
  } else if (focusing) {
    const auto tiny = lag < T(-16);  // 1 - p_g may be no normal number; its logarithm is one
    T log_focal = T(o.focal_gamma) * (select(tiny, lag, zero) + log(select(tiny, d * inverse, miss)));
    vF = vF * exp_cut(log_focal, kLowest);
  }
  // An option that is off is left out, not multiplied by 0: weights may be infinite, or NaN.
  T ce = kept * nll, by_nll = kept, by_target = -kept * miss;  // CE and its derivatives by l and by u_g
  T S = zero;
  if (o.label_smoothing != Scalar(0)) {
    const T share = T(smooth), total = T(weight_sum);
    ce = ce + share * (total * nll - s.U);
    by_nll = by_nll + share * total;
    by_target = share * (total * p - w_g) + by_target;
    S = -vF * share;
  }
  T loss = vF * ce, a = vF * by_nll * unit, target = vF * by_target, b = zero;
  if (focusing) {
    // Derivative of the focal factor times CE; p * CE tends to 0 with p.
    const T focal_term = T(o.focal_gamma) * vF * select(p == zero, zero, p * ce);
    a = a + focal_term * inverse_d;
    target = target - focal_term;
  }
  // Complement entropy alone, which the target's logit has no part in: an infinite one neither, but NaN shows.
  if (o.cross_entropy_coefficient == Scalar(0)) loss = a = target = select(s.u_g == s.u_g, zero * s.d, s.u_g);
  if (o.z_loss != Scalar(0)) {
    const T lse = maximum(s.u_g, s.m) + tail;  // u_g + nll has no digits left where l is far above u_g
    const T z_term = T(Scalar(2) * o.z_loss) * lse;
    loss = loss + T(o.z_loss) * lse * lse;
    a = a + z_term * unit;
    target = target + z_term * p;
  }
  if (o.complement_coefficient != Scalar(0)) {
    const T kappa = v * T(o.complement_coefficient) * w_g, mean_shift = s.t * inverse_d;
    loss = loss + kappa * (log(d) - mean_shift);
    b = -kappa * inverse_d;
    a = a - b * mean_shift;
  }
  return {loss, {finite_max(s.m), a, b, S, target}};
}

// ---- Apply: the gradient of one element ----

// b and S stay 0 where their options are off, whatever the upstream gradient.
template <typename T>
LONGTAIL_INLINE void scale_grad(RowGrad<T>& g, T upstream) {
  g.a = g.a * upstream;
  g.b = select(g.b == T(0), g.b, g.b * upstream);
  g.S = select(g.S == T(0), g.S, g.S * upstream);
  g.target = g.target * upstream;
}

// dloss/du_j of a non-target class; the caller adds S * omega_j when there is label smoothing.
template <typename T, typename Limit>
LONGTAIL_INLINE T apply(const RowGrad<T>& g, T u, Limit lowest) {
  T shift;
  const T e = shifted_exp(u, g.m, shift, lowest);
  return e * (g.a + g.b * shift);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
