// Images [N, C, P] of the sigmoid family with every option: as sigmoid_pixels.cuh, one kernel for all passes and
// targets.
#pragma once

#include "sigmoid_general.cuh"
#include "sigmoid_pixels.cuh"

namespace longtail {
namespace gpu {

// kCount neighbouring pixels of one image, four at most, in one of the `groups` threads that share them.
template <typename Z, int kCount>
class GeneralSigmoidPixels {
 public:
  // first: of the pixels, counted over all images.
  LONGTAIL_DEVICE GeneralSigmoidPixels(const SigmoidLossArgs& args, const GeneralOptions& options, Pass pass,
                                       int64_t first, int group, int groups)
      : a_(args),
        o_(options),
        vectors_(has_vectors(args)),
        group_(group),
        groups_(groups),
        counts_(args.target == nullptr) {
    const int64_t image = first / a_.pixels, pixel = first - image * a_.pixels;
    const int64_t element = image * a_.num_classes * a_.pixels + pixel;
    logits_ = static_cast<const Z*>(a_.logits) + image * a_.logits_stride + pixel;
    grad_ = pass != Pass::loss ? static_cast<Z*>(a_.grad) + image * a_.grad_stride + pixel : nullptr;
    dense_ = image * a_.dense_stride + pixel;
    losses_ = pass != Pass::backward && a_.elementwise_loss ? a_.loss + element : nullptr;
    upstreams_ = grad_ != nullptr && a_.elementwise_upstream ? a_.grad_loss + element : nullptr;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = first + i;
      factor_.x[i] = a_.sample_weight != nullptr ? a_.sample_weight[row] : 1.0f;
      const bool shared = grad_ != nullptr && upstreams_ == nullptr;
      upstream_.x[i] = shared ? a_.grad_loss[row * a_.grad_loss_stride] : 0.0f;
      if (a_.target != nullptr) load_target(i, a_.target[row * a_.target_stride]);
    }
  }

  // Of targets of elements: this thread's part of the sums of inverse_counts over the labels.
  LONGTAIL_DEVICE Lanes<kCount> label_sums() const {
    return over_classes([&](int j) {
      const Lanes<kCount> y = dense_targets<Z, kCount>(a_, dense_ + j * a_.dense_class_stride);
      return label_counts(a_, y, Lanes<kCount>(load_constant(a_.inverse_counts + j)));
    });
  }

  LONGTAIL_DEVICE void set_label_sums(const Lanes<kCount>& sums) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) ratio_.x[i] = a_.rebalance_beta / sums.x[i];
  }

  // Stores what is wanted of each element of this thread's classes; the sums of their losses.
  LONGTAIL_DEVICE Lanes<kCount> sweep() const {
    return over_classes([&](int j) { return take(j); });
  }

 private:
  static constexpr int kSummedApart = 64;

  // The sums of what `f` gives for each class of this thread. Classes that are summed apart keep the sums of many as
  // exact as those of few.
  template <typename F>
  LONGTAIL_DEVICE Lanes<kCount> over_classes(const F& f) const {
    const int classes = static_cast<int>(a_.num_classes);
    Lanes<kCount> total = 0.0f;
    for (int j = group_; j < classes;) {
      const int end = min(classes, j + kSummedApart * groups_);
      Lanes<kCount> sum = 0.0f;
      for (; j < end; j += groups_) sum = sum + f(j);
      total = total + sum;
    }
    return total;
  }

  LONGTAIL_DEVICE void load_target(int i, int64_t g) {
    const bool ignored = a_.ignoring && g == a_.ignore_index, valid = g >= 0 && g < a_.num_classes;
    LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
    const bool counted = valid && !ignored;
    target_[i] = counted ? static_cast<int>(g) : -1;
    counts_ = counts_ || counted;
    if (counted && a_.class_weight_by_target) factor_.x[i] *= load_constant(a_.weight + g);
    if (counted && a_.inverse_counts != nullptr) ratio_.x[i] = a_.rebalance_beta / load_constant(a_.inverse_counts + g);
  }

  LONGTAIL_DEVICE Lanes<kCount> take(int j) const {
    using V = Lanes<kCount>;
    Vector<Z, kCount> logits = {};
    if (counts_) logits.load(logits_ + j * a_.logits_class_stride);
    V z, y;
    if (a_.target == nullptr) {
      y = dense_targets<Z, kCount>(a_, dense_ + j * a_.dense_class_stride);
    } else {
      y = each_lane<kCount>([&](int i) { return target_[i] == j ? 1.0f : 0.0f; });
    }
    logits.get(z.x);
    const auto loaded = [&](const float* p, int, auto lanes) { return decltype(lanes)(load_constant(p + j)); };
    Element<V> found = general_elements<kCount>(a_, o_, vectors_, loaded, z, y, factor_, ratio_);
    const int64_t at = static_cast<int64_t>(j) * a_.pixels;
    V up = upstream_;
    if (upstreams_ != nullptr) load_constants(upstreams_ + at, 0, true, up.x);
    found.slope = found.slope * up;
    if (a_.ignoring) {
      const auto ignored =
          a_.target == nullptr ? ignored_targets(a_, y) : each_bit<kCount>([&](int i) { return target_[i] < 0; });
      found = {select(ignored, V(0.0f), found.loss), select(ignored, V(0.0f), found.slope)};
    }
    if (losses_ != nullptr) store_floats(losses_ + at, found.loss.x);
    if (grad_ != nullptr) Vector<Z, kCount>::store(grad_ + j * a_.grad_class_stride, found.slope.x);
    return found.loss;
  }

  const SigmoidLossArgs& a_;
  const GeneralOptions& o_;
  const bool vectors_;
  const int group_, groups_;
  bool counts_;  // whether any of the pixels does
  const Z* logits_;
  Z* grad_;                 // or null
  int64_t dense_;           // where the pixels' targets begin
  float* losses_;           // of each element, or null
  const float* upstreams_;  // of each element, or null
  int target_[kCount];      // of class targets: -1 for pixels that do not count
  Lanes<kCount> factor_, upstream_, ratio_ = 0.0f;
};

// The sums over the groups of threads that share a tile's pixels, in each of them; to be called by every thread.
template <int kCount>
LONGTAIL_DEVICE Lanes<kCount> sum_groups(const Lanes<kCount>& mine, int width) {
  const int thread = static_cast<int>(threadIdx.x), groups = static_cast<int>(blockDim.x) >> log2_of(width);
  const int lane = thread & (width - 1), group = thread >> log2_of(width);
  float* const sums = dynamic_shared<float>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[(group * kCount + i) * width + lane] = mine.x[i];
  __syncthreads();
  Lanes<kCount> total = 0.0f;
  for (int k = 0; k < groups; ++k) {
    total = total + each_lane<kCount>([&](int i) { return sums[(k * kCount + i) * width + lane]; });
  }
  __syncthreads();
  return total;
}

// width: threads along the pixels, kCount of which each has; the others of a block share the classes of these.
// reads, writes, bytes: as sigmoid_pixels_kernel; more vectors [C] per thread, from cache, and with inverse_counts the
//   targets of elements twice.
template <typename Z, int kCount>
LONGTAIL_KERNEL(kBlockThreads, 2)
general_sigmoid_pixels_kernel(LONGTAIL_PARAMETER SigmoidLossArgs a, LONGTAIL_PARAMETER GeneralOptions o, Pass pass,
                              int width) {
  const int thread = static_cast<int>(threadIdx.x), groups = static_cast<int>(blockDim.x) >> log2_of(width);
  const int64_t tile = int64_t(width) * kCount, tiles = (a.rows + tile - 1) / tile;
  const bool summing = pass != Pass::backward && !a.elementwise_loss;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    // Backwards: what a pass before has left in the cache.
    const int64_t first = (pass == Pass::backward ? tiles - 1 - i : i) * tile;
    const int64_t pixel = first + (thread & (width - 1)) * kCount;
    const bool here = pixel < a.rows;
    GeneralSigmoidPixels<Z, kCount> pixels(a, o, pass, here ? pixel : 0, thread >> log2_of(width), groups);
    Lanes<kCount> total = 0.0f;
    if (a.inverse_counts != nullptr && a.target == nullptr) {
      Lanes<kCount> sums = 0.0f;
      if (here) sums = pixels.label_sums();
      pixels.set_label_sums(groups > 1 ? sum_groups(sums, width) : sums);
    }
    if (here) total = pixels.sweep();
    if (!summing) continue;
    if (groups > 1) {
      store_sums(a, first, total.x, width);
    } else if (here) {
      store_floats(a.loss + pixel, total.x);
    }
  }
}

}  // namespace gpu
}  // namespace longtail
