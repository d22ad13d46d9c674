// A row whose target is a probability for each class: dense_math.h over vectors of logits and of targets.
#pragma once

#include <type_traits>

#include "../dense_math.h"
#include "reduce.cuh"

namespace longtail {
namespace gpu {

using DenseStats = longtail::generic::DenseStats<float>;
using DenseGrad = longtail::generic::DenseGrad<float>;

LONGTAIL_DEVICE void raise_max(DenseStats& s, float m) { longtail::generic::raise_max(s, m, HardwareExp()); }

// Of classes with logits u <= m and weighted probabilities q; `kCut`: whatever they are.
template <bool kCut, int kCount>
LONGTAIL_DEVICE DenseStats dense_sums_of(const float (&u)[kCount], const float (&q)[kCount], float m) {
  DenseStats sums = {m, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float behind = m - u[i];
    sums.d += exp_of(-behind);
    sums.V += kCut && q[i] == 0.0f ? 0.0f : q[i] * behind;
    sums.W += q[i];
  }
  return sums;
}

template <int kCount>
LONGTAIL_DEVICE void add(DenseStats& s, const float (&u)[kCount], const float (&q)[kCount]) {
  float m = s.m;
#pragma unroll
  for (int i = 0; i < kCount; ++i) m = fmaxf(m, u[i]);
  if (m > s.m) raise_max(s, m);
  DenseStats sums = dense_sums_of<false>(u, q, finite_max(m));
  if (sums.V != sums.V) sums = dense_sums_of<true>(u, q, finite_max(m));  // 0 * inf, rarely
  s.d += sums.d;
  s.V += sums.V;
  s.W += sums.W;
}

LONGTAIL_DEVICE DenseStats join_lanes(DenseStats s, int lanes) {
  raise_max(s, max_lanes(s.m, lanes));
  return {s.m, sum_lanes(s.d, lanes), sum_lanes(s.V, lanes), sum_lanes(s.W, lanes)};
}

// The stats of the whole row, in the warp that leads.
LONGTAIL_DEVICE DenseStats join_threads(Joint& joint, DenseStats s) {
  s = join_lanes(s, kWarpSize);
  const float4* slots = joint.exchange(float4{s.m, s.d, s.V, s.W});
  if (!joint.leads()) return s;
  DenseStats row = longtail::generic::empty_dense_stats<float>();
#pragma unroll 1
  for (int i = joint.lane(); i < joint.slots(); i += kWarpSize) {
    const float4 x = slots[i];
    row = longtail::generic::combine(row, {x.x, x.y, x.z, x.w}, HardwareExp());
  }
  return join_lanes(row, kWarpSize);
}

LONGTAIL_DEVICE float sample_weight_of(const SoftmaxLossArgs& a, int64_t index) {
  return a.sample_weight != nullptr ? a.sample_weight[index] : 1.0f;
}

LONGTAIL_DEVICE void store_dense_loss(const SoftmaxLossArgs& a, int64_t index, DenseStats s) {
  if (a.num_classes == 0) return ignore_at(a, index, Pass::loss, stats_of_row(a, index));
  s.m = s.d == s.d ? s.m : s.d;  // a maximum passes over NaN, a sum does not
  a.loss[index] = longtail::generic::finish(s, LossOptions<float>(a.options), sample_weight_of(a, index)).loss;
  stats_of_row(a, index).store({s.m, s.d, 0.0f, s.W, 0.0f});
}

LONGTAIL_DEVICE DenseGrad load_dense_grad(const SoftmaxLossArgs& a, int64_t index) {
  const Stats found = stats_of_row(a, index).load();
  const DenseStats s = {found.m, found.d, 0.0f, found.u_g};
  DenseGrad grad = longtail::generic::finish(s, LossOptions<float>(a.options), sample_weight_of(a, index)).grad;
  longtail::generic::scale_grad(grad, a.grad_loss[index * a.grad_loss_stride]);
  return grad;
}

// One row in one of the `width` threads of each of the `parts` blocks that share it. Threads take vectors of
// neighbouring classes; classes beside the vectors are taken singly.
template <typename Z, int kCount, bool kExtras>
class DenseRow {
 public:
  LONGTAIL_DEVICE DenseRow(const SoftmaxLossArgs& a, int64_t row, int thread, int width, int parts, int rank)
      : logits_(kept(static_cast<const Z*>(a.logits) + row * a.logits_stride)),
        wide_(a.dense_is_wide),
        target_(a.dense_target),
        target_row_(row * a.dense_stride),
        kept_(1.0f - a.options.label_smoothing),
        smooth_(a.smooth),
        classes_(static_cast<int>(a.num_classes)),
        head_(kCount > 1 ? head_of(logits_, classes_) : 0),
        elements_(a, head_),
        thread_(thread),
        width_(width) {
    const int all = (classes_ - head_) / kCount, each = (all + parts - 1) >> log2_of(parts);
    const int begin = min(all, rank * each), end = min(all, begin + each);
    first_ = head_ + (begin + thread) * kCount;
    end_ = head_ + end * kCount;
    beside_ = rank > 0 ? 0 : classes_ - all * kCount;
  }

  LONGTAIL_DEVICE DenseStats stats() const {
    DenseStats s = longtail::generic::empty_dense_stats<float>();
    each_vector([&](const auto& loaded, int column) {
      constexpr int kWidth = std::remove_reference_t<decltype(loaded)>::kWidth;
      float u[kWidth], q[kWidth];
      loaded.z.get(u);
      elements_.cap(u);
      weigh(loaded, column, u, q);
      add(s, u, q);
    });
    return s;
  }

  LONGTAIL_DEVICE void store_grad(const DenseGrad& g, Z* grad) const {
    each_vector([&](const auto& loaded, int column) {
      constexpr int kWidth = std::remove_reference_t<decltype(loaded)>::kWidth;
      float x[kWidth], u[kWidth], q[kWidth];
      loaded.z.get(x);
      elements_.cap(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) u[i] = x[i];
      weigh(loaded, column, u, q);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float e = exp_of(u[i] - g.m);
        u[i] = g.v * (g.mass * e - q[i]) + g.z * e;
      }
      elements_.stretch(u, column, 1.0f);
      elements_.uncap(x, u);
      Vector<Z, kWidth>::store(grad + column, u);
    });
  }

 private:
  // Vectors that a thread has under way.
  static constexpr int kGroup = kCount == 1 ? 4 : 2;

  // What is read of neighbouring classes, whose targets are of type Y.
  template <typename Y, int kNeighbours>
  struct Loaded {
    static constexpr int kWidth = kNeighbours, kVector = 16 / sizeof(Y);
    static constexpr int kTogether = kWidth < kVector ? kWidth : kVector;
    Vector<Z, kWidth> z;
    Vector<Y, kTogether> y[kWidth / kTogether];

    LONGTAIL_DEVICE void load(const Z* logits, const Y* target) {
      z.load(logits);
#pragma unroll
      for (int i = 0; i < kWidth; i += kTogether) y[i / kTogether].load(target + i);
    }

    LONGTAIL_DEVICE void get_target(float (&x)[kWidth]) const {
#pragma unroll
      for (int i = 0; i < kWidth; i += kTogether) {
        float part[kTogether];
        y[i / kTogether].get(part);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) x[i + k] = part[k];
      }
    }
  };

  // From capped to effective logits, and the weighted probabilities.
  template <typename Y, int kWidth>
  LONGTAIL_DEVICE void weigh(const Loaded<Y, kWidth>& loaded, int column, float (&u)[kWidth],
                             float (&q)[kWidth]) const {
    loaded.get_target(q);
    if constexpr (kExtras) {
      float x[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = u[i];
      elements_.to_effective(x, column, no_terms(), u);
      elements_.load_omega(column, x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        q[i] = longtail::generic::weighted_probability(x[i], kept_ * q[i] + smooth_, u[i]);
    }
  }

  template <int kVectors, typename Y, typename Take>
  LONGTAIL_DEVICE void take_vectors(const Y* target, int column, const Take& take) const {
    const int step = width_ * kCount;
    Loaded<Y, kCount> loaded[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) loaded[k].load(logits_ + (column + k * step), target + (column + k * step));
#pragma unroll
    for (int k = 0; k < kVectors; ++k) take(loaded[k], column + k * step);
  }

  // `take(loaded, column)` of all that this thread has.
  template <typename Take>
  LONGTAIL_DEVICE void each_vector(const Take& take) const {
    if constexpr (!std::is_same_v<Z, float>) {
      if (wide_) return each_vector(kept(static_cast<const float*>(target_) + target_row_), take);
    }
    each_vector(kept(static_cast<const Z*>(target_) + target_row_), take);
  }

  template <typename Y, typename Take>
  LONGTAIL_DEVICE void each_vector(const Y* target, const Take& take) const {
    const int step = width_ * kCount;
    int column = first_;
    // As often as every thread has a vector in each place: a warp never waits for some of its lanes' groups.
#pragma unroll 1
    for (; column - thread_ * kCount + kGroup * step <= end_; column += kGroup * step)
      take_vectors<kGroup>(target, column, take);
#pragma unroll 1
    for (; column < end_; column += step) take_vectors<1>(target, column, take);
    if constexpr (kCount > 1) {
#pragma unroll 1
      for (int i = thread_; i < beside_; i += width_) {
        const int single = i < head_ ? i : classes_ - beside_ + i;
        Loaded<Y, 1> loaded;
        loaded.load(logits_ + single, target + single);
        take(loaded, single);
      }
    }
  }

  const Z* const logits_;
  const bool wide_;
  const void* const target_;
  const int64_t target_row_;
  const float kept_, smooth_;
  const int classes_, head_;
  const Elements<kExtras> elements_;
  const int thread_, width_;
  int first_, end_;  // this thread's first vector, and the end of this block's
  int beside_;       // classes beside the vectors, which this block takes
};

}  // namespace gpu
}  // namespace longtail
