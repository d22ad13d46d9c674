// The arithmetic of a tile of few classes: a register of rows at a time, one lane each, reads each logit once and
// writes each gradient once. What is off costs nothing in plain and in focal cross-entropy.
#pragma once

#include <type_traits>

#include "capping.h"
#include "kernels.h"
#include "transpose.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Losses that have loops of their own: cross-entropy and focal loss of the logits themselves.
enum class Kind { plain, focal, any };

inline Kind kind_of(const SoftmaxLossArgs& args) {
  const LossOptions<double>& o = args.options;
  const bool alone = o.cross_entropy_coefficient == 1.0 && o.complement_coefficient == 0.0 && o.z_loss == 0.0;
  if (!alone || args.entropy || args.class_margin || effect_of(args) != Effect::none) return Kind::any;
  return o.focal_gamma == 0.0 ? Kind::plain : Kind::focal;
}

// What `finish` is told: constants, as far as the kind settles it.
template <Kind kKind, typename T>
struct OptionsOf : LossOptions<T> {
  explicit OptionsOf(const SoftmaxLossArgs& args) : LossOptions<T>(convert<T>(args.options)) {}
};
template <typename T>
struct CrossEntropyAlone {
  static constexpr T label_smoothing = 0, complement_coefficient = 0, cross_entropy_coefficient = 1, z_loss = 0,
                     compensation = 0;
};
template <typename T>
struct OptionsOf<Kind::plain, T> : CrossEntropyAlone<T> {
  static constexpr T focal_gamma = 0;
  explicit OptionsOf(const SoftmaxLossArgs&) {}
};
template <typename T>
struct OptionsOf<Kind::focal, T> : CrossEntropyAlone<T> {
  T focal_gamma;
  explicit OptionsOf(const SoftmaxLossArgs& args) : focal_gamma(static_cast<T>(args.options.focal_gamma)) {}
};

// Numbers of class c and lane k at p[c * stride + k].
template <typename Element>
struct Columns {
  Element* p;
  int64_t stride;
  LONGTAIL_INLINE Element* at(int64_t c, int64_t k) const { return p + c * stride + k; }
};

// Rows or pixels that follow one another; the lanes up to a whole register count as ignored.
template <typename T>
struct Tile {
  using Class = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr int64_t kWidest = kMostRows;
  static constexpr int64_t kNumbers = 16384 / sizeof(T);  // a third of a first-level cache

  int64_t row, count;
  bool any_ignored;
  Class target[kWidest];  // -1 where ignored
  T weight[kWidest], margin[kWidest];
  T stats[5 * kWidest];  // RowStats, column by column
  T numbers[kNumbers];   // logits, and then their gradient, column by column
};

// Where its columns lie; the gradient may take the place of the logits.
template <typename Element, typename T>
struct Places {
  Columns<const Element> z;
  Columns<Element> grad;
  Columns<T> stats;  // or null, where nobody reads them
};

template <Kind kKind, typename T>
class SoftmaxLanes {
 public:
  explicit SoftmaxLanes(const SoftmaxLossArgs& args)
      : capping_(args),
        options_(args),
        weight_(static_cast<const T*>(args.weight)),
        bias_(static_cast<const T*>(args.class_bias)),
        sample_weight_(static_cast<const T*>(args.sample_weight)),
        class_scale_(static_cast<const T*>(args.class_scale)),
        target_scale_(static_cast<const T*>(args.target_scale)),
        mitigation_(static_cast<const T*>(args.class_mitigation)),
        grad_loss_(static_cast<const T*>(args.grad_loss)),
        loss_(static_cast<T*>(args.loss)),
        grad_loss_stride_(args.grad_loss_stride),
        classes_(args.num_classes),
        smooth_(static_cast<T>(args.options.label_smoothing) / static_cast<T>(args.num_classes)),
        weight_sum_(static_cast<T>(args.weight_sum)),
        caps_(args.options.scale != 1.0 || args.options.softcap != 0.0),
        margins_(args.class_margin != nullptr),
        tail_(tail_of(args)),
        entropy_(args.entropy || args.options.complement_coefficient != 0.0) {}

  // Not inline: storage types share it.
  template <Pass kPass, typename Element>
  __attribute__((noinline)) void run(const Tile<T>& tile, const Places<Element, T>& given) const {
    const SoftmaxLanes lanes = *this;  // out of reach of what is written
    const Places<Element, T> places = given;
    const int64_t row = tile.row, count = tile.count;
    const bool any_ignored = tile.any_ignored;
    const V zero = T(0), one = T(1);
    Kept kept;
    for (int64_t k = 0; k < count; k += kLanes) {
      Classes target;
      memcpy(&target, tile.target + k, sizeof(target));
      const V weight = lanes.weight_ ? load(tile.weight + k) : one;
      const TargetTerms<V> terms = lanes.terms_of(places.z, k, target);
      const RowStats<V> stats = lanes.stats_of(places.z, k, target, terms, tile.margin + k, kept);
      const V v = lanes.sample_weight_ ? load_some(lanes.sample_weight_ + row + k, count - k) : one;
      RowLoss<V> result = finish(stats, lanes.options_, lanes.smooth_, lanes.weight_sum_, weight, v);
      if (kPass != Pass::backward) {
        const auto ignored = is_class(target, Classes{} - 1);
        store_some(lanes.loss_ + row + k, select(ignored, zero, result.loss), count - k);
        const V columns[] = {stats.m, stats.d, stats.t, stats.u_g, stats.U};
        for (int c = 0; places.stats.p && c < 5; ++c) store(places.stats.at(c, k), select(ignored, zero, columns[c]));
      }
      if (kPass == Pass::loss) continue;
      scale_grad(result.grad, lanes.upstream(row + k, count - k));
      lanes.write_grad(result.grad, k, target, terms.scale, kept, places.grad);
      if (any_ignored) lanes.clear_ignored(k, target, places.grad);
    }
  }

 private:
  using V = Vec<T>;
  using Classes = typename V::Bits;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kAny = kKind == Kind::any;
  // Lanes that memory works on while these are computed: more classes than the processor follows by itself.
  static constexpr int64_t kReadAhead = 64, kWriteAhead = 32;

  // What is kept between the sums and the gradient, class by class.
  struct Kept {
    T exponentials[kFewClasses * kLanes];
    T shifts[kAny ? kFewClasses * kLanes : 1];
    T ratios[kAny ? kFewClasses * kLanes : 1];  // softcap's tanh
  };

  static LONGTAIL_INLINE Mask<T> is_class(Classes target, Classes c) { return {target == c}; }

  LONGTAIL_INLINE bool smooths() const { return kAny && options_.label_smoothing != T(0); }
  LONGTAIL_INLINE V omega(int64_t c) const { return weight_ ? V(weight_[c]) : V(T(1)); }

  LONGTAIL_INLINE bool softens() const { return kAny && capping_.softcap != T(0); }
  LONGTAIL_INLINE bool scales() const { return kAny && tail_ != Tail::none; }
  LONGTAIL_INLINE bool raises() const { return kAny && tail_ == Tail::all; }

  // What the class of each lane's target brings; nothing where it is ignored.
  template <typename Element>
  LONGTAIL_INLINE TargetTerms<V> terms_of(const Columns<Element> z, int64_t k, Classes target) const {
    TargetTerms<V> terms = no_terms<V>();
    if (!scales()) return terms;
    const bool compensates = options_.compensation != T(0);
    V logit = T(0), scale = T(1), bias = T(0);  // of the target
    Classes number = {};
    for (int64_t c = 0; c < classes_; ++c) {
      const Mask<T> is_target = is_class(target, number);
      if (target_scale_) terms.scale = select(is_target, V(target_scale_[c]), terms.scale);
      if (mitigation_) terms.mitigation = select(is_target, V(mitigation_[c]), terms.mitigation);
      if (compensates) logit = select(is_target, load(z.at(c, k)), logit);
      if (compensates && class_scale_) scale = select(is_target, V(class_scale_[c]), scale);
      if (compensates && bias_) bias = select(is_target, V(bias_[c]), bias);
      number = number + 1;
    }
    if (compensates) terms.reference = finite_max(capping_(logit) * (scale * terms.scale) + bias);
    return terms;
  }

  template <typename Element>
  LONGTAIL_INLINE RowStats<V> stats_of(const Columns<Element> z, int64_t k, Classes target, const TargetTerms<V>& terms,
                                       const T* margin, Kept& kept) const {
    RowStats<V> stats = empty_stats(V(T(0)));
    Classes number = {};
    for (int64_t c = 0; c < classes_; ++c) {
      __builtin_prefetch(z.at(c, k) + kReadAhead);
      const V x = shared(load(z.at(c, k)), c, terms.scale, kept);
      const Mask<T> is_target = is_class(target, number);
      stats.u_g = select(is_target, x, stats.u_g);
      const V raised = raises() ? beside(x, mitigation_, c, terms, T(options_.compensation)) : x;
      const V other = select(is_target, V(T(-INFINITY)), raised);
      stats.m = maximum(stats.m, other);
      store(kept.exponentials + c * kLanes, other);
      number = number + 1;
    }
    if (kAny && margins_) stats.u_g = stats.u_g - load(margin);
    if (smooths()) stats.U = deviation(finite_max(stats.u_g), target, kept);
    add_others(stats, kept);
    return stats;
  }

  // The effective logit of class c but for what the target adds, or of the target but for its margin.
  LONGTAIL_INLINE V shared(V z, int64_t c, V target_scale, Kept& kept) const {
    if (!kAny) return z;
    if (caps_) {
      const V x = softens() ? capping_.ratio(z) : z;
      store(kept.ratios + c * kLanes, x);
      z = x * V(softens() ? capping_.softcap : capping_.scale);
    }
    if (scales()) z = z * factor_of(class_scale_, c, target_scale);
    return bias_ ? z + V(bias_[c]) : z;
  }

  // d and t; `kept` holds the other classes' effective logits.
  LONGTAIL_INLINE void add_others(RowStats<V>& stats, Kept& kept) const {
    const V m = finite_max(stats.m);
    for (int64_t c = 0; c < classes_; ++c) {
      T* const at = kept.exponentials + c * kLanes;
      V shift = load(at) - m;
      const V e = exp_cut(shift, T(0));
      stats.d = stats.d + e;
      if (kAny && entropy_) {
        stats.t = stats.t + e * shift;
        store(kept.shifts + c * kLanes, shift);
      }
      store(at, e);
    }
  }

  // U; `kept` holds the other classes' effective logits.
  LONGTAIL_INLINE V deviation(V reference, Classes target, const Kept& kept) const {
    V U = T(0);
    Classes number = {};
    for (int64_t c = 0; c < classes_; ++c) {
      const V share = omega(c) * (load(kept.exponentials + c * kLanes) - reference);
      U = select(is_class(target, number), U, U + share);
      number = number + 1;
    }
    return U;
  }

  LONGTAIL_INLINE V upstream(int64_t row, int64_t left) const {
    if (grad_loss_stride_ == 0) return V(*grad_loss_);
    if (grad_loss_stride_ == 1) return load_some(grad_loss_ + row, left);
    T numbers[kLanes] = {};
    for (int64_t i = 0; i < kLanes && i < left; ++i) numbers[i] = grad_loss_[(row + i) * grad_loss_stride_];
    return load(numbers);
  }

  template <typename Element>
  LONGTAIL_INLINE void write_grad(const RowGrad<V>& row, int64_t k, Classes target, V target_scale, const Kept& kept,
                                  const Columns<Element> grad) const {
    const bool complement = kAny && options_.complement_coefficient != T(0);
    Classes number = {};
    for (int64_t c = 0; c < classes_; ++c) {
      const int64_t at = c * kLanes;
      __builtin_prefetch(grad.at(c, k) + kWriteAhead, 1);
      V du = load(kept.exponentials + at) * (complement ? row.a + row.b * load(kept.shifts + at) : row.a);
      if (smooths()) du = du + row.S * omega(c);
      du = select(is_class(target, number), row.target, du);
      if (kAny && caps_) du = du * V(capping_.scale);
      if (softens()) {
        const V x = load(kept.ratios + at);
        du = du - du * (x * x);
      }
      if (scales()) du = du * factor_of(class_scale_, c, target_scale);
      store(grad.at(c, k), du);
      number = number + 1;
    }
  }

  template <typename Element>
  LONGTAIL_INLINE void clear_ignored(int64_t k, Classes target, const Columns<Element> grad) const {
    const auto ignored = is_class(target, Classes{} - 1);
    for (int64_t c = 0; c < classes_; ++c) store(grad.at(c, k), select(ignored, V(T(0)), load(grad.at(c, k))));
  }

  Capping<T> capping_;
  OptionsOf<kKind, T> options_;
  const T* weight_;
  const T* bias_;
  const T* sample_weight_;
  const T* class_scale_;
  const T* target_scale_;
  const T* mitigation_;
  const T* grad_loss_;
  T* loss_;
  int64_t grad_loss_stride_, classes_;
  T smooth_, weight_sum_;
  bool caps_, margins_;
  Tail tail_;
  bool entropy_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
