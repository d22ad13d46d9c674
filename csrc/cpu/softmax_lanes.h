// One register of rows of few classes, one lane each: its statistics and its gradient.
//
// Reads each logit once. What is off costs nothing in the loops of the kinds of loss that most training runs use.
#pragma once

#include <type_traits>

#include "capping.h"
#include "kernels.h"

namespace longtail {
namespace LONGTAIL_ISA {

constexpr int64_t kFewClasses = 64;

// Numbers of class c and lane k at p[c * stride + k].
template <typename Element>
struct Columns {
  Element* p;
  int64_t stride;
  LONGTAIL_INLINE Element* at(int64_t c, int64_t k) const { return p + c * stride + k; }
};

// The loops there are: plain and focal cross-entropy of the logits themselves, any loss of logits that are at most
// biased, and everything.
enum class Kind { plain, focal, biased, any };

inline Kind kind_of(const SoftmaxLossArgs& args) {
  const LossOptions<double>& o = args.options;
  const Effect effect = effect_of(args);
  if (effect == Effect::any) return Kind::any;
  const bool alone = o.cross_entropy_coefficient == 1.0 && o.complement_coefficient == 0.0 && o.z_loss == 0.0;
  if (effect == Effect::bias || args.class_margin || args.entropy || !alone) return Kind::biased;
  return o.focal_gamma == 0.0 ? Kind::plain : Kind::focal;
}

// What `finish` is told: as constants where the kind settles it.
template <Kind kKind, typename T>
struct OptionsOf : LossOptions<T> {
  explicit OptionsOf(const SoftmaxLossArgs& args) : LossOptions<T>(convert<T>(args.options)) {}
};
template <typename T>
struct CrossEntropyAlone {
  static constexpr T label_smoothing = 0, complement_coefficient = 0, cross_entropy_coefficient = 1, z_loss = 0;
};
template <typename T>
struct OptionsOf<Kind::plain, T> : CrossEntropyAlone<T> {
  static constexpr T focal_gamma = 0;
  explicit OptionsOf(const SoftmaxLossArgs&) {}
};
template <typename T>
struct OptionsOf<Kind::focal, T> : CrossEntropyAlone<T> {
  const T focal_gamma;
  explicit OptionsOf(const SoftmaxLossArgs& args) : focal_gamma(static_cast<T>(args.options.focal_gamma)) {}
};

// Copied into each loop's locals, as Capping is.
template <Kind kKind, typename T>
class SoftmaxLanes {
 public:
  using V = Vec<T>;
  using Classes = typename V::Bits;  // the lanes' targets; -1 where ignored

  // What is kept between the sums and the gradient, class by class.
  struct Kept {
    T exponentials[kFewClasses * V::kLanes];
    T shifts[kKind < Kind::biased ? 1 : kFewClasses * V::kLanes];
    T capped[kKind < Kind::any ? 1 : kFewClasses * V::kLanes];
  };

  explicit SoftmaxLanes(const SoftmaxLossArgs& args)
      : capping_(args),
        options_(args),
        weight_(static_cast<const T*>(args.weight)),
        bias_(static_cast<const T*>(args.class_bias)),
        classes_(args.num_classes),
        smooth_(static_cast<T>(args.options.label_smoothing) / static_cast<T>(args.num_classes)),
        weight_sum_(static_cast<T>(args.weight_sum)),
        margins_(args.class_margin != nullptr),
        entropy_(args.entropy || args.options.complement_coefficient != 0.0) {}

  static LONGTAIL_INLINE Mask<T> is_class(Classes target, Classes c) { return {target == c}; }

  // Of the lanes from k on; `weight` and `margin`: of their targets.
  template <typename Element>
  LONGTAIL_INLINE RowStats<V> stats_of(const Columns<Element> z, int64_t k, Classes target, V weight, V margin,
                                       Kept& kept) const {
    RowStats<V> stats = empty_stats(V(T(0)));
    Classes number = {};
    for (int64_t c = 0; c < classes_; ++c) {
      if (!std::is_same<Element, T>()) __builtin_prefetch(z.at(c, k) + kAhead);
      const V u = effective(load(z.at(c, k)), c, kept);
      const Mask<T> is_target = is_class(target, number);
      stats.u_g = select(is_target, u, stats.u_g);
      const V other = select(is_target, V(T(-INFINITY)), u);
      stats.m = maximum(stats.m, other);
      store(kept.exponentials + c * V::kLanes, other);
      number = number + 1;
    }
    if (kKind >= Kind::biased && margins_) stats.u_g = stats.u_g - margin;
    if (smooths()) stats.U = deviation(finite_max(stats.u_g), weight, margin, kept);
    add_others(stats, kept);
    return stats;
  }

  LONGTAIL_INLINE RowLoss<V> loss_of(const RowStats<V>& stats, V weight, V sample_weight) const {
    return finish(stats, options_, smooth_, weight_sum_, weight, sample_weight);
  }

  // May be written over the logits.
  template <typename Element>
  LONGTAIL_INLINE void write_grad(const RowGrad<V>& row, int64_t k, Classes target, const Kept& kept,
                                  const Columns<Element> grad) const {
    const bool complement = kKind >= Kind::biased && options_.complement_coefficient != T(0);
    Classes number = {};
    for (int64_t c = 0; c < classes_; ++c) {
      const int64_t at = c * V::kLanes;
      V du = load(kept.exponentials + at) * (complement ? row.a + row.b * load(kept.shifts + at) : row.a);
      if (smooths()) du = du + row.S * omega(c);
      du = select(is_class(target, number), row.target, du);
      if (kKind == Kind::any) du = du * capping_.slope(load(kept.capped + at));
      store(grad.at(c, k), du);
      number = number + 1;
    }
  }

  template <typename Element>
  LONGTAIL_INLINE void clear_ignored(int64_t k, Classes target, const Columns<Element> grad) const {
    const auto ignored = is_class(target, Classes{} - 1);
    for (int64_t c = 0; c < classes_; ++c) store(grad.at(c, k), select(ignored, V(T(0)), load(grad.at(c, k))));
  }

 private:
  static constexpr int64_t kAhead = 256;  // lanes that memory works on while these are computed

  LONGTAIL_INLINE bool smooths() const { return kKind == Kind::any && options_.label_smoothing != T(0); }
  LONGTAIL_INLINE V omega(int64_t c) const { return weight_ ? V(weight_[c]) : V(T(1)); }

  // Without any margin.
  LONGTAIL_INLINE V effective(V z, int64_t c, Kept& kept) const {
    if (kKind == Kind::any) {
      z = capping_(z);
      store(kept.capped + c * V::kLanes, z);
    }
    return kKind >= Kind::biased && bias_ ? z + V(bias_[c]) : z;
  }

  // d and t of m; `kept` holds the other classes' effective logits.
  LONGTAIL_INLINE void add_others(RowStats<V>& stats, Kept& kept) const {
    const V m = finite_max(stats.m);
    for (int64_t c = 0; c < classes_; ++c) {
      T* const at = kept.exponentials + c * V::kLanes;
      V shift = load(at) - m;
      const V e = exp_cut(shift, T(0));
      stats.d = stats.d + e;
      if (kKind >= Kind::biased && entropy_) {
        stats.t = stats.t + e * shift;
        store(kept.shifts + c * V::kLanes, shift);
      }
      store(at, e);
    }
  }

  // U
  LONGTAIL_INLINE V deviation(V reference, V weight, V margin, const Kept& kept) const {
    V U = T(0);
    for (int64_t c = 0; c < classes_; ++c) {
      const V s = load(kept.capped + c * V::kLanes);
      U = U + omega(c) * ((bias_ ? s + V(bias_[c]) : s) - reference);
    }
    return margins_ ? U - weight * margin : U;
  }

  const Capping<T> capping_;
  const OptionsOf<kKind, T> options_;
  const T* const weight_;
  const T* const bias_;
  const int64_t classes_;
  const T smooth_, weight_sum_;
  const bool margins_, entropy_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
