// The softmax family where classes are few: tiles of rows or of pixels, one lane each, that stay in the first-level
// cache with all their classes. Written once and compiled once per instruction set.
//
// Rows are transposed into columns, one for each class; pixels lie so already. Reads each logit once from memory and
// writes each gradient once; backward finds the statistics anew, which costs less than reading them.
#pragma once

#include <type_traits>

#include "softmax_lanes.h"
#include "transpose.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class SoftmaxTiles {
 public:
  static bool serves(const SoftmaxLossArgs& args, Pass pass) {
    return 0 < args.num_classes && args.num_classes <= kFewClasses && pass != Pass::accumulate && pass != Pass::apply;
  }

  SoftmaxTiles(const SoftmaxLossArgs& args, Pass pass)
      : args_(args),
        pass_(pass),
        weight_(static_cast<const T*>(args.weight)),
        margin_(static_cast<const T*>(args.class_margin)) {
    const int64_t fitting = kNumbers / args.num_classes / kLanes * kLanes;
    width_ = fitting < kWidest ? fitting : kWidest;
  }

  int64_t run(int64_t begin, int64_t end) {
    switch (kind_of(args_)) {
      case Kind::plain:
        return run_kind<Kind::plain>(begin, end);
      case Kind::focal:
        return run_kind<Kind::focal>(begin, end);
      case Kind::biased:
        return run_kind<Kind::biased>(begin, end);
      case Kind::any:
        return run_kind<Kind::any>(begin, end);
    }
    return -1;
  }

 private:
  using V = Vec<T>;
  using Classes = typename V::Bits;
  using Class = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kWidest = 256;                 // lanes of a tile
  static constexpr int64_t kNumbers = 16384 / sizeof(T);  // a third of a first-level cache
  static_assert(kNumbers / kFewClasses >= kLanes, "a tile has a register of lanes");

  struct Tile {
    int64_t row, count;    // the lanes up to a whole register count as ignored
    int64_t image, pixel;  // of the first row, with pixels
    bool any_ignored;
    Class target[kWidest];  // -1 where ignored
    T weight[kWidest], margin[kWidest];
    T stats[5 * kWidest];  // RowStats, column by column
    T columns[kNumbers];   // logits, and then their gradient
  };

  // Where a tile's columns lie: of its logits, its gradient and its statistics.
  template <typename Element>
  struct Places {
    Columns<const Element> z;
    Columns<Element> grad;
    Columns<T> stats;
  };

  template <Kind kKind>
  int64_t run_kind(int64_t begin, int64_t end) {
    if (pass_ == Pass::loss) return run_pass<kKind, Pass::loss>(begin, end);
    if (pass_ == Pass::backward) return run_pass<kKind, Pass::backward>(begin, end);
    return run_pass<kKind, Pass::loss_and_grad>(begin, end);
  }

  template <Kind kKind, Pass kPass>
  int64_t run_pass(int64_t begin, int64_t end) {
    const SoftmaxLanes<kKind, T> lanes(args_);
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
      args_.pixels > 0 ? run_pixels<kPass>(tile, lanes) : run_rows<kPass>(tile, lanes);
      begin += tile.count;
    }
    return -1;
  }

  // Returns the first row whose target is out of bounds, or -1.
  int64_t read_targets(Tile& s) const {
    const int64_t* target = args_.target + s.row * args_.target_stride;
    const Found found = args_.target_stride == 1
                            ? read_targets(target, std::integral_constant<int64_t, 1>(), s.count, s.target)
                            : read_targets(target, args_.target_stride, s.count, s.target);
    for (int64_t k = 0; found.bad < 0 && k < s.count; ++k) {
      const int64_t g = target[k * args_.target_stride];
      if (g != args_.ignore_index && (g < 0 || g >= args_.num_classes)) return s.row + k;
    }
    s.any_ignored = found.ignored != 0;
    for (int64_t k = s.count; k % kLanes != 0; ++k) s.target[k] = -1;
    if (weight_) look_up(s, weight_, T(1), s.weight);
    if (margin_) look_up(s, margin_, T(0), s.margin);
    return -1;
  }

  struct Found {
    int64_t bad, ignored;  // negative where one is out of bounds; not 0 where one is ignored
  };

  // In a form that the compiler turns into vectors.
  template <typename Stride>
  LONGTAIL_INLINE Found read_targets(const int64_t* __restrict__ target, Stride stride, int64_t count,
                                     Class* __restrict__ found) const {
    const int64_t ignore_index = args_.ignore_index, last = args_.num_classes - 1;
    int64_t bad = 0, ignored = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t g = target[k * stride], skip = g == ignore_index ? -1 : 0;
      bad |= (g | static_cast<int64_t>(static_cast<uint64_t>(last) - static_cast<uint64_t>(g))) & ~skip;
      ignored |= skip;
      found[k] = static_cast<Class>(g | skip);
    }
    return {bad, ignored};
  }

  // Of each lane's class.
  static void look_up(const Tile& s, const T* numbers, T of_ignored, T* found) {
    const int64_t padded = (s.count + kLanes - 1) / kLanes * kLanes;
    for (int64_t k = 0; k < padded; ++k) found[k] = s.target[k] < 0 ? of_ignored : numbers[s.target[k]];
  }

  template <Pass kPass, typename Lanes>
  void run_rows(Tile& s, const Lanes& lanes) const {
    const Z* z = static_cast<const Z*>(args_.logits) + s.row * args_.logits_stride;
    read_rows(z, args_.logits_stride, s.count, args_.num_classes, s.columns, width_);
    run_lanes<kPass>(s, Places<T>{{s.columns, width_}, {s.columns, width_}, {s.stats, kWidest}}, lanes);
    if (kPass != Pass::backward) {
      write_rows(s.stats, kWidest, s.count, 5, static_cast<T*>(args_.stats) + s.row * args_.stats_stride,
                 args_.stats_stride);
    }
    if (kPass == Pass::loss) return;
    Z* grad = static_cast<Z*>(args_.grad) + s.row * args_.grad_stride;
    write_rows(s.columns, width_, s.count, args_.num_classes, grad, args_.grad_stride);
  }

  template <Pass kPass, typename Lanes>
  void run_pixels(Tile& s, const Lanes& lanes) const {
    const Z* z = static_cast<const Z*>(args_.logits) + s.image * args_.logits_stride + s.pixel;
    Z* grad = static_cast<Z*>(args_.grad) + s.image * args_.grad_stride + s.pixel;
    T* stats = static_cast<T*>(args_.stats) + s.row;
    const int64_t class_stride = args_.logits_class_stride, stats_stride = args_.stats_column_stride;
    if (s.count % kLanes == 0) {
      return run_lanes<kPass>(s, Places<Z>{{z, class_stride}, {grad, args_.grad_class_stride}, {stats, stats_stride}},
                              lanes);
    }
    for (int64_t c = 0; c < args_.num_classes; ++c) {
      store(s.columns + c * width_, load_some(z + c * class_stride, s.count));
    }
    run_lanes<kPass>(s, Places<T>{{s.columns, width_}, {s.columns, width_}, {s.stats, kWidest}}, lanes);
    for (int64_t c = 0; kPass != Pass::backward && c < 5; ++c) {
      store_some(stats + c * stats_stride, load(s.stats + c * kWidest), s.count);
    }
    for (int64_t c = 0; kPass != Pass::loss && c < args_.num_classes; ++c) {
      store_some(grad + c * args_.grad_class_stride, load(s.columns + c * width_), s.count);
    }
  }

  template <Pass kPass, typename Element, typename Lanes>
  void run_lanes(const Tile& s, const Places<Element> places, const Lanes lanes) const {
    typename Lanes::Kept kept;
    const V zero = T(0), one = T(1);
    const T* const sample_weight = static_cast<const T*>(args_.sample_weight) + (args_.sample_weight ? s.row : 0);
    T* const loss = static_cast<T*>(args_.loss) + (kPass == Pass::backward ? 0 : s.row);
    for (int64_t k = 0; k < s.count; k += kLanes) {
      const int64_t left = s.count - k;
      Classes target;
      memcpy(&target, s.target + k, sizeof(target));
      const V weight = weight_ ? load(s.weight + k) : one, margin = margin_ ? load(s.margin + k) : zero;
      const RowStats<V> stats = lanes.stats_of(places.z, k, target, weight, margin, kept);
      RowLoss<V> row = lanes.loss_of(stats, weight, sample_weight ? load_some(sample_weight + k, left) : one);
      if (kPass != Pass::backward) {
        const auto ignored = Lanes::is_class(target, Classes{} - 1);
        store_some(loss + k, select(ignored, zero, row.loss), left);
        const V columns[] = {stats.m, stats.d, stats.t, stats.u_g, stats.U};
        for (int c = 0; c < 5; ++c) store(places.stats.at(c, k), select(ignored, zero, columns[c]));
      }
      if (kPass == Pass::loss) continue;
      scale_grad(row.grad, upstream(s.row + k, left));
      lanes.write_grad(row.grad, k, target, kept, places.grad);
      if (s.any_ignored) lanes.clear_ignored(k, target, places.grad);
    }
  }

  LONGTAIL_INLINE V upstream(int64_t row, int64_t left) const {
    const T* grad_loss = static_cast<const T*>(args_.grad_loss);
    if (args_.grad_loss_stride == 0) return V(*grad_loss);
    if (args_.grad_loss_stride == 1) return load_some(grad_loss + row, left);
    T numbers[kLanes] = {};
    for (int64_t i = 0; i < kLanes && i < left; ++i) numbers[i] = grad_loss[(row + i) * args_.grad_loss_stride];
    return load(numbers);
  }

  const SoftmaxLossArgs& args_;
  const Pass pass_;
  const T* const weight_;
  const T* const margin_;
  int64_t width_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
