// The innermost loops of the softmax family over one stretch of a row: its maximum, its sums, its gradient.
//
// Whole registers and the rest stand apart, so that no register asks how many elements are left, and what an option
// decides is decided outside.
#pragma once

#include <type_traits>

#include "softmax_sources.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Rows up to this length are finished a register at a time; longer ones singly, while they are still in cache.
constexpr int64_t kGroupedClasses = 1024;

// `largest` and the elements [begin, end), lane by lane. May lose a NaN, which the sums keep.
template <typename U, typename T>
LONGTAIL_INLINE Vec<T> largest_of(const U u, int64_t begin, int64_t end, Vec<T> largest) {
  constexpr int kLanes = Vec<T>::kLanes;
  Vec<T> others[3] = {largest, largest, largest};  // four chains: a maximum takes as many cycles
  int64_t j = begin;
  for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
    const Two<T> near = two_of(u, j), far = two_of(u, j + 2 * kLanes);
    largest = maximum(largest, near.first);
    others[0] = maximum(others[0], near.second);
    others[1] = maximum(others[1], far.first);
    others[2] = maximum(others[2], far.second);
  }
  for (; j + kLanes <= end; j += kLanes) largest = maximum(largest, u.whole(j));
  if (j < end) largest = maximum(largest, u.some(j, end - j));
  return maximum(maximum(largest, others[0]), maximum(others[1], others[2]));
}

// The same, with the elements kept in `kept`.
template <typename U, typename T>
LONGTAIL_INLINE Vec<T> largest_kept(const U u, int64_t begin, int64_t end, T* kept, Vec<T> largest) {
  constexpr int kLanes = Vec<T>::kLanes;
  Vec<T> other = largest;
  int64_t j = begin;
  for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
    const Two<T> x = {u.whole(j), u.whole(j + kLanes)};
    largest = maximum(largest, x.first);
    other = maximum(other, x.second);
    store(kept + j, x.first);
    store(kept + j + kLanes, x.second);
  }
  for (int64_t n; j < end; j += n) {
    n = end - j < kLanes ? end - j : kLanes;
    const Vec<T> x = n < kLanes ? u.some(j, n) : u.whole(j);
    largest = maximum(largest, x);
    store_some(kept + j, x, n);
  }
  return maximum(largest, other);
}

// d and t of RowStats.
template <typename T>
struct Sums {
  Vec<T> d = T(0), t = T(0);

  template <bool kEntropy>
  LONGTAIL_INLINE void add(Vec<T> u, Vec<T> m) {
    Vec<T> shift = u - m;
    const Vec<T> e = exp_cut(shift, std::conditional_t<kEntropy, T, Summed<T>>());
    d = d + e;
    if (kEntropy) t = t + e * shift;
  }
};

// Adds the elements [begin, end), none above m.
template <bool kEntropy, typename U, typename T>
LONGTAIL_INLINE void sum_of(const U u, int64_t begin, int64_t end, Vec<T> m, Sums<T>& sums) {
  constexpr int kLanes = Vec<T>::kLanes;
  Sums<T> even = sums, odd;
  int64_t j = begin;
  for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
    u.prefetch(j);
    const Two<T> x = two_of(u, j);
    even.template add<kEntropy>(x.first, m);
    odd.template add<kEntropy>(x.second, m);
  }
  for (; j + kLanes <= end; j += kLanes) even.template add<kEntropy>(u.whole(j), m);
  if (j < end) odd.template add<kEntropy>(u.some(j, end - j), m);
  sums = {even.d + odd.d, even.t + odd.t};
}

// Writes the gradient of the elements [0, count) but for the target's, which the caller puts right. Not by way of
// write_each, through which sources that read vectors take a third longer (measured).
template <bool kComplement, bool kStream, typename U, typename T, typename Z>
LONGTAIL_INLINE void write_gradient(const U u, int64_t count, const RowGrad<Vec<T>> row, Z* grad) {
  constexpr int kLanes = Vec<T>::kLanes;
  const auto of = [&](Vec<T> x, int64_t at, int64_t n) {
    Vec<T> shift = x - row.m;
    const Vec<T> e = exp_cut(shift, RoundedTo<Z>());
    const Vec<T> du = e * (kComplement ? row.a + row.b * shift : row.a);
    if constexpr (U::kSloped) return du * u.slope(at, n);
    return du;
  };
  const auto write = [&](int64_t j, Vec<T> x) {
    if constexpr (kStream) {
      stream(grad + j, x);
    } else {
      store(grad + j, x);
    }
  };
  const auto write_some = [&](int64_t j, int64_t n) { store_raw(grad + j, narrow(grad, of(u.some(j, n), j, n)), n); };
  int64_t j = 0;
  if (kStream) {
    const int64_t head = -reinterpret_cast<uintptr_t>(grad) % 64 / sizeof(Z);
    j = head < count ? head : count;
    if (j > 0) write_some(0, j);
  }
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    u.prefetch(j);
    const Vec<T> first = of(u.whole(j), j, kLanes), second = of(u.whole(j + kLanes), j + kLanes, kLanes);
    write(j, first);
    write(j + kLanes, second);
  }
  for (; j + kLanes <= count; j += kLanes) write(j, of(u.whole(j), j, kLanes));
  if (j < count) write_some(j, count - j);
}

// grad[j] = of(j, n) for all j < count, a register of n of them at a time.
template <bool kStream, typename Z, typename Of>
LONGTAIL_INLINE void write_each(const Of& of, int64_t count, Z* grad) {
  constexpr int kLanes = VecOf<Z>::kLanes;
  int64_t j = 0;
  const auto some = [&](int64_t n) { store_raw(grad + j, narrow(grad, of(j, n)), n); };
  const auto whole = [&](int64_t at, VecOf<Z> x) {
    if constexpr (kStream) {
      stream(grad + at, x);
    } else {
      store(grad + at, x);
    }
  };
  if (kStream) {
    const int64_t head = -reinterpret_cast<uintptr_t>(grad) % 64 / sizeof(Z);
    if (head > 0 && count > 0) some(head < count ? head : count);
    j = head < count ? head : count;
  }
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    const VecOf<Z> first = of(j, kLanes), second = of(j + kLanes, kLanes);
    whole(j, first);
    whole(j + kLanes, second);
  }
  for (; j + kLanes <= count; j += kLanes) whole(j, of(j, kLanes));
  if (j < count) some(count - j);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
