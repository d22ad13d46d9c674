// The sigmoid family over rows [N, C]: some lanes of a warp, a block, or a cluster of blocks per row, in one sweep.
#pragma once

#include "reduce.cuh"
#include "sigmoid_elements.cuh"

namespace longtail {
namespace gpu {

// One row in one of the `width` threads that share it. Threads take vectors of neighbouring classes; classes beside
// the vectors, and those of the vector with a class target, are taken singly.
template <typename Z, int kCount, bool kDense, typename PassOf>
class SigmoidRow {
 public:
  LONGTAIL_DEVICE SigmoidRow(const SigmoidLossArgs& args, PassOf pass, int64_t row, int thread, int width)
      : a_(args),
        thread_(thread),
        width_(width),
        logits_(kept(static_cast<const Z*>(args.logits) + row * args.logits_stride)),
        has_loss_(pass != Pass::backward),
        has_grad_(pass != Pass::loss),
        upstreams_(has_grad_ && args.elementwise_upstream ? args.grad_loss + row * args.num_classes : nullptr),
        losses_(has_loss_ && args.elementwise_loss ? args.loss + row * args.num_classes : nullptr),
        grad_(has_grad_ ? kept(static_cast<Z*>(args.grad) + row * args.grad_stride) : nullptr),
        dense_(row * args.dense_stride),
        column_weight_(args.class_weight_by_target ? nullptr : args.weight) {
    factor_ = a_.sample_weight != nullptr ? a_.sample_weight[row] : 1.0f;
    upstream_ = has_grad_ && !a_.elementwise_upstream ? a_.grad_loss[row * a_.grad_loss_stride] : 0.0f;
    if constexpr (!kDense) load_target(row);
  }

  // Stores what is wanted of each element of part `rank` of `parts`; the sum of this thread's losses.
  LONGTAIL_DEVICE float sweep(int parts, int rank) {
    const int classes = static_cast<int>(a_.num_classes);
    head_ = kCount > 1 ? head_of(logits_, classes) : 0;
    const int all = (classes - head_) / kCount, each = (all + parts - 1) >> log2_of(parts);
    const int begin = min(all, rank * each), end = min(all, begin + each);
    first_ = head_ + (begin + thread_) * kCount;
    end_ = head_ + end * kCount;
    aligned_ = both_aligned(column_weight_, a_.pos_weight, head_);
    edges_ = singles_ = classes - all * kCount;
    const int place = target_ - head_;
    if (!kDense && place >= 0 && place < all * kCount) {
      apart_ = target_ - place % kCount;
      singles_ += kCount;
    }
    if (rank > 0) singles_ = 0;
    if (!kDense && target_ < 0) return blank();
    switch (focus_of(a_.gamma)) {
      case Focus::none:
        return sweep<Focus::none>();
      case Focus::square:
        return sweep<Focus::square>();
      default:
        return sweep<Focus::power>();
    }
  }

 private:
  static constexpr int kGroup = sigmoid_group(kCount, kDense, kOne<PassOf>);
  using Hard = HardElements<Z, PassOf>;

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

  // The i-th class that is taken singly: those beside the vectors, then those of the target's vector.
  LONGTAIL_DEVICE int single(int i) const {
    const int classes = static_cast<int>(a_.num_classes);
    return i < head_ ? i : i < edges_ ? i - edges_ + classes : i - edges_ + apart_;
  }

  // A row that does not count.
  LONGTAIL_DEVICE float blank() const {
    if (!has_grad_ && losses_ == nullptr) return 0.0f;
    const float zeros[kCount] = {}, zero[1] = {};
    for (int column = first_; column < end_; column += width_ * kCount) store(column, zeros, zeros);
    for (int i = thread_; i < singles_; i += width_) store(single(i), zero, zero);
    return 0.0f;
  }

  template <Focus kFocus>
  LONGTAIL_DEVICE float sweep() const {
    constexpr bool kMayBeAlike = !kDense && kCount > 1;
    const bool alike = column_weight_ == nullptr && upstreams_ == nullptr && losses_ == nullptr;
    float total =
        kMayBeAlike && alike ? factor_ * sweep_vectors<kFocus, kMayBeAlike>() : sweep_vectors<kFocus, false>();
    for (int i = thread_; i < singles_; i += width_) total += take_single<kFocus>(single(i));
    return total;
  }

  // kAlike: the elements of class targets have one factor, which the sum still lacks, and their losses are not stored.
  template <Focus kFocus, bool kAlike>
  LONGTAIL_DEVICE float sweep_vectors() const {
    const int step = width_ * kCount;
    float total = 0.0f;
    int column = first_;
    if constexpr (kAlike || kCount == 1) {
      // As often as every thread has a vector in each place: a warp never waits for some of its lanes' groups.
      for (; column - thread_ * kCount + kGroup * step <= end_; column += kGroup * step)
        total += take_vectors<kFocus, kAlike, kGroup>(column);
    }
    for (; column < end_; column += step) total += take_vectors<kFocus, kAlike, 1>(column);
    return total;
  }

  // The vector at `column` and this thread's next: all are read before one is computed. Not the vector taken apart,
  // which others may be writing.
  template <Focus kFocus, bool kAlike, int kVectors>
  LONGTAIL_DEVICE float take_vectors(int column) const {
    const int step = width_ * kCount;
    Loaded<kCount> loaded[kVectors] = {};
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (column + k * step != apart_) load(loaded[k], column + k * step);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) total += take<kFocus, kAlike>(loaded[k], column + k * step);
    return total;
  }

  // What is read of neighbouring classes; y: dense targets.
  template <int kWidth>
  struct Loaded {
    Vector<Z, kWidth> z;
    float y[kDense ? kWidth : 1];
  };

  template <int kWidth>
  LONGTAIL_DEVICE void load(Loaded<kWidth>& to, int column) const {
    to.z.load(logits_ + column);
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

  template <Focus kFocus, bool kAlike>
  LONGTAIL_DEVICE float take(const Loaded<kCount>& loaded, int column) const {
    if constexpr (kDense) return take_dense<kFocus>(loaded, column, aligned_);
    return take_negatives<kFocus, kAlike>(loaded, column);
  }

  // Each of these takes neighbouring classes from `column` on: stores what is wanted, returns the sum of the losses.

  // None of them is the target: of its vector nothing is stored or returned.
  template <Focus kFocus, bool kAlike>
  LONGTAIL_DEVICE float take_negatives(const Loaded<kCount>& loaded, int column) const {
    float x[kCount], loss[kCount], c[kCount], total = 0.0f;
    loaded.z.get(x);
    if (!kAlike) load_factors(column, aligned_, c, factor_);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Element<float> element = Hard::template at<kFocus>(x[i], a_.gamma);
      loss[i] = kAlike ? element.loss : c[i] * element.loss;
      x[i] = (kAlike ? factor_ * upstream_ : c[i]) * element.slope;
      total += loss[i];
    }
    if (column == apart_) return 0.0f;
    if (kAlike) {
      if (has_grad_) Vector<Z, kCount>::store(grad_ + column, x);
    } else {
      times_upstream(column, x);
      store(column, x, loss);
    }
    return total;
  }

  template <Focus kFocus>
  LONGTAIL_DEVICE float take_single(int column) const {
    Loaded<1> loaded;
    load(loaded, column);
    if constexpr (kDense) return take_dense<kFocus>(loaded, column, false);
    const bool one = column == target_;
    float x[1], c[1];
    loaded.z.get(x);
    const Element<float> element = Hard::template at<kFocus>(one ? -x[0] : x[0], a_.gamma);
    load_factors(column, false, c, one ? positive_ : factor_);
    x[0] = c[0] * (one ? -element.slope : element.slope);
    c[0] *= element.loss;
    times_upstream(column, x);
    store(column, x, c);
    return c[0];
  }

  template <Focus kFocus, int kWidth>
  LONGTAIL_DEVICE float take_dense(const Loaded<kWidth>& loaded, int column, bool aligned) const {
    const DenseOptions o = {a_.alpha_positive, a_.alpha_negative, a_.gamma};
    float z[kWidth], y[kWidth], c[kWidth], positive[kWidth], total = 0.0f;
    loaded.z.get(z);
    unsigned ignored = 0;  // by bits
    if (a_.ignoring) ignored = ignored_of(loaded.y, static_cast<float>(a_.ignore_index));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      y[i] = loaded.y[i];
      positive[i] = 1.0f;
    }
    load_factors(column, aligned, c, factor_);
    if (a_.pos_weight != nullptr) load_constants(a_.pos_weight, column, aligned, positive);
    dense_elements<Hard, kFocus>(z, y, c, positive, ignored, o);
    times_upstream(column, z);
    // An infinite upstream gradient must not turn the 0 of what does not count into NaN.
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      z[i] = ignored >> i & 1u ? 0.0f : z[i];
      total += y[i];
    }
    store(column, z, y);
    return total;
  }

  template <int kWidth>
  LONGTAIL_DEVICE void load_factors(int column, bool aligned, float (&c)[kWidth], float factor) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] = 1.0f;
    if (column_weight_ != nullptr) load_constants(column_weight_, column, aligned, c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] *= factor;
  }

  template <int kWidth>
  LONGTAIL_DEVICE void times_upstream(int column, float (&x)[kWidth]) const {
    float up[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) up[i] = upstream_;
    if (upstreams_ != nullptr) load_constants(upstreams_, column, true, up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] *= up[i];
  }

  template <int kWidth>
  LONGTAIL_DEVICE void store(int column, const float (&slope)[kWidth], const float (&loss)[kWidth]) const {
    if (losses_ != nullptr) store_floats(losses_ + column, loss);
    if (has_grad_) Vector<Z, kWidth>::store(grad_ + column, slope);
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
  int head_;             // classes before the first vector
  int first_, end_;      // this thread's first vector, and the end of this block's
  int edges_, singles_;  // classes beside the vectors, and all that this block takes singly
  int apart_ = -1;       // where the target's vector begins
  bool aligned_;         // the class constants of a vector begin at 16-byte boundaries
  int target_ = 0;       // of class targets: -1 in a row that does not count
  float factor_;         // of every element; of class targets, of those of y = 0
  float positive_ = 0.0f;
  float upstream_;
};

// lanes: threads of a warp per row, or 0 for all threads of a cluster.
// reads: logits [N, C] once, ignored rows of class targets never; target [N], or [N, C] once; grad_loss (unless `loss`)
//   [N], or [N, C] once; the sample weight; weight and pos_weight [C] per row, from cache.
// writes: loss (unless `backward`) [N], or [N, C]; grad [N, C] (unless `loss`; may be the logits' own memory).
// bytes: one pass over each of the matrices named here, and some 24 N: the least there is.
template <typename Z, int kCount, bool kDense, typename PassOf>
LONGTAIL_KERNEL(kBlockThreads, sigmoid_resident(kDense || kCount == 1, kOne<PassOf>))
sigmoid_rows_kernel(LONGTAIL_PARAMETER SigmoidLossArgs a, PassOf pass, int lanes) {
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
      SigmoidRow<Z, kCount, kDense, PassOf> row(a, pass, index, thread, width);
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
