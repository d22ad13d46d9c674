// The loops of ZLPR and the two-way loss over rows of contiguous classes, written once and compiled once per
// instruction set. A block of classes is read for its largest exponents, and from the cache for its sums.
#pragma once

#include "two_way_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

// What rows and pixels have in common. Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class TwoWayLoop {
 protected:
  using V = Vec<T>;

  TwoWayLoop(const TwoWayLossArgs& args, Pass pass)
      : args_(args),
        pass_(pass),
        bias_(static_cast<const T*>(args.class_bias)),
        inverse_negative_(T(1.0 / args.negative_temperature)),
        inverse_positive_(T(1.0 / args.positive_temperature)) {}

  Exponents<T> exponents(V negative, V positive) const {
    return {negative, positive, V(inverse_negative_), V(inverse_positive_)};
  }

  T weight(int64_t row) const { return args_.sample_weight ? static_cast<const T*>(args_.sample_weight)[row] : T(1); }

  T upstream(int64_t row) const { return static_cast<const T*>(args_.grad_loss)[row * args_.grad_loss_stride]; }

  T* stats(int64_t row) const { return static_cast<T*>(args_.stats) + row * args_.stats_stride; }

  // V: a scalar or a register of rows.
  template <typename Value>
  TwoWayRow<Value> finish(const Side<Value>& n, const Side<Value>& p, Value v) const {
    return finish_sides(n, p, T(args_.negative_temperature), T(args_.positive_temperature), args_.joint, v);
  }

  const TwoWayLossArgs& args_;
  const Pass pass_;
  const T* const bias_;
  const T inverse_negative_, inverse_positive_;
};

template <typename Z, typename T>
class TwoWayRows : TwoWayLoop<Z, T> {
 public:
  TwoWayRows(const TwoWayLossArgs& args, Pass pass) : TwoWayLoop<Z, T>(args, pass) {}

  // Returns the first row whose target is out of bounds, or -1.
  int64_t run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool known = args_.target ? run_class(i) : run_dense(i);
      if (!known) return i;
    }
    if (args_.stream) stream_end();
    return -1;
  }

 private:
  using Loop = TwoWayLoop<Z, T>;
  using V = Vec<T>;
  using Loop::args_;
  using Loop::bias_;
  using Loop::pass_;

  struct Running {
    T m = -INFINITY;
    V d = T(0);

    LONGTAIL_INLINE void raise(T block_max, T inverse) {
      if (!(block_max > m)) return;
      V shift = (V(m) - V(block_max)) * V(inverse);
      d = d * exp_cut(shift, T(0));
      m = block_max;
    }

    Side<T> side() const {
      Side<T> found = {m, horizontal_sum(d)};
      settle_side(found);
      return found;
    }
  };

  const Z* logits(int64_t i) const { return static_cast<const Z*>(args_.logits) + i * args_.logits_stride; }

  bool run_class(int64_t i) {
    const int64_t g = args_.target[i * args_.target_stride];
    if (args_.ignoring && g == args_.ignore_index) {
      ignore(i);
      return true;
    }
    if (g < 0 || g >= args_.num_classes) return false;
    if (bias_) {
      run_row(i, ClassRow<Z, true>{logits(i), bias_, g});
    } else {
      run_row(i, ClassRow<Z, false>{logits(i), nullptr, g});
    }
    return true;
  }

  bool run_dense(int64_t i) {
    if (args_.dense_is_wide) {
      run_targets(i, static_cast<const T*>(args_.dense_target) + i * args_.dense_stride);
    } else {
      run_targets(i, static_cast<const Z*>(args_.dense_target) + i * args_.dense_stride);
    }
    return true;
  }

  template <typename Y>
  void run_targets(int64_t i, const Y* y) {
    const T ignored = static_cast<T>(args_.ignore_index);
    if (bias_) {
      run_row(i, DenseRow<Z, Y, true>{logits(i), bias_, y, args_.ignoring, ignored});
    } else {
      run_row(i, DenseRow<Z, Y, false>{logits(i), nullptr, y, args_.ignoring, ignored});
    }
  }

  template <typename Source>
  void run_row(int64_t i, const Source source) {
    T* stats = Loop::stats(i);
    const int64_t column = args_.stats_column_stride;
    Side<T> n, p;
    if (pass_ == Pass::backward) {
      n = {stats[0], stats[column]};
      p = {stats[2 * column], stats[3 * column]};
      if (n.m == 0 && n.d == 0 && p.m == 0 && p.d == 0) return ignore(i);
    } else {
      Running negative, positive;
      const bool any = add_row(source, negative, positive);
      if (args_.num_classes == 0 || (args_.joint && !any)) return ignore(i);
      n = negative.side();
      p = positive.side();
      stats[0] = n.m;
      stats[column] = n.d;
      stats[2 * column] = p.m;
      stats[3 * column] = p.d;
    }
    const TwoWayRow<T> row = finish_row(n, p, Loop::weight(i));
    if (pass_ != Pass::backward) static_cast<T*>(args_.loss)[i] = row.loss;
    if (pass_ == Pass::loss) return;
    const T upstream = Loop::upstream(i);
    write_row(source, Loop::exponents(V(finite_max(n.m)), V(finite_max(p.m))), row.negative * upstream,
              row.positive * upstream, static_cast<Z*>(args_.grad) + i * args_.grad_stride);
  }

  // By registers, whose functions are quicker than the library's; those of double call it for each lane.
  TwoWayRow<T> finish_row(const Side<T>& n, const Side<T>& p, T v) const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return Loop::template finish<T>(n, p, v);
    } else {
      const TwoWayRow<V> row = Loop::template finish<V>({V(n.m), V(n.d)}, {V(p.m), V(p.d)}, V(v));
      return {row.loss.v[0], row.negative.v[0], row.positive.v[0]};
    }
  }

  void ignore(int64_t i) {
    if (pass_ != Pass::backward) {
      static_cast<T*>(args_.loss)[i] = T(0);
      for (int k = 0; k < 4; ++k) Loop::stats(i)[k * args_.stats_column_stride] = T(0);
    }
    if (pass_ != Pass::loss) {
      memset(static_cast<Z*>(args_.grad) + i * args_.grad_stride, 0, args_.num_classes * sizeof(Z));
    }
  }

  // Whether the row has a positive. A function of its own for each source, as those of SoftmaxRows.
  template <typename Source>
  __attribute__((noinline)) bool add_row(const Source row, Running& negative, Running& positive) const {
    Mask<T> any = {};
    for (int64_t begin = 0; begin < args_.num_classes; begin += kBlock) {
      const int64_t count = args_.num_classes - begin < kBlock ? args_.num_classes - begin : kBlock;
      const Source block = row.from(begin);
      const Largest<T> largest = largest_of_block(block, count);
      any = any | largest.any;
      negative.raise(horizontal_max(largest.negative), Loop::inverse_negative_);
      positive.raise(horizontal_max(largest.positive), Loop::inverse_positive_);
      const SideSums<T> sums =
          sum_block(block, count, Loop::exponents(V(finite_exponent(negative.m)), V(finite_exponent(positive.m))));
      negative.d = negative.d + sums.negative;  // apart: long rows would lose digits in one running sum
      positive.d = positive.d + sums.positive;
    }
    return !all(Mask<T>{~any.v});
  }

  template <typename Source>
  static LONGTAIL_INLINE Largest<T> largest_of_block(const Source block, int64_t count) {
    Largest<T> found, other;  // two chains
    const auto add = [&](Largest<T>& to, int64_t j, int64_t left) __attribute__((always_inline)) {
      block.prefetch(j);
      if (!Source::kDense && !block.some(j) && left >= V::kLanes) {
        to.negative = maximum(block.load_u(j, left), to.negative);
      } else {
        to.add(block.at(j, left));
      }
    };
    int64_t j = 0;
    for (; j + 2 * V::kLanes <= count; j += 2 * V::kLanes) {
      add(found, j, V::kLanes);
      add(other, j + V::kLanes, V::kLanes);
    }
    for (; j < count; j += V::kLanes) add(found, j, count - j);
    return {maximum(found.negative, other.negative), maximum(found.positive, other.positive), found.any | other.any};
  }

  template <typename Source>
  static LONGTAIL_INLINE SideSums<T> sum_block(const Source block, int64_t count, const Exponents<T> m) {
    SideSums<T> even, odd;
    const auto add = [&](SideSums<T>& to, int64_t j, int64_t left) __attribute__((always_inline)) {
      if (!Source::kDense && !block.some(j) && left >= V::kLanes) {
        to.add_negatives(block.load_u(j, left), m);
      } else {
        to.add(block.at(j, left), m);
      }
    };
    int64_t j = 0;
    for (; j + 2 * V::kLanes <= count; j += 2 * V::kLanes) {
      add(even, j, V::kLanes);
      add(odd, j + V::kLanes, V::kLanes);
    }
    for (; j < count; j += V::kLanes) add(even, j, count - j);
    return {even.negative + odd.negative, even.positive + odd.positive};
  }

  template <typename Source>
  __attribute__((noinline)) void write_row(const Source row, const Exponents<T> m, T by_negative, T by_positive,
                                           Z* grad) const {
    const V by_n = by_negative, by_p = by_positive;
    const auto of = [&](int64_t j, int64_t left) __attribute__((always_inline)) {
      row.prefetch(j);
      if (!Source::kDense && !row.some(j)) return negative_gradient<Z>(row.load_u(j, left), m, by_n);
      return gradient_of<Z>(row.at(j, left), m, by_n, by_p, row.ignoring);
    };
    if constexpr (kStreams<Z>) {
      if (args_.stream) return write_each<true>(of, args_.num_classes, grad);
    }
    write_each<false>(of, args_.num_classes, grad);
  }
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
