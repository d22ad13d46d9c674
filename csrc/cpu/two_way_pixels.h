// The loops of ZLPR and the two-way loss over images of contiguous pixels: a stretch of pixels goes through all
// classes, some at a time, which are read for their largest exponents, and from the cache for their sums.
#pragma once

#include "two_way_rows.h"

namespace longtail {
namespace LONGTAIL_ISA {

template <typename Z, typename T>
class TwoWayPixels : TwoWayLoop<Z, T> {
 public:
  TwoWayPixels(const TwoWayLossArgs& args, Pass pass) : TwoWayLoop<Z, T>(args, pass) {}

  // Returns the first row whose target is out of bounds, or -1.
  int64_t run(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t p = begin % args_.pixels, left = args_.pixels - p < end - begin ? args_.pixels - p : end - begin;
      const int64_t n = left < kLongestStretch ? left : kLongestStretch;
      const int64_t bad = run_stretch(begin / args_.pixels, p, n);
      if (bad >= 0) return begin + bad;
      begin += n;
    }
    return -1;
  }

 private:
  using Loop = TwoWayLoop<Z, T>;
  using V = Vec<T>;
  using Loop::args_;
  using Loop::bias_;
  using Loop::pass_;
  static constexpr int64_t kClasses = 8;  // of a pixel, at a time

  // Of each pixel; target: its class, -1 where it is ignored.
  struct Stretch {
    int64_t i, p, n;
    T target[kLongestStretch], counted[kLongestStretch];
    T m_n[kLongestStretch], d_n[kLongestStretch], m_p[kLongestStretch], d_p[kLongestStretch];
    T by_n[kLongestStretch], by_p[kLongestStretch];
  };

  // `n` pixels of image i from pixel p on. Returns the first whose target is out of bounds, or -1.
  int64_t run_stretch(int64_t i, int64_t p, int64_t n) {
    Stretch s;
    s.i = i;
    s.p = p;
    s.n = n;
    const int64_t bad = begin(s);
    if (bad >= 0) return bad;
    if (pass_ != Pass::backward) {
      for (int64_t j = 0; j < args_.num_classes; j += kClasses) {
        if (args_.target) {
          add_classes<false>(s, j);
        } else {
          add_classes<true>(s, j);
        }
      }
    }
    finish(s);
    if (pass_ != Pass::loss) with_targets(s, [&](const auto& lanes) { write(lanes, s); });
    return -1;
  }

  int64_t begin(Stretch& s) {
    const int64_t row = s.i * args_.pixels + s.p;
    for (int64_t k = 0; k < kLongestStretch; ++k) {
      s.m_n[k] = s.m_p[k] = T(-INFINITY);
      s.d_n[k] = s.d_p[k] = T(0);
      s.target[k] = T(-1);
      s.counted[k] = T(args_.target == nullptr && !args_.joint && args_.num_classes > 0);
    }
    for (int64_t k = 0; args_.target && k < s.n; ++k) {
      const int64_t g = args_.target[(row + k) * args_.target_stride];
      if (args_.ignoring && g == args_.ignore_index) continue;
      if (g < 0 || g >= args_.num_classes) return k;
      s.target[k] = static_cast<T>(g);
      s.counted[k] = T(1);
    }
    return -1;
  }

  V logits(const Stretch& s, int64_t j, int64_t k) const {
    const Z* z = static_cast<const Z*>(args_.logits) + s.i * args_.logits_stride + j * args_.logits_class_stride + s.p;
    const V u = load_some(z + k, s.n - k);
    return bias_ ? u + V(bias_[j]) : u;
  }

  template <typename Y>
  const Y* targets(const Stretch& s, int64_t j) const {
    return static_cast<const Y*>(args_.dense_target) + s.i * args_.dense_stride + j * args_.dense_class_stride + s.p;
  }

  static LONGTAIL_INLINE Lanes<T> class_lanes(V u, V g, int64_t j) {
    const Mask<T> positive = g == V(T(j)), there = V(T(-1)) < g;
    return {u, V(T(0)), positive, Mask<T>{~positive.v & there.v}, true};
  }

  // Calls body(lanes), lanes(j, k): class j of the register that begins at pixel k.
  template <typename Body>
  void with_targets(const Stretch& s, const Body& body) const {
    const T ignored = static_cast<T>(args_.ignore_index);
    const auto dense = [&](int64_t j, int64_t k, const auto* y) __attribute__((always_inline)) {
      return dense_lanes<T>(logits(s, j, k), load_some(y + k, s.n - k), args_.ignoring, ignored);
    };
    if (args_.target) {
      body([&](int64_t j, int64_t k)
               __attribute__((always_inline)) { return class_lanes(logits(s, j, k), load(s.target + k), j); });
    } else if (args_.dense_is_wide) {
      body([&](int64_t j, int64_t k) __attribute__((always_inline)) { return dense(j, k, targets<T>(s, j)); });
    } else {
      body([&](int64_t j, int64_t k) __attribute__((always_inline)) { return dense(j, k, targets<Z>(s, j)); });
    }
  }

  // Logits and targets of some classes side by side: where they lie, classes are often a power of two apart, of which
  // the cache keeps few.
  struct Kept {
    T u[kClasses][kLongestStretch], y[kClasses][kLongestStretch];
  };

  template <typename Y>
  void keep(const Stretch& s, const Y* y, T* kept) const {
    for (int64_t k = 0; k < s.n; k += V::kLanes) store(kept + k, load_some(y + k, s.n - k));
  }

  template <bool kDense>
  __attribute__((noinline)) void add_classes(Stretch& s, int64_t first) const {
    const int64_t last = args_.num_classes - first < kClasses ? args_.num_classes : first + kClasses;
    Kept kept;
    for (int64_t j = first; j < last; ++j) {
      for (int64_t k = 0; k < s.n; k += V::kLanes) store(kept.u[j - first] + k, logits(s, j, k));
      if (kDense && args_.dense_is_wide) keep(s, targets<T>(s, j), kept.y[j - first]);
      if (kDense && !args_.dense_is_wide) keep(s, targets<Z>(s, j), kept.y[j - first]);
    }
    const T ignored = static_cast<T>(args_.ignore_index);
    const auto lanes = [&](int64_t j, int64_t k) __attribute__((always_inline)) {
      const V u = load(kept.u[j - first] + k);
      if constexpr (kDense) {
        return dense_lanes<T>(u, load(kept.y[j - first] + k), args_.ignoring, ignored);
      } else {
        return class_lanes(u, load(s.target + k), j);
      }
    };
    for (int64_t k = 0; k < s.n; k += V::kLanes) {
      Side<V> n = {load(s.m_n + k), load(s.d_n + k)}, p = {load(s.m_p + k), load(s.d_p + k)};
      Largest<T> largest;
      for (int64_t j = first; j < last; ++j) largest.add(lanes(j, k));
      raise_side(n, largest.negative, V(Loop::inverse_negative_), T(0));
      raise_side(p, largest.positive, V(Loop::inverse_positive_), T(0));
      const Exponents<T> m = Loop::exponents(finite_exponent(n.m), finite_exponent(p.m));
      SideSums<T> sums;
      for (int64_t j = first; j < last; ++j) sums.add(lanes(j, k), m);
      store(s.m_n + k, n.m);
      store(s.d_n + k, n.d + sums.negative);
      store(s.m_p + k, p.m);
      store(s.d_p + k, p.d + sums.positive);
      if (args_.target == nullptr && args_.joint) {
        store(s.counted + k, select(largest.any, V(T(1)), load(s.counted + k)));
      }
    }
  }

  // The losses and statistics of the pixels, and what multiplies their gradients, 0 where they do not count.
  void finish(Stretch& s) {
    const int64_t row = s.i * args_.pixels + s.p, column = args_.stats_column_stride;
    T v[kLongestStretch], loss[kLongestStretch], upstream[kLongestStretch];
    for (int64_t k = 0; k < kLongestStretch; ++k) v[k] = upstream[k] = T(1);
    for (int64_t k = 0; k < s.n; ++k) {
      const T* stats = Loop::stats(row + k);
      v[k] = Loop::weight(row + k);
      if (pass_ != Pass::loss) upstream[k] = Loop::upstream(row + k);
      if (pass_ != Pass::backward) continue;
      s.m_n[k] = stats[0];
      s.d_n[k] = stats[column];
      s.m_p[k] = stats[2 * column];
      s.d_p[k] = stats[3 * column];
      s.counted[k] = T(s.m_n[k] != 0 || s.d_n[k] != 0 || s.m_p[k] != 0 || s.d_p[k] != 0);
    }
    const V zero = T(0);
    for (int64_t k = 0; k < s.n; k += V::kLanes) {
      const auto counted = zero < load(s.counted + k);
      Side<V> n = {load(s.m_n + k), load(s.d_n + k)}, p = {load(s.m_p + k), load(s.d_p + k)};
      settle_side(n);
      settle_side(p);
      const TwoWayRow<V> found = Loop::template finish<V>(n, p, load(v + k));
      const V up = load(upstream + k);
      store(loss + k, select(counted, found.loss, zero));
      store(s.m_n + k, select(counted, n.m, zero));
      store(s.d_n + k, select(counted, n.d, zero));
      store(s.m_p + k, select(counted, p.m, zero));
      store(s.d_p + k, select(counted, p.d, zero));
      store(s.by_n + k, found.negative * up);
      store(s.by_p + k, found.positive * up);
    }
    for (int64_t k = 0; pass_ != Pass::backward && k < s.n; ++k) {
      T* stats = Loop::stats(row + k);
      static_cast<T*>(args_.loss)[row + k] = loss[k];
      stats[0] = s.m_n[k];
      stats[column] = s.d_n[k];
      stats[2 * column] = s.m_p[k];
      stats[3 * column] = s.d_p[k];
    }
  }

  template <typename At>
  __attribute__((noinline)) void write(const At& lanes, const Stretch& s) const {
    const V zero = T(0);
    for (int64_t j = 0; j < args_.num_classes; ++j) {
      Z* grad = static_cast<Z*>(args_.grad) + s.i * args_.grad_stride + j * args_.grad_class_stride + s.p;
      for (int64_t k = 0; k < s.n; k += V::kLanes) {
        const Exponents<T> m = Loop::exponents(finite_max(load(s.m_n + k)), finite_max(load(s.m_p + k)));
        const V du = gradient_of<Z>(lanes(j, k), m, load(s.by_n + k), load(s.by_p + k), true);
        store_some(grad + k, select(zero < load(s.counted + k), du, zero), s.n - k);
      }
    }
  }
};

template <typename Z, typename T>
int64_t two_way_loss_of(const TwoWayLossArgs& args, Pass pass, int64_t begin, int64_t end) {
  if (args.pixels > 0) return TwoWayPixels<Z, T>(args, pass).run(begin, end);
  return TwoWayRows<Z, T>(args, pass).run(begin, end);
}

inline int64_t two_way_loss_rows(const TwoWayLossArgs& args, Pass pass, int64_t begin, int64_t end) {
  switch (args.storage) {
    case Storage::float64:
      return two_way_loss_of<double, double>(args, pass, begin, end);
    case Storage::float32:
      return two_way_loss_of<float, float>(args, pass, begin, end);
    case Storage::bfloat16:
      return two_way_loss_of<bfloat16, float>(args, pass, begin, end);
    case Storage::float16:
      return two_way_loss_of<float16, float>(args, pass, begin, end);
  }
  return -1;
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
