// What the softmax loops over rows and over pixels share.
#pragma once

#include "kernels.h"
#include "simd_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

// What is done to each logit: nothing, a bias, a factor and a bias, what the target's class adds, or any of the
// options.
enum class Effect { none, bias, affine, seesaw, any };

// Of the options of classes and targets: nothing, their scales, or all of them.
enum class Tail { none, scales, all };

inline Tail tail_of(const SoftmaxLossArgs& args) {
  if (args.class_mitigation || args.options.compensation != 0.0) return Tail::all;
  return args.class_scale || args.target_scale ? Tail::scales : Tail::none;
}

inline Effect effect_of(const SoftmaxLossArgs& args) {
  const LossOptions<double>& o = args.options;
  if (o.softcap != 0.0 || o.label_smoothing != 0.0) return Effect::any;
  const bool scales = o.scale != 1.0 || args.class_scale || args.target_scale;
  if (tail_of(args) == Tail::all) {
    return args.class_mitigation && !scales && !args.class_bias ? Effect::seesaw : Effect::any;
  }
  if (scales) return Effect::affine;
  return args.class_bias ? Effect::bias : Effect::none;
}

// s = softcap(scale * z). Copied into each loop's locals: a member of the same type as the output would be read again
// after every store.
template <typename T>
struct Capping {
  T scale, softcap, inverse;

  explicit Capping(const SoftmaxLossArgs& args)
      : scale(static_cast<T>(args.options.scale)),
        softcap(static_cast<T>(args.options.softcap)),
        inverse(static_cast<T>(1.0 / args.options.softcap)) {}

  LONGTAIL_INLINE Vec<T> operator()(Vec<T> z) const {
    const Vec<T> s = z * Vec<T>(scale);
    return softcap == T(0) ? s : Vec<T>(softcap) * ratio(z);
  }

  // tanh of what is capped: s = softcap * ratio and ds/dz = scale * (1 - ratio^2).
  LONGTAIL_INLINE Vec<T> ratio(Vec<T> z) const { return tanh(z * Vec<T>(scale) * Vec<T>(inverse)); }

  // ds/dz
  LONGTAIL_INLINE Vec<T> slope(Vec<T> s) const {
    if (softcap == T(0)) return Vec<T>(scale);
    const Vec<T> y = s * Vec<T>(inverse);
    return Vec<T>(scale) - Vec<T>(scale) * y * y;
  }
};

// What class_scale and target_scale make of the logits of class j. V: T, or a register of it.
template <typename V, typename T>
LONGTAIL_INLINE V factor_of(const T* class_scale, int64_t j, V target_scale) {
  return class_scale ? V(class_scale[j]) * target_scale : target_scale;
}

// What class_mitigation and compensation make of the effective logit x of class j beside a target.
template <typename V, typename T>
LONGTAIL_INLINE V beside(V x, const T* class_mitigation, int64_t j, const TargetTerms<V>& terms, T compensation) {
  const V mitigation = class_mitigation ? mitigated(V(class_mitigation[j]), terms) : V(T(0));
  return x + (mitigation + compensated(x, terms, V(compensation)));
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
