// The softmax family where classes are few: tiles of rows or of pixels, one lane each, that stay in the first-level
// cache with all their classes. Written once and compiled once per instruction set.
//
// Rows are transposed into columns, one for each class; pixels lie so already. The backward pass finds the statistics
// anew from the logits it has to read anyway.
#pragma once

#include "softmax_lanes.h"
#include "targets.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class SoftmaxTiles {
 public:
  static bool serves(const SoftmaxLossArgs& args, Pass pass) {
    return 0 < args.num_classes && args.num_classes <= kFewClasses && pass != Pass::accumulate && pass != Pass::apply;
  }

  SoftmaxTiles(const SoftmaxLossArgs& args, Pass pass) : args_(args), pass_(pass) {
    const int64_t fitting = Tile<T>::kNumbers / args.num_classes / kLanes * kLanes;
    width_ = fitting < kWidest ? fitting : kWidest;
  }

  int64_t run(int64_t begin, int64_t end) const {
    switch (kind_of(args_)) {
      case Kind::plain:
        return run_kind<Kind::plain>(begin, end);
      case Kind::focal:
        return run_kind<Kind::focal>(begin, end);
      case Kind::any:
        return run_kind<Kind::any>(begin, end);
    }
    return -1;
  }

 private:
  static constexpr int kLanes = Vec<T>::kLanes;
  static constexpr int64_t kWidest = Tile<T>::kWidest;
  static_assert(Tile<T>::kNumbers / kFewClasses >= kLanes, "a tile has a register of lanes");

  template <Kind kKind>
  int64_t run_kind(int64_t begin, int64_t end) const {
    const SoftmaxLanes<kKind, T> lanes(args_);
    Tile<T> tile;
    while (begin < end) {
      tile.row = begin;
      tile.count = width_ < end - begin ? width_ : end - begin;
      if (args_.pixels > 0) {
        const int64_t pixels = args_.pixels - begin % args_.pixels;
        if (pixels < tile.count) tile.count = pixels;
        if (tile.count > kLanes) tile.count -= tile.count % kLanes;  // the rest is a tile of its own
      }
      const int64_t bad = read_targets(tile);
      if (bad >= 0) return bad;
      args_.pixels > 0 ? run_pixels(tile, lanes) : run_rows(tile, lanes);
      begin += tile.count;
    }
    return -1;
  }

  // Returns the first row whose target is out of bounds, or -1.
  int64_t read_targets(Tile<T>& tile) const {
    const int64_t* target = args_.target + tile.row * args_.target_stride;
    typename Tile<T>::Class* __restrict__ classes = tile.target;
    const FoundTargets found =
        for_targets(target, args_.target_stride, tile.count, args_.ignore_index, args_.num_classes,
                    [&](int64_t k, int64_t g) { classes[k] = static_cast<typename Tile<T>::Class>(g); });
    if (found.bad < 0) {
      return tile.row + first_bad(target, args_.target_stride, tile.count, args_.ignore_index, args_.num_classes);
    }
    tile.any_ignored = found.ignored != 0;
    for (int64_t k = tile.count; k % kLanes != 0; ++k) tile.target[k] = -1;
    if (args_.weight) look_up(tile, static_cast<const T*>(args_.weight), T(1), tile.weight);
    if (args_.class_margin) look_up(tile, static_cast<const T*>(args_.class_margin), T(0), tile.margin);
    return -1;
  }

  // Of each lane's class.
  static void look_up(const Tile<T>& tile, const T* numbers, T of_ignored, T* found) {
    const int64_t padded = (tile.count + kLanes - 1) / kLanes * kLanes;
    for (int64_t k = 0; k < padded; ++k) found[k] = tile.target[k] < 0 ? of_ignored : numbers[tile.target[k]];
  }

  template <typename Element, typename Lanes>
  void run_lanes(Tile<T>& tile, const Places<Element, T>& places, const Lanes& lanes) const {
    if (pass_ == Pass::loss) return lanes.template run<Pass::loss>(tile, places);
    if (pass_ == Pass::backward) return lanes.template run<Pass::backward>(tile, places);
    lanes.template run<Pass::loss_and_grad>(tile, places);
  }

  // Straight into the tensor, where columns of whole registers are.
  bool writes_columns(const Tile<T>& tile) const { return args_.stats_stride == 1 && tile.count % kLanes == 0; }

  Columns<T> stats_of(Tile<T>& tile) const {
    if (args_.stats == nullptr) return {nullptr, 0};
    if (!writes_columns(tile)) return {tile.stats, kWidest};
    return {static_cast<T*>(args_.stats) + tile.row, args_.stats_column_stride};
  }

  void write_stats(const Tile<T>& tile) const {
    if (pass_ == Pass::backward || args_.stats == nullptr || writes_columns(tile)) return;
    T* const stats = static_cast<T*>(args_.stats) + tile.row * args_.stats_stride;
    if (args_.stats_stride != 1) return write_rows(tile.stats, kWidest, tile.count, 5, stats, args_.stats_stride);
    for (int c = 0; c < 5; ++c) {
      memcpy(stats + c * args_.stats_column_stride, tile.stats + c * kWidest, tile.count * sizeof(T));
    }
  }

  template <typename Lanes>
  void run_rows(Tile<T>& tile, const Lanes& lanes) const {
    const Z* z = static_cast<const Z*>(args_.logits) + tile.row * args_.logits_stride;
    const Columns<T> columns = {tile.numbers, width_};
    read_rows(z, args_.logits_stride, tile.count, args_.num_classes, tile.numbers, width_);
    run_lanes(tile, Places<T, T>{{tile.numbers, width_}, columns, stats_of(tile)}, lanes);
    write_stats(tile);
    if (pass_ == Pass::loss) return;
    Z* grad = static_cast<Z*>(args_.grad) + tile.row * args_.grad_stride;
    write_rows(tile.numbers, width_, tile.count, args_.num_classes, grad, args_.grad_stride);
  }

  template <Kind kKind>
  void run_pixels(Tile<T>& tile, const SoftmaxLanes<kKind, T>& lanes) const {
    const int64_t image = tile.row / args_.pixels, pixel = tile.row % args_.pixels;
    const Columns<const Z> z = {static_cast<const Z*>(args_.logits) + image * args_.logits_stride + pixel,
                                args_.logits_class_stride};
    const Columns<Z> grad = {static_cast<Z*>(args_.grad) + image * args_.grad_stride + pixel, args_.grad_class_stride};
    if constexpr (kKind != Kind::any || std::is_same_v<Z, T>) {
      if (tile.count % kLanes == 0) return run_lanes(tile, Places<Z, T>{z, grad, stats_of(tile)}, lanes);
    }
    for_columns(tile, [&](int64_t c, int64_t k) {
      store(tile.numbers + c * width_ + k, load_some(z.at(c, k), tile.count - k));
    });
    run_lanes(tile, Places<T, T>{{tile.numbers, width_}, {tile.numbers, width_}, stats_of(tile)}, lanes);
    write_stats(tile);
    if (pass_ == Pass::loss) return;
    for_columns(tile, [&](int64_t c, int64_t k) {
      store_some(grad.at(c, k), load(tile.numbers + c * width_ + k), tile.count - k);
    });
  }

  template <typename Move>
  LONGTAIL_INLINE void for_columns(const Tile<T>& tile, const Move& move) const {
    for (int64_t c = 0; c < args_.num_classes; ++c) {
      for (int64_t k = 0; k < tile.count; k += kLanes) move(c, k);
    }
  }

  const SoftmaxLossArgs& args_;
  const Pass pass_;
  int64_t width_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
