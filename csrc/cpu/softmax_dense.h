// The row loop of the softmax family for targets that are a probability for each class, written once and compiled once
// per instruction set.
//
// Forward reads logits and targets once, backward reads both once and writes the gradient once: of float32, 8 and 12
// bytes a class. Logits are taken a block at a time: their maximum, then the sums with the targets, from the
// first-level cache.
#pragma once

#include <type_traits>

#include "../dense_math.h"
#include "softmax_any.h"

namespace longtail {
namespace LONGTAIL_ISA {

// ---- Where q_j comes from: `whole` reads a register of them, `some` what is left, 0 beyond ----

// The targets themselves. Y: their storage type.
template <typename Y>
struct Probabilities {
  using T = typename Stored<Y>::Arithmetic;
  const Y* y;
  LONGTAIL_INLINE Vec<T> whole(int64_t j, Vec<T>) const { return load(y + j); }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count, Vec<T>) const { return widen(y + j, load_raw(y + j, count)); }
  LONGTAIL_INLINE Probabilities from(int64_t j) const { return {y + j}; }
};

// With label smoothing and weights.
template <typename Y>
struct WeightedProbabilities {
  using T = typename Stored<Y>::Arithmetic;
  const Y* y;
  T kept, share;  // 1 - epsilon, epsilon / C
  PerClass<T> weight;
  int64_t first;
  LONGTAIL_INLINE Vec<T> whole(int64_t j, Vec<T> u) const {
    const Vec<T> smoothed = load(y + j) * Vec<T>(kept) + Vec<T>(share);
    return weighted_probability(weight.some(first + j, Vec<T>::kLanes), smoothed, u);
  }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count, Vec<T> u) const {
    const Vec<T> smoothed = widen(y + j, load_raw(y + j, count)) * Vec<T>(kept) + Vec<T>(share);
    const Vec<T> q = weighted_probability(weight.some(first + j, count), smoothed, u);
    return select(lane_numbers<T>() < Vec<T>(T(count)), q, Vec<T>(T(0)));
  }
  LONGTAIL_INLINE WeightedProbabilities from(int64_t j) const { return {y + j, kept, share, weight, first + j}; }
};

// d, V and W of DenseStats, lane by lane.
template <typename T>
struct DenseSums {
  Vec<T> d = T(0), V = T(0), W = T(0);

  LONGTAIL_INLINE void add(Vec<T> u, Vec<T> q, Vec<T> m) {
    DenseStats<Vec<T>> s = {m, d, V, W};
    accumulate(s, m, u, q, Summed<T>());
    d = s.d, V = s.V, W = s.W;
  }
  LONGTAIL_INLINE void add(const DenseSums& other) { d = d + other.d, V = V + other.V, W = W + other.W; }
};

// Of n classes with logits `u`, none above m, and targets `p`.
template <typename U, typename P, typename T = typename U::T>
LONGTAIL_INLINE DenseSums<T> dense_sums_of(const U u, const P p, int64_t n, Vec<T> m) {
  constexpr int kLanes = Vec<T>::kLanes;
  DenseSums<T> even, odd;
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    u.prefetch(j);
    prefetch_ahead(p.y + j, 2 * kLanes);
    const Vec<T> first = u.whole(j), second = u.whole(j + kLanes);
    even.add(first, p.whole(j, first), m);
    odd.add(second, p.whole(j + kLanes, second), m);
  }
  for (; j + kLanes <= n; j += kLanes) {
    const Vec<T> whole = u.whole(j);
    even.add(whole, p.whole(j, whole), m);
  }
  if (j < n) {
    const Vec<T> rest = u.some(j, n - j);
    odd.add(rest, p.some(j, n - j, rest), m);
  }
  even.add(odd);
  return even;
}

// Z: storage type of the logits; Y: of the targets; T: type of the arithmetic.
template <typename Z, typename Y, typename T>
class SoftmaxDense {
 public:
  SoftmaxDense(const SoftmaxLossArgs& args, Pass pass)
      : args_(args),
        pass_(pass),
        bias_(static_cast<const T*>(args.class_bias)),
        weight_(static_cast<const T*>(args.weight), kOnes<T>),
        class_scale_(static_cast<const T*>(args.class_scale), kOnes<T>),
        capping_(args),
        options_(convert<T>(args.options)),
        share_(static_cast<T>(args.options.label_smoothing / static_cast<double>(args.num_classes))),
        plain_(effect_of(args) == Effect::none && args.weight == nullptr),
        has_class_scale_(args.class_scale != nullptr) {}

  int64_t run(int64_t begin, int64_t end) const {
    if (args_.num_classes == 0) return clear(begin, end);
    const int64_t together = args_.num_classes > kGroupedClasses ? 1 : kLanes;
    for (int64_t i = begin; i < end; i += together) run_group(i, end - i < together ? end : i + together);
    if (args_.stream) stream_end();
    return -1;
  }

 private:
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr T kLowest = ExpRange<T>::kLowest;

  // Of no classes the losses are 0.
  int64_t clear(int64_t begin, int64_t end) const {
    if (pass_ != Pass::loss) return -1;
    memset(static_cast<T*>(args_.loss) + begin, 0, (end - begin) * sizeof(T));
    memset(static_cast<T*>(args_.stats) + 5 * begin, 0, 5 * (end - begin) * sizeof(T));
    return -1;
  }

  struct Group {
    T m[kLanes] = {}, d[kLanes] = {}, V[kLanes] = {}, W[kLanes] = {}, sample_weight[kLanes] = {};
  };

  void run_group(int64_t begin, int64_t end) const {
    Group group;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i - begin;
      T* const stats = static_cast<T*>(args_.stats) + 5 * i;
      if (pass_ == Pass::loss) {
        const DenseStats<T> s = row_stats(logits(i), targets(i));
        const T values[5] = {s.m, s.d, T(0), s.W, T(0)};
        memcpy(stats, values, sizeof(values));
        group.V[k] = s.V;
      }
      group.m[k] = stats[0], group.d[k] = stats[1], group.W[k] = stats[3];
      group.sample_weight[k] = args_.sample_weight ? static_cast<const T*>(args_.sample_weight)[i] : T(1);
    }
    const DenseStats<V> stats = {load(group.m), load(group.d), load(group.V), load(group.W)};
    const DenseLoss<V> found = finish(stats, options_, load(group.sample_weight));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i - begin;
      if (pass_ == Pass::loss) {
        static_cast<T*>(args_.loss)[i] = found.loss.v[k];
        continue;
      }
      DenseGrad<T> row = {found.grad.m.v[k], found.grad.mass.v[k], found.grad.v.v[k], found.grad.z.v[k]};
      scale_grad(row, static_cast<const T*>(args_.grad_loss)[i * args_.grad_loss_stride]);
      write_grad(logits(i), targets(i), row, static_cast<Z*>(args_.grad) + i * args_.grad_stride);
    }
  }

  LONGTAIL_INLINE const Z* logits(int64_t i) const {
    return static_cast<const Z*>(args_.logits) + i * args_.logits_stride;
  }

  LONGTAIL_INLINE const Y* targets(int64_t i) const {
    return static_cast<const Y*>(args_.dense_target) + i * args_.dense_stride;
  }

  LONGTAIL_INLINE WeightedProbabilities<Y> weighted(const Y* y) const {
    return {y, T(1) - options_.label_smoothing, share_, weight_, 0};
  }

  template <bool kCapped, Tail kTail>
  LONGTAIL_INLINE AnyLogits<Z, kCapped, kTail> any_logits(const Z* z) const {
    const RowTail<T> tail = {class_scale_, {nullptr, kZeros<T>}, no_terms<T>(), T(0)};
    return {z, nullptr, PerClass<T>(bias_, kZeros<T>), capping_, tail};
  }

  // `body` with what is asked of each logit, as constants.
  template <typename Body>
  LONGTAIL_INLINE void choose(const Body& body) const {
    const std::integral_constant<Tail, Tail::none> none;
    const std::integral_constant<Tail, Tail::scales> scales;
    if (capping_.softcap != T(0)) {
      has_class_scale_ ? body(std::true_type(), scales) : body(std::true_type(), none);
    } else {
      has_class_scale_ ? body(std::false_type(), scales) : body(std::false_type(), none);
    }
  }

  struct Running {
    T m = -INFINITY;
    DenseSums<T> sums;
  };

  DenseStats<T> row_stats(const Z* z, const Y* y) const {
    Running running;
    for (int64_t begin = 0; begin < args_.num_classes; begin += kBlock) {
      const int64_t left = args_.num_classes - begin, n = left < kBlock ? left : kBlock;
      if (plain_) {
        add_block(Logits<Z>{z + begin}, Probabilities<Y>{y + begin}, n, running);
      } else if (capping_.softcap != T(0) || capping_.scale != T(1) || has_class_scale_) {
        choose([&](auto capped, auto tail) { add_computed_block<capped.value, tail.value>(z, y, begin, n, running); });
      } else if (bias_) {
        add_block(BiasedLogits<Z>{z + begin, bias_ + begin}, weighted(y).from(begin), n, running);
      } else {
        add_block(Logits<Z>{z + begin}, weighted(y).from(begin), n, running);
      }
    }
    const DenseSums<T>& sums = running.sums;
    return {running.m, horizontal_sum(sums.d), horizontal_sum(sums.V), horizontal_sum(sums.W)};
  }

  // Functions of their own, as those of SoftmaxRows.
  template <typename U, typename P>
  __attribute__((noinline)) static void add_block(const U u, const P p, int64_t n, Running& running) {
    raise(horizontal_max(largest_of(u, 0, n, V(T(-INFINITY)))), running);
    running.sums.add(dense_sums_of(u, p, n, V(finite_max(running.m))));
  }

  template <bool kCapped, Tail kTail>
  __attribute__((noinline)) void add_computed_block(const Z* z, const Y* y, int64_t begin, int64_t n,
                                                    Running& running) const {
    T u[kBlock];
    const AnyLogits<Z, kCapped, kTail> of = any_logits<kCapped, kTail>(z);
    const V largest = compute<false>(of, weight_, begin, begin + n, V(T(0)), u).largest;
    raise(horizontal_max(largest), running);
    running.sums.add(dense_sums_of(Computed<T>{u}, weighted(y).from(begin), n, V(finite_max(running.m))));
  }

  static LONGTAIL_INLINE void raise(T block_max, Running& running) {
    if (!(block_max > running.m)) return;
    if (running.m == T(-INFINITY)) {  // nothing that it would move: d is 0, V 0 or infinite
      running.m = block_max;
      return;
    }
    DenseStats<V> raised = {V(running.m), running.sums.d, running.sums.V, running.sums.W};
    raise_max(raised, V(block_max), kLowest);
    running.sums.d = raised.d, running.sums.V = raised.V;
    running.m = block_max;
  }

  void write_grad(const Z* z, const Y* y, const DenseGrad<T>& row, Z* grad) const {
    if (plain_) return write_plain_grad(z, y, row, grad);
    choose([&](auto capped, auto tail) { write_any_grad<capped.value, tail.value>(z, y, row, grad); });
  }

  __attribute__((noinline)) void write_plain_grad(const Z* z, const Y* y, const DenseGrad<T>& row, Z* grad) const {
    const DenseGrad<V> g = {V(row.m), V(row.mass), V(row.v), V(row.z)};
    const Logits<Z> u = {z};
    const Probabilities<Y> p = {y};
    const auto of = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      prefetch_ahead(z + j, kLanes);
      prefetch_ahead(y + j, kLanes);
      if (n == kLanes) {
        const V x = u.whole(j);
        return apply(g, x, p.whole(j, x), kLowest);
      }
      const V x = u.some(j, n);
      return apply(g, x, p.some(j, n, x), kLowest);
    };
    if constexpr (kStreams<Z>) {
      if (args_.stream) return write_each<true>(of, args_.num_classes, grad);
    }
    write_each<false>(of, args_.num_classes, grad);
  }

  template <bool kCapped, Tail kTail>
  __attribute__((noinline)) void write_any_grad(const Z* z, const Y* y, const DenseGrad<T>& row, Z* grad) const {
    const AnyLogits<Z, kCapped, kTail> of = any_logits<kCapped, kTail>(z);
    const WeightedProbabilities<Y> p = weighted(y);
    const V scale = capping_.scale;
    const DenseGrad<V> g = {V(row.m), V(row.mass), V(row.v) * scale, V(row.z) * scale};
    const auto step = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      prefetch_ahead(z + j, kLanes);
      prefetch_ahead(y + j, kLanes);
      const V x = of.x(j, n), u = of.effective(x, j, n);
      const V dz = of.stretched(apply(g, u, n == kLanes ? p.whole(j, u) : p.some(j, n, u), kLowest), j, n);
      return kCapped ? dz - dz * (x * x) : dz;
    };
    write_each<false>(step, args_.num_classes, grad);
  }

  const SoftmaxLossArgs& args_;
  const Pass pass_;
  const T* const bias_;
  const PerClass<T> weight_, class_scale_;
  const Capping<T> capping_;
  const LossOptions<T> options_;
  const T share_;
  const bool plain_, has_class_scale_;
};

template <typename Z, typename T>
int64_t softmax_dense_of(const SoftmaxLossArgs& args, Pass pass, int64_t begin, int64_t end) {
  if constexpr (!std::is_same_v<Z, T>) {
    if (args.dense_is_wide) return SoftmaxDense<Z, T, T>(args, pass).run(begin, end);
  }
  return SoftmaxDense<Z, Z, T>(args, pass).run(begin, end);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
