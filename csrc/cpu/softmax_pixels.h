// The softmax family over images [N, C, P] of contiguous pixels, written once and compiled once per instruction set.
//
// One lane per pixel; the classes are walked with their stride, eight at a time, over stretches of up to 256 pixels.
// Reads each logit once and writes each gradient once; loss_and_grad keeps a stretch's logits in `scratch` in between.
#pragma once

#include "capping.h"
#include "kernels.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class SoftmaxPixels {
 public:
  SoftmaxPixels(const SoftmaxLossArgs& args, Pass pass, T* scratch)
      : args_(args),
        pass_(pass),
        scratch_(scratch),
        weight_(static_cast<const T*>(args.weight)),
        bias_(static_cast<const T*>(args.class_bias)),
        margin_(static_cast<const T*>(args.class_margin)),
        class_scale_(static_cast<const T*>(args.class_scale)),
        target_scale_(static_cast<const T*>(args.target_scale)),
        mitigation_(static_cast<const T*>(args.class_mitigation)),
        tail_(tail_of(args)),
        capping_(args),
        options_(convert<T>(args.options)),
        smooth_(static_cast<T>(args.options.label_smoothing) / static_cast<T>(args.num_classes)),
        weight_sum_(static_cast<T>(args.weight_sum)) {}

  int64_t run(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t p = begin % args_.pixels;
      int64_t n = args_.pixels - p < end - begin ? args_.pixels - p : end - begin;
      if (n > args_.stretch) n = args_.stretch;
      const int64_t bad = run_stretch(begin / args_.pixels, p, n);
      if (bad >= 0) return bad;
      begin += n;
    }
    return -1;
  }

 private:
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kStretch = kLongestStretch;
  static constexpr int64_t kClasses = 8;         // read side by side: as many streams as a prefetcher follows
  static constexpr int64_t kSummedApart = 1024;  // classes in one running sum
  static constexpr T kLowest = ExpRange<T>::kLowest;

  struct Stretch {
    int64_t image, pixel, row, count;
    bool any_ignored = false;
    T target[kStretch];  // as a number to compare classes with; -1 where ignored
    T weight[kStretch], margin[kStretch], sample_weight[kStretch];
    T m[kStretch], d[kStretch], t[kStretch], u_g[kStretch], U[kStretch];
    T scale[kStretch], mitigation[kStretch], reference[kStretch];  // TargetTerms

    LONGTAIL_INLINE TargetTerms<V> terms(int64_t k) const {
      return {load(scale + k), load(mitigation + k), load(reference + k)};
    }
  };

  int64_t run_stretch(int64_t image, int64_t pixel, int64_t n) {
    Stretch s;
    s.image = image;
    s.pixel = pixel;
    s.row = image * args_.pixels + pixel;
    s.count = n;
    const int64_t bad = read_targets(s);
    if (bad >= 0) return bad;
    if (pass_ == Pass::backward) {
      read_stats(s);
    } else {
      for (int64_t j = 0; j < args_.num_classes; j += kSummedApart) {
        accumulate_classes(s, j, args_.num_classes - j < kSummedApart ? args_.num_classes : j + kSummedApart);
      }
    }
    finish_stretch(s);
    if (pass_ != Pass::loss) write_grad(s);
    return -1;
  }

  static LONGTAIL_INLINE T scalar(const T* p) { return *p; }
  template <typename Narrow>
  static LONGTAIL_INLINE T scalar(const Narrow* p) {
    return load_some(p, 1).v[0];
  }

  const Z* logits(const Stretch& s, int64_t j) const {
    return static_cast<const Z*>(args_.logits) + s.image * args_.logits_stride + j * args_.logits_class_stride +
           s.pixel;
  }

  // Returns the first row whose target is out of bounds, or -1. Lanes beyond the last pixel count as ignored.
  int64_t read_targets(Stretch& s) {
    const int64_t padded = (s.count + kLanes - 1) / kLanes * kLanes;
    for (int64_t k = 0; k < padded; ++k) {
      const int64_t g = k < s.count ? args_.target[(s.row + k) * args_.target_stride] : args_.ignore_index;
      const bool ignored = g == args_.ignore_index;
      if (!ignored && (g < 0 || g >= args_.num_classes)) return s.row + k;
      s.any_ignored |= ignored && k < s.count;
      s.target[k] = ignored ? T(-1) : static_cast<T>(g);
      s.weight[k] = weight_ && !ignored ? weight_[g] : T(1);
      s.margin[k] = margin_ && !ignored ? margin_[g] : T(0);
      s.sample_weight[k] =
          args_.sample_weight && !ignored ? static_cast<const T*>(args_.sample_weight)[s.row + k] : T(1);
      s.u_g[k] = ignored ? T(0) : scalar(logits(s, g) + k);
      s.m[k] = -INFINITY;
      s.d[k] = s.t[k] = s.U[k] = T(0);
    }
    for (int64_t k = 0; k < padded; k += kLanes) set_effective(s, k);
    return -1;
  }

  // Of the target's class of each lane, or `otherwise`.
  LONGTAIL_INLINE V of_targets(const T* numbers, const Stretch& s, int64_t k, T otherwise) const {
    T found[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      found[i] = s.target[k + i] < T(0) ? otherwise : numbers[static_cast<int64_t>(s.target[k + i])];
    }
    return load(found);
  }

  // The targets' effective logits from their logits, and what their classes bring to the others.
  void set_effective(Stretch& s, int64_t k) const {
    TargetTerms<V> terms = no_terms<V>();
    if (target_scale_) terms.scale = of_targets(target_scale_, s, k, T(1));
    if (mitigation_) terms.mitigation = of_targets(mitigation_, s, k, T(-INFINITY));
    V u = capping_(load(s.u_g + k)) * terms.scale;
    if (class_scale_) u = u * of_targets(class_scale_, s, k, T(1));
    if (bias_) u = u + of_targets(bias_, s, k, T(0));
    if (options_.compensation != T(0)) terms.reference = finite_max(u);
    store(s.scale + k, terms.scale);
    store(s.mitigation + k, terms.mitigation);
    store(s.reference + k, terms.reference);
    store(s.u_g + k, margin_ ? u - load(s.margin + k) : u);
  }

  void read_stats(Stretch& s) const {
    T* const columns[] = {s.m, s.d, s.t, s.u_g, s.U};
    for (int c = 0; c < 5; ++c) {
      const T* stats = static_cast<const T*>(args_.stats) + s.row * args_.stats_stride + c * args_.stats_column_stride;
      for (int64_t k = 0; k < s.count; ++k) columns[c][k] = stats[k * args_.stats_stride];
    }
  }

  // Classes [begin, end) of all pixels, summed apart and then joined with what is there.
  void accumulate_classes(Stretch& s, int64_t begin, int64_t end) {
    T m[kStretch], d[kStretch], t[kStretch], U[kStretch];
    for (int64_t k = 0; k < s.count; k += kLanes) {
      store(m + k, V(T(-INFINITY)));
      store(d + k, V(T(0)));
      store(t + k, V(T(0)));
      store(U + k, V(T(0)));
    }
    for (int64_t j = begin; j < end; j += kClasses) {
      for (int64_t k = 0; k < s.count; k += kLanes) {
        const V u_g = load(s.u_g + k);
        RowStats<V> sums = {load(m + k), load(d + k), load(t + k), u_g, load(U + k)};
        if (end - j >= kClasses) {
          accumulate_lanes(s, j, k, std::integral_constant<int, kClasses>(), sums);
        } else {
          accumulate_lanes(s, j, k, static_cast<int>(end - j), sums);
        }
        store(m + k, sums.m);
        store(d + k, sums.d);
        store(t + k, sums.t);
        store(U + k, sums.U);
      }
    }
    for (int64_t k = 0; k < s.count; k += kLanes) {
      const V u_g = load(s.u_g + k);
      const RowStats<V> old = {load(s.m + k), load(s.d + k), load(s.t + k), u_g, load(s.U + k)};
      const RowStats<V> sums = combine(old, {load(m + k), load(d + k), load(t + k), u_g, load(U + k)}, kLowest);
      store(s.m + k, sums.m);
      store(s.d + k, sums.d);
      store(s.t + k, sums.t);
      store(s.U + k, sums.U);
    }
  }

  // The effective logit of class j beside a target, from what softcap makes of its logit.
  LONGTAIL_INLINE V effective(V x, int64_t j, const TargetTerms<V>& terms) const {
    if (tail_ != Tail::none) x = x * factor_of(class_scale_, j, terms.scale);
    if (bias_) x = x + V(bias_[j]);
    return tail_ == Tail::all ? beside(x, mitigation_, j, terms, options_.compensation) : x;
  }

  // Classes [j, j + count), at most kClasses, of one register of pixels.
  template <typename Count>
  LONGTAIL_INLINE void accumulate_lanes(const Stretch& s, int64_t j, int64_t k, Count count, RowStats<V>& sums) {
    const Capping<T> capped = capping_;
    const bool smoothing = options_.label_smoothing != T(0);
    const V g = load(s.target + k), reference = finite_max(sums.u_g), excluded = T(-INFINITY);
    const int64_t left = s.count - k;
    const TargetTerms<V> terms = s.terms(k);
    V u[kClasses], largest = excluded;
    for (int c = 0; c < count; ++c) {
      const Z* z = logits(s, j + c) + k;
      __builtin_prefetch(z + kClasses * args_.logits_class_stride);  // no hardware follows eight strided streams
      V x = capped(load_some(z, left));
      if (scratch_) store(scratch_ + (j + c) * args_.stretch + k, x);
      x = effective(x, j + c, terms);
      const Mask<T> is_target = g == V(T(j + c));
      if (smoothing) {
        const V share = (weight_ ? V(weight_[j + c]) : V(T(1))) * (x - reference);
        sums.U = select(is_target, sums.U, sums.U + share);
      }
      u[c] = select(is_target, excluded, x);
      largest = maximum(largest, u[c]);
    }
    raise_max(sums, select(sums.m < largest, largest, sums.m), kLowest);
    const V finite_m = finite_max(sums.m);
    for (int c = 0; c < count; ++c) accumulate(sums, finite_m, u[c], kLowest);
  }

  // Writes losses and stats; then m, d, t, u_g, U make way for the coefficients m, a, b, S, target of the gradient.
  void finish_stretch(Stretch& s) {
    const V zero = T(0);
    for (int64_t k = 0; k < s.count; k += kLanes) {
      const int64_t left = s.count - k;
      const V weight = load(s.weight + k);
      const RowStats<V> stats = {load(s.m + k), load(s.d + k), load(s.t + k), load(s.u_g + k), load(s.U + k)};
      RowLoss<V> rows = finish(stats, options_, smooth_, weight_sum_, weight, load(s.sample_weight + k));
      if (pass_ != Pass::backward) {
        const auto counted = V(T(-1)) < load(s.target + k);
        store_some(static_cast<T*>(args_.loss) + s.row + k, select(counted, rows.loss, zero), left);
        const V columns[] = {stats.m, stats.d, stats.t, stats.u_g, stats.U};
        T* out = static_cast<T*>(args_.stats) + s.row + k;
        for (int c = 0; c < 5; ++c) {
          store_some(out + c * args_.stats_column_stride, select(counted, columns[c], zero), left);
        }
      }
      if (pass_ == Pass::loss) continue;
      T upstream[kLanes] = {};
      for (int64_t i = 0; i < kLanes && i < left; ++i) {
        upstream[i] = static_cast<const T*>(args_.grad_loss)[(s.row + k + i) * args_.grad_loss_stride];
      }
      scale_grad(rows.grad, load(upstream));
      store(s.m + k, rows.grad.m);
      store(s.d + k, rows.grad.a);
      store(s.t + k, rows.grad.b);
      store(s.u_g + k, rows.grad.S);
      store(s.U + k, rows.grad.target);
    }
  }

  void write_grad(const Stretch& s) {
    const Capping<T> capped = capping_;
    const bool smoothing = options_.label_smoothing != T(0), any_ignored = s.any_ignored;
    const V zero = T(0);
    for (int64_t j = 0; j < args_.num_classes; ++j) {
      const Z* z = logits(s, j);
      Z* grad = static_cast<Z*>(args_.grad) + s.image * args_.grad_stride + j * args_.grad_class_stride + s.pixel;
      const T* kept = scratch_ ? scratch_ + j * args_.stretch : nullptr;
      const V omega = weight_ ? weight_[j] : T(1), number = static_cast<T>(j);
      for (int64_t k = 0; k < s.count; k += kLanes) {
        const int64_t left = s.count - k;
        if (!kept) __builtin_prefetch(z + k + args_.logits_class_stride);
        __builtin_prefetch(grad + k + args_.grad_class_stride, 1);
        const RowGrad<V> grads = {load(s.m + k), load(s.d + k), load(s.t + k), load(s.u_g + k), load(s.U + k)};
        const V g = load(s.target + k), x = kept ? load(kept + k) : capped(load_some(z + k, left));
        const TargetTerms<V> terms = s.terms(k);
        V du = apply(grads, effective(x, j, terms), kLowest);
        if (smoothing) du = du + grads.S * omega;
        V dz = select(g == number, grads.target, du) * capped.slope(x);
        if (tail_ != Tail::none) dz = dz * factor_of(class_scale_, j, terms.scale);
        if (any_ignored) dz = select(V(T(-1)) < g, dz, zero);
        store_some(grad + k, dz, left);
      }
    }
  }

  const SoftmaxLossArgs& args_;
  const Pass pass_;
  T* const scratch_;
  const T* const weight_;
  const T* const bias_;
  const T* const margin_;
  const T *const class_scale_, *const target_scale_, *const mitigation_;
  const Tail tail_;
  const Capping<T> capping_;
  const LossOptions<T> options_;
  const T smooth_, weight_sum_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
