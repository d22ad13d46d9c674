// The sums of one row of the softmax family, a block of its classes after the other.
#pragma once

#include "softmax_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Of `count` classes, those before and after the g-th, or all where it is not one of them.
struct Others {
  int64_t before, after, count;
  LONGTAIL_INLINE Others(int64_t n, int64_t g)
      : before(0 <= g && g < n ? g : n), after(before < n ? g + 1 : n), count(n) {}
};

// m is one number; d, t and U are kept lane by lane.
template <typename T>
struct RowSums {
  T m = -INFINITY;
  Sums<T> sums;
  Vec<T> U = T(0);

  RowStats<T> stats(T u_g, bool smoothing) const {
    return {m, horizontal_sum(sums.d), horizontal_sum(sums.t), u_g, smoothing ? horizontal_sum(U) : T(0)};
  }

  // Adds a block of effective logits, for which `kept` has room. A function of its own, as write_plain_grad: among the
  // others' loops, reading from memory takes up to a fifth longer (measured).
  template <bool kEntropy, typename Source>
  __attribute__((noinline)) void add(const Source u, const Others others, T* kept) {
    const Vec<T> none = T(-INFINITY);
    if constexpr (Source::kStored) {
      const Vec<T> largest = largest_kept(u, 0, others.before, kept, none);
      raise(horizontal_max(largest_kept(u, others.after, others.count, kept, largest)));
      add_sums<kEntropy>(ComputedAhead<Source>(kept, u), others);
    } else {
      raise(horizontal_max(largest_of(u, others.after, others.count, largest_of(u, 0, others.before, none))));
      add_sums<kEntropy>(u, others);
    }
  }

  // The same of those that have been computed, none above m.
  template <bool kEntropy>
  __attribute__((noinline)) void add_computed(const T* u, const Others others) {
    add_sums<kEntropy>(Computed<T>{u}, others);
  }

  LONGTAIL_INLINE void raise(T block_max) {
    if (!(block_max > m)) return;
    RowStats<Vec<T>> raised = {Vec<T>(m), sums.d, sums.t, Vec<T>(T(0)), Vec<T>(T(0))};
    raise_max(raised, Vec<T>(block_max), ExpRange<T>::kLowest);
    sums = {raised.d, raised.t};
    m = block_max;
  }

 private:
  template <bool kEntropy, typename Source>
  LONGTAIL_INLINE void add_sums(const Source u, const Others others) {
    const Vec<T> finite_m = finite_max(m);
    Sums<T> block;  // apart: long rows would lose digits in one running sum
    sum_of<kEntropy>(u, 0, others.before, finite_m, block);
    sum_of<kEntropy>(u, others.after, others.count, finite_m, block);
    sums.d = sums.d + block.d;
    sums.t = sums.t + block.t;
  }
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
