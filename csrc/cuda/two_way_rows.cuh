// ZLPR and the two-way loss over rows [N, C]: some lanes of a warp, a block, or a cluster of blocks per row, in one
// sweep for the loss and one for the gradient.
#pragma once

#include <type_traits>

#include "two_way_sides.cuh"

namespace longtail {
namespace gpu {

// One row in one of the `width` threads of each of the `parts` blocks that share it. Threads take vectors of
// neighbouring classes; classes beside the vectors are taken singly.
template <typename Z, int kCount, bool kDense>
class SidesRow {
 public:
  LONGTAIL_DEVICE SidesRow(const TwoWayLossArgs& a, int64_t row, int thread, int width, int parts, int rank)
      : a_(a),
        inverses_(a),
        logits_(kept(static_cast<const Z*>(a.logits) + row * a.logits_stride)),
        target_row_(row * a.dense_stride),
        target_(kDense ? 0 : class_target(a, row)),
        classes_(static_cast<int>(a.num_classes)),
        head_(kCount > 1 ? head_of(logits_, classes_) : 0),
        aligned_(reinterpret_cast<uintptr_t>(a.class_bias + head_) % 16 == 0),
        thread_(thread),
        width_(width) {
    const int all = (classes_ - head_) / kCount, each = (all + parts - 1) >> log2_of(parts);
    const int begin = min(all, rank * each), end = min(all, begin + each);
    first_ = head_ + (begin + thread) * kCount;
    end_ = head_ + end * kCount;
    beside_ = rank > 0 ? 0 : classes_ - all * kCount;
  }

  // Whether a class target counts.
  LONGTAIL_DEVICE bool counted() const { return target_ >= 0; }

  LONGTAIL_DEVICE Sides sums() const {
    Sides s = empty_sides();
    each_vector([&](const auto& loaded, int column) {
      constexpr int kWidth = std::remove_reference_t<decltype(loaded)>::kWidth;
      float u[kWidth], y[kWidth];
      effective(loaded, column, u);
      if (only_negatives<kWidth>(column)) return add_negatives(s.n, u, inverses_.n);
      add_sides(s, u, y, targets(loaded, column, y), inverses_);
    });
    return s;
  }

  LONGTAIL_DEVICE void store_grad(const SideTerms& g, Z* grad) const {
    if (!g.counted) return store_zeros(grad);
    each_vector([&](const auto& loaded, int column) {
      constexpr int kWidth = std::remove_reference_t<decltype(loaded)>::kWidth;
      float u[kWidth], y[kWidth];
      effective(loaded, column, u);
      if (only_negatives<kWidth>(column)) {
        negative_gradient(u, g, inverses_.n);
      } else {
        const unsigned ignored = targets(loaded, column, y);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) u[i] = ignored >> i & 1u ? 0.0f : side_gradient(u[i], y[i], g, inverses_);
      }
      Vector<Z, kWidth>::store(grad + column, u);
    });
  }

 private:
  // Vectors that a thread has under way.
  static constexpr int kGroup = kCount == 1 ? 4 : 2;

  // What is read of neighbouring classes, whose targets, where they have any, are of type Y.
  template <typename Y, int kNeighbours>
  struct Loaded {
    static constexpr int kWidth = kNeighbours, kVector = 16 / sizeof(Y);
    static constexpr int kTogether = kWidth < kVector ? kWidth : kVector;
    Vector<Z, kWidth> z;
    Vector<Y, kTogether> y[kDense ? kWidth / kTogether : 1];

    LONGTAIL_DEVICE void load(const Z* logits, const Y* target) {
      z.load(logits);
      if constexpr (kDense) {
#pragma unroll
        for (int i = 0; i < kWidth; i += kTogether) y[i / kTogether].load(target + i);
      }
    }
  };

  template <int kWidth>
  LONGTAIL_DEVICE bool only_negatives(int column) const {
    return !kDense && static_cast<unsigned>(target_ - column) >= static_cast<unsigned>(kWidth);
  }

  // Effective logits of neighbours from `column` on.
  template <typename Y, int kWidth>
  LONGTAIL_DEVICE void effective(const Loaded<Y, kWidth>& loaded, int column, float (&u)[kWidth]) const {
    loaded.z.get(u);
    if (a_.class_bias == nullptr) return;
    float b[kWidth];
    load_constants(a_.class_bias, column, aligned_, b);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) u[i] += b[i];
  }

  // Their targets; those that do not count, by bits.
  template <typename Y, int kWidth>
  LONGTAIL_DEVICE unsigned targets(const Loaded<Y, kWidth>& loaded, int column, float (&y)[kWidth]) const {
    if constexpr (!kDense) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] = column + i == target_ ? 1.0f : 0.0f;
      return 0;
    } else {
      constexpr int kTogether = Loaded<Y, kWidth>::kTogether;
#pragma unroll
      for (int i = 0; i < kWidth; i += kTogether) {
        float part[kTogether];
        loaded.y[i / kTogether].get(part);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) y[i + k] = part[k];
      }
      return uncounted(a_, y);
    }
  }

  // The gradient of a row that does not count, whose logits are not read.
  LONGTAIL_DEVICE void store_zeros(Z* grad) const {
    const float zeros[kCount] = {}, zero[1] = {};
    for (int column = first_; column < end_; column += width_ * kCount) Vector<Z, kCount>::store(grad + column, zeros);
    for (int i = thread_; i < beside_; i += width_) Vector<Z, 1>::store(grad + single(i), zero);
  }

  // The i-th class that is taken singly.
  LONGTAIL_DEVICE int single(int i) const { return i < head_ ? i : classes_ - beside_ + i; }

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
    if constexpr (kDense && !std::is_same_v<Z, float>) {
      if (a_.dense_is_wide) return each_vector(kept(static_cast<const float*>(a_.dense_target) + target_row_), take);
    }
    each_vector(kDense ? kept(static_cast<const Z*>(a_.dense_target) + target_row_) : logits_, take);
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
        Loaded<Y, 1> loaded;
        loaded.load(logits_ + single(i), target + single(i));
        take(loaded, single(i));
      }
    }
  }

  const TwoWayLossArgs& a_;
  const Inverses inverses_;
  const Z* const logits_;
  const int64_t target_row_;
  const int target_;  // of class targets: -1 in a row that does not count
  const int classes_, head_;
  const bool aligned_;  // class_bias of a vector lies at a 16-byte boundary
  const int thread_, width_;
  int first_, end_;  // this thread's first vector, and the end of this block's
  int beside_;       // classes beside the vectors, which this block takes
};

// lanes: threads of a warp per row, or 0 for all threads of a cluster.
// reads: logits [N, C] once, with both passes twice, the second time from cache, ignored rows never; target [N], or
//   [N, C] as often; per row the sample weight, for a gradient the upstream gradient and, for `backward`, the stats
//   [N, 4]; class_bias [C] per row, from cache.
// writes: loss [N] and stats [N, 4] (unless `backward`); grad [N, C] (unless `loss`; may be the logits' own memory).
// bytes: one pass over each of the matrices named here, and some 40 N: the least there is.
template <typename Z, int kCount, bool kDense, typename PassOf>
LONGTAIL_KERNEL(kBlockThreads, kTwoWayResident)
two_way_rows_kernel(LONGTAIL_PARAMETER TwoWayLossArgs a, PassOf pass, int lanes) {
  Joint joint;
  const int width = lanes > 0 ? lanes : static_cast<int>(blockDim.x);
  const int team = static_cast<int>(threadIdx.x) >> log2_of(width),
            thread = static_cast<int>(threadIdx.x) & (width - 1);
  const int64_t rows_per_block = static_cast<int>(blockDim.x) >> log2_of(width);
  const int64_t teams = (gridDim.x >> log2_of(joint.cluster())) * rows_per_block;
  const Inverses inverses(a);
  // Every thread stays until the last row of its block is done: the joins need them all.
  for (int64_t first = (blockIdx.x >> log2_of(joint.cluster())) * rows_per_block; first < a.rows; first += teams) {
    const int64_t place = min(first + team, a.rows - 1);  // a team without a row repeats the last, and stores nothing
    const int64_t index = pass == Pass::backward ? a.rows - 1 - place : place;
    const bool exists = first + team < a.rows;
    const SidesRow<Z, kCount, kDense> row(a, index, thread, width, joint.cluster(), joint.rank());
    Sides s = empty_sides();
    if (pass != Pass::backward) {
      if (exists && row.counted()) s = row.sums();
      s = lanes > 0 ? join_lanes(s, inverses, lanes) : join_threads(joint, s, inverses);
    }
    SideTerms g = {};
    if (lanes > 0 || joint.leads()) {
      g = finish_sides_of(a, index, s, row.counted(), pass, exists && thread == 0 && joint.rank() == 0);
    }
    if (pass != Pass::loss) {
      if (lanes == 0) {
        const Grad shared = joint.share({g.m_n, g.by_n, g.m_p, g.by_p, g.counted ? 1.0f : 0.0f});
        g = {shared.m, shared.a, shared.b, shared.S, shared.target != 0.0f};
      }
      if (exists) row.store_grad(g, kept(static_cast<Z*>(a.grad) + index * a.grad_stride));
    }
    joint.next_row();
  }
  joint.meet();
}

}  // namespace gpu
}  // namespace longtail
