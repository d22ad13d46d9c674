// The sigmoid family over rows [N, C]: some lanes of a warp, a block, or a cluster of blocks per row, in one sweep.
#pragma once

#include "reduce.cuh"
#include "sigmoid_elements.cuh"

namespace longtail {
namespace gpu {

// One row in one of the `width` threads that share it.
template <typename Z, int kCount, bool kDense>
class SigmoidRow {
 public:
  LONGTAIL_DEVICE SigmoidRow(const SigmoidLossArgs& args, Pass pass, int64_t row, int thread, int width)
      : a_(args),
        thread_(thread),
        width_(width),
        logits_(static_cast<const Z*>(args.logits) + row * args.logits_stride),
        has_loss_(pass != Pass::backward),
        has_grad_(pass != Pass::loss),
        upstreams_(has_grad_ && args.elementwise_upstream ? args.grad_loss + row * args.num_classes : nullptr),
        losses_(has_loss_ && args.elementwise_loss ? args.loss + row * args.num_classes : nullptr),
        grad_(static_cast<Z*>(args.grad) + row * args.grad_stride),
        dense_(row * args.dense_stride),
        column_weight_(args.class_weight_by_target ? nullptr : args.weight) {
    factor_ = a_.sample_weight != nullptr ? a_.sample_weight[row] : 1.0f;
    upstream_ = has_grad_ && !a_.elementwise_upstream ? a_.grad_loss[row * a_.grad_loss_stride] : 0.0f;
    if constexpr (!kDense) load_target(row);
  }

  // Stores what is wanted of each element of part `rank` of `parts`; the sum of this thread's losses.
  LONGTAIL_DEVICE float sweep(int parts, int rank) {
    const int classes = static_cast<int>(a_.num_classes);
    const int head = kCount > 1 ? head_of(logits_, classes) : 0;
    const int all = (classes - head) / kCount, each = (all + parts - 1) >> log2_of(parts);
    const int begin = min(all, rank * each), end = min(all, begin + each);
    aligned_ = both_aligned(column_weight_, a_.pos_weight, head);
    float total = 0.0f;
    for (int i = begin + thread_; i < end; i += kGroup * width_) total += take_group(head, i, end);
    if constexpr (kCount > 1) {
      const int tail = classes - head - all * kCount;
      for (int i = thread_; rank == 0 && i < head + tail; i += width_)
        total += take_edge(i < head ? i : i - head + classes - tail);
    }
    return total;
  }

 private:
  static constexpr int kGroup = group_of(kCount);

  LONGTAIL_DEVICE void load_target(int64_t row) {
    const int64_t g = a_.target[row * a_.target_stride];
    const bool ignored = a_.ignoring && g == a_.ignore_index, valid = g >= 0 && g < a_.num_classes;
    LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
    target_ = -1;
    if (ignored || !valid) return;
    target_ = static_cast<int>(g);
    if (a_.class_weight_by_target) factor_ *= load_constant(a_.weight + g);
    positive_ = factor_ * a_.alpha_positive;
    if (a_.pos_weight != nullptr) positive_ *= load_constant(a_.pos_weight + g);
    factor_ *= a_.alpha_negative;
  }

  static LONGTAIL_DEVICE bool both_aligned(const float* p, const float* q, int column) {
    return (reinterpret_cast<uintptr_t>(p + column) % 16 == 0 || p == nullptr) &&
           (reinterpret_cast<uintptr_t>(q + column) % 16 == 0 || q == nullptr);
  }

  LONGTAIL_DEVICE bool counted() const { return kDense || target_ >= 0; }

  // What is read of neighbouring classes; y: dense targets.
  template <int kWidth>
  struct Loaded {
    Vector<Z, kWidth> z;
    float y[kDense ? kWidth : 1];
  };

  template <int kWidth>
  LONGTAIL_DEVICE void load(Loaded<kWidth>& to, int column) const {
    if (counted()) to.z.load(logits_ + column);
    if constexpr (kDense) {
      if (a_.dense_is_wide) {
        load_constants(static_cast<const float*>(a_.dense_target) + dense_, column, true, to.y);
      } else {
        Vector<Z, kWidth> narrow;
        narrow.load(static_cast<const Z*>(a_.dense_target) + dense_ + column);
        narrow.get(to.y);
      }
    }
  }

  // Vectors i, i + width, ... of those before `end`. Vector 0 begins at class `head`.
  LONGTAIL_DEVICE float take_group(int head, int first, int end) const {
    Loaded<kCount> loaded[kGroup];
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first + k * width_;
      loaded[k] = {};
      if (i < end) load(loaded[k], head + i * kCount);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first + k * width_;
      if (i < end) total += take(loaded[k], head + i * kCount, aligned_);
    }
    return total;
  }

  LONGTAIL_DEVICE float take_edge(int column) const {
    Loaded<1> loaded = {};
    load(loaded, column);
    return take(loaded, column, false);
  }

  // Neighbouring classes from `column` on: stores what is wanted of each, returns the sum of their losses.
  template <int kWidth>
  LONGTAIL_DEVICE float take(const Loaded<kWidth>& loaded, int column, bool aligned) const {
    float slope[kWidth] = {}, loss[kWidth] = {};
    unsigned ignored = counted() ? 0u : ~0u;  // by bits
    if (counted()) loaded.z.get(slope);
    if constexpr (kDense) {
      if (a_.ignoring) ignored = ignored_of(loaded.y, static_cast<float>(a_.ignore_index));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) loss[i] = loaded.y[i];
      dense(column, aligned, ignored, slope, loss);
    } else if (counted()) {
      one_class(column, aligned, slope, loss);
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total += loss[i];
    if (losses_ != nullptr) store_floats(losses_ + column, loss);
    if (has_grad_) store_grad(column, ignored, slope);
    return total;
  }

  template <int kWidth>
  LONGTAIL_DEVICE void store_grad(int column, unsigned ignored, float (&slope)[kWidth]) const {
    float up[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) up[i] = upstream_;
    if (upstreams_ != nullptr) load_constants(upstreams_, column, true, up);
    // An infinite upstream gradient must not turn the 0 of what does not count into NaN.
#pragma unroll
    for (int i = 0; i < kWidth; ++i) slope[i] = ignored >> i & 1u ? 0.0f : slope[i] * up[i];
    Vector<Z, kWidth>::store(grad_ + column, slope);
  }

  template <int kWidth>
  LONGTAIL_DEVICE void one_class(int column, bool aligned, float (&x)[kWidth], float (&c)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] = 1.0f;
    if (column_weight_ != nullptr) load_constants(column_weight_, column, aligned, c);
    const int place = target_ - column;
    const bool here = static_cast<unsigned>(place) < static_cast<unsigned>(kWidth);
    if (here) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        c[i] *= i == place ? positive_ : factor_;
        x[i] = i == place ? -x[i] : x[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) c[i] *= factor_;
    }
    class_elements(x, c, a_.gamma);
    if (!here) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = i == place ? -x[i] : x[i];
  }

  template <int kWidth>
  LONGTAIL_DEVICE void dense(int column, bool aligned, unsigned ignored, float (&z)[kWidth], float (&y)[kWidth]) const {
    const DenseOptions o = {a_.alpha_positive, a_.alpha_negative, a_.gamma};
    float c[kWidth], positive[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] = positive[i] = 1.0f;
    if (column_weight_ != nullptr) load_constants(column_weight_, column, aligned, c);
    if (a_.pos_weight != nullptr) load_constants(a_.pos_weight, column, aligned, positive);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] *= factor_;
    dense_elements(z, y, c, positive, ignored, o);
  }

  const SigmoidLossArgs& a_;
  const int thread_, width_;
  const Z* const logits_;
  const bool has_loss_, has_grad_;
  const float* const upstreams_;  // of each element, or null
  float* const losses_;           // of each element, or null
  Z* const grad_;
  const int64_t dense_;  // where the row's targets begin
  const float* const column_weight_;
  bool aligned_ = false;  // the class constants of a vector begin at 16-byte boundaries
  int target_ = 0;        // of class targets: -1 in a row that does not count
  float factor_;          // of every element; of class targets, of those of y = 0
  float positive_ = 0.0f;
  float upstream_;
};

// lanes: threads of a warp per row, or 0 for all threads of a cluster.
// reads: logits [N, C] once, ignored rows of class targets never; target [N], or [N, C] once; grad_loss (unless `loss`)
//   [N], or [N, C] once; the sample weight; weight and pos_weight [C] per row, from cache.
// writes: loss (unless `backward`) [N], or [N, C]; grad [N, C] (unless `loss`; may be the logits' own memory).
// bytes: one pass over each of the matrices named here, and some 24 N: the least there is.
template <typename Z, int kCount, bool kDense>
LONGTAIL_KERNEL(kBlockThreads, 2)
sigmoid_rows_kernel(LONGTAIL_PARAMETER SigmoidLossArgs a, Pass pass, int lanes) {
  Joint joint;
  const int width = lanes > 0 ? lanes : static_cast<int>(blockDim.x);
  const int team = static_cast<int>(threadIdx.x) >> log2_of(width),
            thread = static_cast<int>(threadIdx.x) & (width - 1);
  const int64_t rows_per_block = static_cast<int>(blockDim.x) >> log2_of(width);
  const int64_t teams = (gridDim.x >> log2_of(joint.cluster())) * rows_per_block;
  const bool summing = pass != Pass::backward && !a.elementwise_loss;
  // Every thread stays until the last row of its block is done: the sums need them all.
  for (int64_t first = (blockIdx.x >> log2_of(joint.cluster())) * rows_per_block; first < a.rows; first += teams) {
    const int64_t place = first + team;
    const int64_t index = pass == Pass::backward ? a.rows - 1 - place : place;
    float total = 0.0f;
    if (place < a.rows) {
      SigmoidRow<Z, kCount, kDense> row(a, pass, index, thread, width);
      total = row.sweep(joint.cluster(), joint.rank());
    }
    if (!summing) continue;
    total = lanes > 0 ? sum_lanes(total, lanes) : joint.sum(total);
    if (place < a.rows && thread == 0 && joint.rank() == 0) a.loss[index] = total;
    joint.next_row();
  }
  joint.meet();
}

}  // namespace gpu
}  // namespace longtail
