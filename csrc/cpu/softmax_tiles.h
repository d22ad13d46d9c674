// The softmax family where classes are few: tiles of rows or of pixels, one lane each, that stay in the first-level
// cache with all their classes. Written once and compiled once per instruction set.
//
// Rows are transposed into columns, one for each class; pixels lie so already. Reads each logit once from memory and
// writes each gradient once; loss_and_grad keeps the exponentials in between.
#pragma once

#include <type_traits>

#include "capping.h"
#include "kernels.h"
#include "transpose.h"

namespace longtail {
namespace LONGTAIL_ISA {

constexpr int64_t kFewClasses = 64;
constexpr int64_t kFewerClasses = 40;  // up to which the backward pass of rows, one sweep alone, repays transposing

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class SoftmaxTiles {
 public:
  static bool serves(const SoftmaxLossArgs& args, Pass pass) {
    const int64_t most = pass == Pass::backward && args.pixels == 0 ? kFewerClasses : kFewClasses;
    return 0 < args.num_classes && args.num_classes <= most && pass != Pass::accumulate && pass != Pass::apply;
  }

  SoftmaxTiles(const SoftmaxLossArgs& args, Pass pass)
      : args_(args),
        pass_(pass),
        weight_(static_cast<const T*>(args.weight)),
        bias_(static_cast<const T*>(args.class_bias)),
        margin_(static_cast<const T*>(args.class_margin)),
        capping_(args),
        options_(convert<T>(args.options)),
        smooth_(static_cast<T>(args.options.label_smoothing) / static_cast<T>(args.num_classes)),
        weight_sum_(static_cast<T>(args.weight_sum)),
        effect_(effect_of(args)) {
    const int64_t fitting = kNumbers / args.num_classes / kLanes * kLanes;
    width_ = fitting < kWidest ? fitting : kWidest;
  }

  int64_t run(int64_t begin, int64_t end) {
    Tile tile;
    while (begin < end) {
      tile.row = begin;
      tile.count = width_ < end - begin ? width_ : end - begin;
      if (args_.pixels > 0) {
        tile.image = begin / args_.pixels;
        tile.pixel = begin % args_.pixels;
        if (args_.pixels - tile.pixel < tile.count) tile.count = args_.pixels - tile.pixel;
        if (tile.count > kLanes) tile.count -= tile.count % kLanes;  // the rest is a tile of its own
      }
      const int64_t bad = read_targets(tile);
      if (bad >= 0) return bad;
      args_.pixels > 0 ? run_pixels(tile) : run_rows(tile);
      begin += tile.count;
    }
    return -1;
  }

 private:
  using V = Vec<T>;
  using Classes = typename V::Bits;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kWidest = 256;                // lanes of a tile
  static constexpr int64_t kNumbers = 8192 / sizeof(T);  // half a first-level cache, all in all
  static_assert(kNumbers / kFewClasses >= kLanes, "a tile has a register of lanes");

  struct Tile {
    int64_t row, count;    // the lanes up to a whole register count as ignored
    int64_t image, pixel;  // of the first row, with pixels
    bool any_ignored;
    T target[kWidest];  // bits of integers: the class, or -1 where ignored
    T weight[kWidest], margin[kWidest], sample_weight[kWidest];
    T stats[5 * kWidest];  // RowStats, column by column
    T *const m = stats, *const d = m + kWidest, *const t = d + kWidest, *const u_g = t + kWidest,
             *const U = u_g + kWidest;
    T shift[kWidest], a[kWidest], b[kWidest], S[kWidest], target_grad[kWidest];  // RowGrad
    T logits[kNumbers], kept[kNumbers];
  };

  // Numbers of class c and lane k at p[c * stride + k].
  template <typename Element>
  struct Columns {
    Element* p;
    int64_t stride;
    LONGTAIL_INLINE V at(int64_t c, int64_t k) const { return load(p + c * stride + k); }
  };

  static LONGTAIL_INLINE Classes load_classes(const T* target) { return (Classes)load(target).v; }
  static LONGTAIL_INLINE Mask<T> is_class(Classes target, Classes c) { return {target == c}; }

  // Returns the first row whose target is out of bounds, or -1.
  int64_t read_targets(Tile& s) const {
    const int64_t bad = args_.target_stride == 1 ? read_targets(s, std::integral_constant<int64_t, 1>())
                                                 : read_targets(s, args_.target_stride);
    if (bad >= 0) return bad;
    for (int64_t k = s.count; k % kLanes != 0; ++k) set_class(s, k, -1);
    if (weight_) look_up(s, weight_, T(1), s.weight);
    if (margin_) look_up(s, margin_, T(0), s.margin);
    return -1;
  }

  // Of each lane's class.
  static void look_up(const Tile& s, const T* numbers, T of_ignored, T* found) {
    for (int64_t k = 0; k < padded(s); ++k) found[k] = class_of(s, k) < 0 ? of_ignored : numbers[class_of(s, k)];
  }
  static int64_t padded(const Tile& s) { return (s.count + kLanes - 1) / kLanes * kLanes; }

  using Class = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static LONGTAIL_INLINE Class class_of(const Tile& s, int64_t k) {
    Class c;
    memcpy(&c, s.target + k, sizeof(c));
    return c;
  }
  static LONGTAIL_INLINE void set_class(Tile& s, int64_t k, Class c) { memcpy(s.target + k, &c, sizeof(c)); }

  template <typename Stride>
  LONGTAIL_INLINE int64_t read_targets(Tile& s, Stride stride) const {
    const int64_t* target = args_.target + s.row * stride;
    const int64_t ignored = args_.ignore_index, classes = args_.num_classes;
    int64_t bad = 0, any = 0;
    for (int64_t k = 0; k < s.count; ++k) {
      const int64_t g = target[k * stride];
      const int64_t skip = -int64_t(g == ignored), outside = -int64_t(static_cast<uint64_t>(g) >= uint64_t(classes));
      bad |= outside & ~skip;
      any |= skip;
      set_class(s, k, static_cast<Class>(g | skip));
    }
    s.any_ignored = any != 0;
    for (int64_t k = 0; bad != 0 && k < s.count; ++k) {
      const int64_t g = target[k * stride];
      if (g != ignored && (g < 0 || g >= classes)) return s.row + k;
    }
    return -1;
  }

  void run_rows(Tile& s) const {
    const Z* z = static_cast<const Z*>(args_.logits) + s.row * args_.logits_stride;
    read_rows(z, args_.logits_stride, s.count, args_.num_classes, s.logits, width_);
    run_columns(s, Columns<const T>{s.logits, width_}, Columns<T>{s.kept, width_});
    if (pass_ == Pass::loss) return;
    Z* grad = static_cast<Z*>(args_.grad) + s.row * args_.grad_stride;
    write_rows(s.kept, width_, s.count, args_.num_classes, grad, args_.grad_stride);
  }

  void run_pixels(Tile& s) const {
    const Z* z = static_cast<const Z*>(args_.logits) + s.image * args_.logits_stride + s.pixel;
    Z* grad = static_cast<Z*>(args_.grad) + s.image * args_.grad_stride + s.pixel;
    if (s.count % kLanes == 0) {
      return run_columns(s, Columns<const Z>{z, args_.logits_class_stride}, Columns<Z>{grad, args_.grad_class_stride});
    }
    for (int64_t c = 0; c < args_.num_classes; ++c) {
      store(s.logits + c * width_, load_some(z + c * args_.logits_class_stride, s.count));
    }
    run_columns(s, Columns<const T>{s.logits, width_}, Columns<T>{s.kept, width_});
    for (int64_t c = 0; pass_ != Pass::loss && c < args_.num_classes; ++c) {
      store_some(grad + c * args_.grad_class_stride, load(s.kept + c * width_), s.count);
    }
  }

  template <typename Element>
  void run_columns(Tile& s, Columns<const Element> z, Columns<Element> grad) const {
    switch (effect_) {
      case Effect::none:
        return run_effect<Effect::none>(s, z, grad);
      case Effect::bias:
        return run_effect<Effect::bias>(s, z, grad);
      case Effect::any:
        return run_effect<Effect::any>(s, z, grad);
    }
  }

  template <Effect kEffect, typename Element>
  void run_effect(Tile& s, Columns<const Element> z, Columns<Element> grad) const {
    const bool complement = options_.complement_coefficient != T(0);
    if (pass_ == Pass::backward) {
      read_stats(s);
      finish_tile(s);
      return complement ? write_grad<kEffect, true, false>(s, z, grad) : write_grad<kEffect, false, false>(s, z, grad);
    }
    take_largest<kEffect>(s, z);
    if (options_.label_smoothing != T(0)) sum_all(s, z);
    args_.entropy || complement ? sum_others<true>(s, z) : sum_others<false>(s, z);
    finish_tile(s);
    if (pass_ == Pass::loss) return;
    complement ? write_grad<kEffect, true, true>(s, z, grad) : write_grad<kEffect, false, true>(s, z, grad);
  }

  // Effective logits without any margin, of capped ones.
  template <Effect kEffect>
  static LONGTAIL_INLINE V biased(V capped, const T* bias, int64_t c) {
    if (kEffect == Effect::none || (kEffect == Effect::any && bias == nullptr)) return capped;
    return capped + V(bias[c]);
  }

  // m and u_g; `kept` becomes the effective logits with -inf for the target.
  template <Effect kEffect, typename Element>
  void take_largest(Tile& s, const Columns<const Element> z) const {
    const Capping<T> capping = capping_;
    const T* const bias = bias_;
    const int64_t classes = args_.num_classes, width = width_, count = s.count;
    const V excluded = T(-INFINITY);
    for (int64_t k = 0; k < count; k += kLanes) {
      const Classes target = load_classes(s.target + k);
      V largest = excluded, u_g = T(0);
      Classes number = {};
      for (int64_t c = 0; c < classes; ++c) {
        const V x = z.at(c, k), u = biased<kEffect>(kEffect == Effect::any ? capping(x) : x, bias, c);
        const Mask<T> is_target = is_class(target, number);
        u_g = select(is_target, u, u_g);
        const V other = select(is_target, excluded, u);
        largest = maximum(largest, other);
        store(s.kept + c * width + k, other);
        number = number + 1;
      }
      store(s.m + k, largest);
      store(s.u_g + k, margin_ ? u_g - load(s.margin + k) : u_g);
      store(s.U + k, V(T(0)));
    }
  }

  // d and t; `kept` becomes the exponentials. Memory works on the next tile meanwhile.
  template <bool kEntropy, typename Element>
  void sum_others(Tile& s, const Columns<const Element> z) const {
    const int64_t classes = args_.num_classes, width = width_, count = s.count;
    for (int64_t k = 0; k < count; k += kLanes) {
      const V m = finite_max(load(s.m + k));
      V d = T(0), t = T(0);
      for (int64_t c = 0; c < classes; ++c) {
        if (std::is_same<Element, Z>()) __builtin_prefetch(z.p + c * z.stride + k + count);
        T* const kept = s.kept + c * width + k;
        V shift = load(kept) - m;
        const V e = exp_cut(shift, T(0));
        d = d + e;
        if (kEntropy) t = t + e * shift;
        store(kept, e);
      }
      store(s.d + k, d);
      store(s.t + k, t);
    }
  }

  // U
  template <typename Element>
  void sum_all(Tile& s, const Columns<const Element> z) const {
    const Capping<T> capping = capping_;
    for (int64_t k = 0; k < s.count; k += kLanes) {
      const V reference = finite_max(load(s.u_g + k));
      V U = T(0);
      for (int64_t c = 0; c < args_.num_classes; ++c) {
        const V u = biased<Effect::any>(capping(z.at(c, k)), bias_, c);
        U = U + (weight_ ? V(weight_[c]) : V(T(1))) * (u - reference);
      }
      if (margin_) U = U - (weight_ ? load(s.weight + k) : V(T(1))) * load(s.margin + k);
      store(s.U + k, U);
    }
  }

  void read_stats(Tile& s) const {
    const int64_t stride = args_.stats_stride, column_stride = args_.stats_column_stride;
    const T* stats = static_cast<const T*>(args_.stats) + s.row * stride;
    if (column_stride == 1) return read_rows(stats, stride, s.count, 5, s.stats, kWidest);
    for (int c = 0; c < 5; ++c) {
      for (int64_t k = 0; k < padded(s); k += kLanes) {
        read_column(stats + c * column_stride + k * stride, stride, s.count - k, s.stats + c * kWidest + k);
      }
    }
  }

  void write_stats(const Tile& s) const {
    T* const stats = static_cast<T*>(args_.stats) + s.row * args_.stats_stride;
    if (args_.stats_column_stride == 1) return write_rows(s.stats, kWidest, s.count, 5, stats, args_.stats_stride);
    for (int c = 0; c < 5; ++c) {
      memcpy(stats + c * args_.stats_column_stride, s.stats + c * kWidest, s.count * sizeof(T));
    }
  }

  // Losses, stats and RowGrad.
  void finish_tile(Tile& s) const {
    const V zero = T(0);
    for (int64_t k = 0; k < s.count; k += kLanes) {
      const int64_t left = s.count - k;
      const RowStats<V> stats = {load(s.m + k), load(s.d + k), load(s.t + k), load(s.u_g + k), load(s.U + k)};
      const V weight = weight_ ? load(s.weight + k) : V(T(1));
      const V v =
          args_.sample_weight ? load_some(static_cast<const T*>(args_.sample_weight) + s.row + k, left) : V(T(1));
      RowLoss<V> rows = finish(stats, options_, smooth_, weight_sum_, weight, v);
      if (pass_ != Pass::backward) {
        const auto ignored = is_class(load_classes(s.target + k), Classes{} - 1);
        store_some(static_cast<T*>(args_.loss) + s.row + k, select(ignored, zero, rows.loss), left);
        const V columns[] = {stats.m, stats.d, stats.t, stats.u_g, stats.U};
        T* const masked[] = {s.m, s.d, s.t, s.u_g, s.U};
        for (int c = 0; c < 5; ++c) store(masked[c] + k, select(ignored, zero, columns[c]));
      }
      if (pass_ == Pass::loss) continue;
      scale_grad(rows.grad, upstream(s.row + k, left));
      store(s.shift + k, rows.grad.m);
      store(s.a + k, rows.grad.a);
      store(s.b + k, rows.grad.b);
      store(s.S + k, rows.grad.S);
      store(s.target_grad + k, rows.grad.target);
    }
    if (pass_ != Pass::backward) write_stats(s);
  }

  V upstream(int64_t row, int64_t left) const {
    const T* grad_loss = static_cast<const T*>(args_.grad_loss);
    if (args_.grad_loss_stride == 0) return V(*grad_loss);
    T numbers[kLanes] = {};
    for (int64_t i = 0; i < kLanes && i < left; ++i) numbers[i] = grad_loss[(row + i) * args_.grad_loss_stride];
    return load(numbers);
  }

  // kKept: `kept` holds the exponentials.
  template <Effect kEffect, bool kComplement, bool kKept, typename Element>
  void write_grad(const Tile& s, const Columns<const Element> z, const Columns<Element> grad) const {
    const Capping<T> capping = capping_;
    const T *const bias = bias_, *const weight = weight_;
    const int64_t classes = args_.num_classes, width = width_, count = s.count;
    const bool smoothing = options_.label_smoothing != T(0);
    for (int64_t k = 0; k < count; k += kLanes) {
      const Classes target = load_classes(s.target + k);
      const V m = load(s.shift + k), a = load(s.a + k), b = load(s.b + k), S = load(s.S + k);
      const V target_grad = load(s.target_grad + k);
      Classes number = {};
      for (int64_t c = 0; c < classes; ++c) {
        if (!kKept && std::is_same<Element, Z>()) __builtin_prefetch(z.p + c * z.stride + k + count);
        V x, e, shift;
        if (!kKept || kComplement || kEffect == Effect::any) {
          x = kEffect == Effect::any ? capping(z.at(c, k)) : z.at(c, k);
          shift = biased<kEffect>(x, bias, c) - m;
        }
        if (kKept) {
          e = load(s.kept + c * width + k);
          if (kComplement) shift = maximum(V(Power<T>::kZero), shift);  // 0 * -inf is 0
        } else {
          e = kEffect == Effect::any ? exp_cut(shift, T(0))
                                     : exp_cut(shift, RoundedTo<Z>());  // S * omega may cancel it
        }
        V du = e * (kComplement ? a + b * shift : a);
        if (kEffect == Effect::any && smoothing) du = du + S * (weight ? V(weight[c]) : V(T(1)));
        du = select(is_class(target, number), target_grad, du);
        store(grad.p + c * grad.stride + k, kEffect == Effect::any ? du * capping.slope(x) : du);
        number = number + 1;
      }
      if (s.any_ignored) clear_ignored(target, grad, k);
    }
  }

  template <typename Element>
  void clear_ignored(Classes target, const Columns<Element> grad, int64_t k) const {
    const auto ignored = is_class(target, Classes{} - 1);
    for (int64_t c = 0; c < args_.num_classes; ++c) {
      store(grad.p + c * grad.stride + k, select(ignored, V(T(0)), grad.at(c, k)));
    }
  }

  const SoftmaxLossArgs& args_;
  const Pass pass_;
  const T* const weight_;
  const T* const bias_;
  const T* const margin_;
  const Capping<T> capping_;
  const LossOptions<T> options_;
  const T smooth_, weight_sum_;
  const Effect effect_;
  int64_t width_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
