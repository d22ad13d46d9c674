// Rows [N, C] of the sigmoid family with every option: as sigmoid_rows.cuh, one kernel for all passes and targets.
#pragma once

#include "reduce.cuh"
#include "sigmoid_general.cuh"

namespace longtail {
namespace gpu {

// Part `rank` of `parts` of one row in one of the `width` threads that share it.
template <typename Z, int kCount>
class GeneralSigmoidRow {
 public:
  LONGTAIL_DEVICE GeneralSigmoidRow(const SigmoidLossArgs& args, const GeneralOptions& options, Pass pass, int64_t row,
                                    int thread, int width)
      : a_(args),
        o_(options),
        vectors_(has_vectors(args)),
        thread_(thread),
        width_(width),
        logits_(static_cast<const Z*>(args.logits) + row * args.logits_stride),
        upstreams_(pass != Pass::loss && args.elementwise_upstream ? args.grad_loss + row * args.num_classes : nullptr),
        losses_(pass != Pass::backward && args.elementwise_loss ? args.loss + row * args.num_classes : nullptr),
        grad_(pass != Pass::loss ? static_cast<Z*>(args.grad) + row * args.grad_stride : nullptr),
        dense_(row * args.dense_stride) {
    factor_ = a_.sample_weight != nullptr ? a_.sample_weight[row] : 1.0f;
    upstream_ = grad_ != nullptr && upstreams_ == nullptr ? a_.grad_loss[row * a_.grad_loss_stride] : 0.0f;
    if (a_.target != nullptr) load_target(row);
  }

  LONGTAIL_DEVICE void place(int parts, int rank) {
    const int classes = static_cast<int>(a_.num_classes);
    head_ = kCount > 1 ? head_of(logits_, classes) : 0;
    const int all = (classes - head_) / kCount, each = (all + parts - 1) >> log2_of(parts);
    const int begin = min(all, rank * each), end = min(all, begin + each);
    first_ = head_ + (begin + thread_) * kCount;
    end_ = head_ + end * kCount;
    beside_ = all * kCount;
    singles_ = rank == 0 ? classes - beside_ : 0;
    aligned_ = true;
    for (const float* p : {a_.weight, a_.pos_weight, a_.class_bias, a_.class_alpha, a_.class_gamma, a_.inverse_counts})
      aligned_ = aligned_ && (reinterpret_cast<uintptr_t>(p + head_) % 16 == 0 || p == nullptr);
  }

  // Of targets of elements: this thread's part of the sum of inverse_counts over the labels.
  LONGTAIL_DEVICE float label_sum() const {
    float sum = 0.0f;
    for (int column = first_; column < end_; column += width_ * kCount) sum += labels<kCount>(column, aligned_);
    for (int i = thread_; i < singles_; i += width_) sum += labels<1>(single(i), false);
    return sum;
  }

  LONGTAIL_DEVICE void set_label_sum(float sum) { ratio_ = a_.rebalance_beta / sum; }

  // Stores what is wanted of each element; the sum of this thread's losses.
  LONGTAIL_DEVICE float sweep() const {
    if (ignored_) return blank();
    float total = 0.0f;
    for (int column = first_; column < end_; column += width_ * kCount) total += take<kCount>(column, aligned_);
    for (int i = thread_; i < singles_; i += width_) total += take<1>(single(i), false);
    return total;
  }

 private:
  LONGTAIL_DEVICE void load_target(int64_t row) {
    const int64_t g = a_.target[row * a_.target_stride];
    const bool ignored = a_.ignoring && g == a_.ignore_index, valid = g >= 0 && g < a_.num_classes;
    LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
    ignored_ = ignored || !valid;
    if (ignored_) return;
    target_ = static_cast<int>(g);
    if (a_.class_weight_by_target) factor_ *= load_constant(a_.weight + g);
    if (a_.inverse_counts != nullptr) set_label_sum(load_constant(a_.inverse_counts + g));
  }

  // The i-th class beside the vectors.
  LONGTAIL_DEVICE int single(int i) const { return i < head_ ? i : i + beside_; }

  // A row that does not count.
  LONGTAIL_DEVICE float blank() const {
    if (grad_ == nullptr && losses_ == nullptr) return 0.0f;
    for (int column = first_; column < end_; column += width_ * kCount) store<kCount>(column, 0.0f, 0.0f);
    for (int i = thread_; i < singles_; i += width_) store<1>(single(i), 0.0f, 0.0f);
    return 0.0f;
  }

  template <int kWidth>
  LONGTAIL_DEVICE float labels(int column, bool aligned) const {
    const Lanes<kWidth> y = dense_targets<Z, kWidth>(a_, dense_ + column);
    return total_of(label_counts(a_, y, constants<kWidth>(a_.inverse_counts, column, aligned)));
  }

  // Neighbouring classes from `column` on: stores what is wanted, returns the sum of the losses.
  template <int kWidth>
  LONGTAIL_DEVICE float take(int column, bool aligned) const {
    using V = Lanes<kWidth>;
    Vector<Z, kWidth> logits;
    logits.load(logits_ + column);
    V z, y;
    if (a_.target == nullptr) {
      y = dense_targets<Z, kWidth>(a_, dense_ + column);
    } else {
      y = each_lane<kWidth>([&](int i) { return column + i == target_ ? 1.0f : 0.0f; });
    }
    logits.get(z.x);
    const auto loaded = [&](const float* p, int k, auto lanes) {
      load_constants(p, column + k, aligned, lanes.x);
      return lanes;
    };
    Element<V> found = general_elements<kWidth>(a_, o_, vectors_, loaded, z, y, factor_, ratio_);
    if (upstreams_ != nullptr) {
      found.slope = found.slope * constants<kWidth>(upstreams_, column, true);
    } else {
      found.slope = found.slope * V(upstream_);
    }
    if (a_.ignoring && a_.target == nullptr) {
      const auto ignored = ignored_targets(a_, y);
      found = {select(ignored, V(0.0f), found.loss), select(ignored, V(0.0f), found.slope)};
    }
    store<kWidth>(column, found.slope, found.loss);
    return total_of(found.loss);
  }

  template <int kWidth>
  static LONGTAIL_DEVICE Lanes<kWidth> constants(const float* p, int column, bool aligned) {
    Lanes<kWidth> y;
    load_constants(p, column, aligned, y.x);
    return y;
  }

  template <int kWidth>
  LONGTAIL_DEVICE void store(int column, const Lanes<kWidth>& slope, const Lanes<kWidth>& loss) const {
    if (losses_ != nullptr) store_floats(losses_ + column, loss.x);
    if (grad_ != nullptr) Vector<Z, kWidth>::store(grad_ + column, slope.x);
  }

  const SigmoidLossArgs& a_;
  const GeneralOptions& o_;
  const bool vectors_;
  const int thread_, width_;
  const Z* const logits_;
  const float* const upstreams_;  // of each element, or null
  float* const losses_;           // of each element, or null
  Z* const grad_;                 // or null
  const int64_t dense_;           // where the row's targets begin
  int head_, beside_, singles_;   // classes before the vectors, in them, and beside them that this block takes
  int first_, end_;               // this thread's first vector, and the end of this block's
  bool aligned_;                  // the class constants of a vector begin at 16-byte boundaries
  bool ignored_ = false;          // a class target that does not count
  int target_ = -1;
  float factor_, upstream_, ratio_ = 0.0f;
};

// lanes: threads of a warp per row, or 0 for all threads of a cluster.
// reads, writes, bytes: as sigmoid_rows_kernel; more vectors [C] per row, from cache, and with inverse_counts the
//   targets of elements twice.
template <typename Z, int kCount>
LONGTAIL_KERNEL(kBlockThreads, 2)
general_sigmoid_rows_kernel(LONGTAIL_PARAMETER SigmoidLossArgs a, LONGTAIL_PARAMETER GeneralOptions o, Pass pass,
                            int lanes) {
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
    const bool here = place < a.rows;
    const int64_t index = !here ? 0 : pass == Pass::backward ? a.rows - 1 - place : place;
    GeneralSigmoidRow<Z, kCount> row(a, o, pass, index, thread, width);
    row.place(joint.cluster(), joint.rank());
    if (a.inverse_counts != nullptr && a.target == nullptr) {
      const float sum = here ? row.label_sum() : 0.0f;
      row.set_label_sum(lanes > 0 ? sum_lanes(sum, lanes) : joint.sum_for_all(sum));
      joint.next_row();
    }
    float total = here ? row.sweep() : 0.0f;
    if (!summing) continue;
    total = lanes > 0 ? sum_lanes(total, lanes) : joint.sum(total);
    if (here && thread == 0 && joint.rank() == 0) a.loss[index] = total;
    joint.next_row();
  }
  joint.meet();
}

}  // namespace gpu
}  // namespace longtail
