// The sigmoid family over images [N, C, P]: threads along the pixels, which are contiguous, walk the classes in one
// sweep. Those of few pixels have their classes spread over groups of threads.
#pragma once

#include "plan.h"
#include "sigmoid_elements.cuh"

namespace longtail {
namespace gpu {

// kCount neighbouring pixels of one image in one of the `groups` threads that share them.
template <typename Z, int kCount, bool kDense, typename PassOf>
class SigmoidPixels {
 public:
  // first: of the pixels, counted over all images.
  LONGTAIL_DEVICE SigmoidPixels(const SigmoidLossArgs& args, PassOf pass, int64_t first, int group, int groups)
      : a_(args),
        group_(group),
        groups_(groups),
        has_loss_(pass != Pass::backward),
        has_grad_(pass != Pass::loss),
        column_weight_(args.class_weight_by_target ? nullptr : args.weight) {
    const int64_t image = first / a_.pixels, pixel = first - image * a_.pixels;
    logits_ = static_cast<const Z*>(a_.logits) + image * a_.logits_stride + pixel;
    grad_ = static_cast<Z*>(a_.grad) + image * a_.grad_stride + pixel;
    dense_ = image * a_.dense_stride + pixel;
    const int64_t element = image * a_.num_classes * a_.pixels + pixel;
    losses_ = has_loss_ && a_.elementwise_loss ? a_.loss + element : nullptr;
    upstreams_ = has_grad_ && a_.elementwise_upstream ? a_.grad_loss + element : nullptr;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = first + i;
      factor_[i] = a_.sample_weight != nullptr ? a_.sample_weight[row] : 1.0f;
      upstream_[i] = has_grad_ && !a_.elementwise_upstream ? a_.grad_loss[row * a_.grad_loss_stride] : 0.0f;
      if constexpr (!kDense) load_target(i, a_.target[row * a_.target_stride]);
    }
  }

  // Stores what is wanted of each element of this thread's classes; adds their losses to `total`. Classes that are
  // summed apart keep the sums of many as exact as those of few.
  LONGTAIL_DEVICE void sweep(float (&total)[kCount]) const {
    switch (focus_of(a_.gamma)) {
      case Focus::none:
        return sweep<Focus::none>(total);
      case Focus::square:
        return sweep<Focus::square>(total);
      case Focus::power:
        return sweep<Focus::power>(total);
      case Focus::general:  // GeneralSigmoidPixels
        return;
    }
  }

 private:
  using Hard = HardElements<Z, PassOf>;
  static constexpr int kGroup = group_of(kCount), kSummedApart = 64;
  static_assert(kSummedApart % kGroup == 0, "groups of classes end where their sums do");

  template <Focus kFocus>
  LONGTAIL_DEVICE void sweep(float (&total)[kCount]) const {
    const int classes = static_cast<int>(a_.num_classes);
    int j = group_;
    while (j < classes) {
      const int end = min(classes, j + kSummedApart * groups_);
      float sum[kCount] = {};
      for (; j < end; j += kGroup * groups_) take_group<kFocus>(j, classes, sum);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] += sum[i];
    }
  }

  LONGTAIL_DEVICE void load_target(int i, int64_t g) {
    const bool ignored = a_.ignoring && g == a_.ignore_index, valid = g >= 0 && g < a_.num_classes;
    LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
    const bool counted = valid && !ignored;
    target_[i] = counted ? static_cast<int>(g) : -1;
    if (!counted) ignored_ |= 1u << i;
    if (counted && a_.class_weight_by_target) factor_[i] *= load_constant(a_.weight + g);
  }

  // What is read of one class; y: dense targets.
  struct Loaded {
    Vector<Z, kCount> z;
    float y[kDense ? kCount : 1];
  };

  LONGTAIL_DEVICE void load(Loaded& to, int64_t j) const {
    constexpr unsigned kAll = (1u << kCount) - 1;
    if (ignored_ != kAll) to.z.load(logits_ + j * a_.logits_class_stride);
    if constexpr (kDense) {
      const int64_t at = dense_ + j * a_.dense_class_stride;
      if (a_.dense_is_wide) {
        load_constants(static_cast<const float*>(a_.dense_target) + at, 0, true, to.y);
      } else {
        Vector<Z, kCount> narrow;
        narrow.load(static_cast<const Z*>(a_.dense_target) + at);
        narrow.get(to.y);
      }
    }
  }

  // Classes j, j + groups, ...: as many as are read before the first of them is computed.
  template <Focus kFocus>
  LONGTAIL_DEVICE void take_group(int first, int classes, float (&sum)[kCount]) const {
    Loaded loaded[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int j = first + k * groups_;
      loaded[k] = {};
      if (j < classes) load(loaded[k], j);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int j = first + k * groups_;
      if (j < classes) take<kFocus>(loaded[k], j, sum);
    }
  }

  template <Focus kFocus>
  LONGTAIL_DEVICE void take(const Loaded& loaded, int j, float (&sum)[kCount]) const {
    const float column = column_weight_ != nullptr ? load_constant(column_weight_ + j) : 1.0f;
    const float positive = a_.pos_weight != nullptr ? load_constant(a_.pos_weight + j) : 1.0f;
    float slope[kCount], loss[kCount];
    loaded.z.get(slope);
    unsigned ignored = ignored_;
    if constexpr (kDense) {
      if (a_.ignoring) ignored = ignored_of(loaded.y, static_cast<float>(a_.ignore_index));
#pragma unroll
      for (int i = 0; i < kCount; ++i) loss[i] = loaded.y[i];
      dense<kFocus>(column, positive, ignored, slope, loss);
    } else {
      one_class<kFocus>(j, column, positive, slope, loss);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += loss[i];
    const int64_t at = static_cast<int64_t>(j) * a_.pixels;
    if (losses_ != nullptr) store_floats(losses_ + at, loss);
    if (has_grad_) store_grad(j, at, ignored, slope);
  }

  LONGTAIL_DEVICE void store_grad(int64_t j, int64_t at, unsigned ignored, float (&slope)[kCount]) const {
    float up[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) up[i] = upstream_[i];
    if (upstreams_ != nullptr) load_constants(upstreams_ + at, 0, true, up);
    // An infinite upstream gradient must not turn the 0 of what does not count into NaN.
#pragma unroll
    for (int i = 0; i < kCount; ++i) slope[i] = ignored >> i & 1u ? 0.0f : slope[i] * up[i];
    Vector<Z, kCount>::store(grad_ + j * a_.grad_class_stride, slope);
  }

  template <Focus kFocus>
  LONGTAIL_DEVICE void one_class(int j, float column, float positive, float (&x)[kCount], float (&c)[kCount]) const {
    const float here = column * a_.alpha_positive * positive, elsewhere = column * a_.alpha_negative;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool one = target_[i] == j;
      const Element<float> element = Hard::template at<kFocus>(one ? -x[i] : x[i], a_.gamma);
      const float factor = factor_[i] * (one ? here : elsewhere);
      x[i] = factor * (one ? -element.slope : element.slope);
      c[i] = ignored_ >> i & 1u ? 0.0f : factor * element.loss;
    }
  }

  template <Focus kFocus>
  LONGTAIL_DEVICE void dense(float column, float positive, unsigned ignored, float (&z)[kCount],
                             float (&y)[kCount]) const {
    const DenseOptions o = {a_.alpha_positive, a_.alpha_negative, a_.gamma};
    float c[kCount], positives[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      c[i] = factor_[i] * column;
      positives[i] = positive;
    }
    dense_elements<Hard, kFocus>(z, y, c, positives, ignored, o);
  }

  const SigmoidLossArgs& a_;
  const int group_, groups_;
  const bool has_loss_, has_grad_;
  const float* const column_weight_;
  const Z* logits_;
  Z* grad_;
  int64_t dense_;           // where the pixels' targets begin
  float* losses_;           // of each element, or null
  const float* upstreams_;  // of each element, or null
  unsigned ignored_ = 0;    // pixels whose class target does not count, by bits
  int target_[kDense ? 1 : kCount];
  float factor_[kCount], upstream_[kCount];
};

// The sums of a tile of pixels, whose classes are spread over groups of threads; to be called by every thread.
template <int kCount>
LONGTAIL_DEVICE void store_sums(const SigmoidLossArgs& a, int64_t first, const float (&total)[kCount], int width) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int groups = threads >> log2_of(width), lane = thread & (width - 1), group = thread >> log2_of(width);
  float* const sums = dynamic_shared<float>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[(group * kCount + i) * width + lane] = total[i];
  __syncthreads();
  for (int pixel = thread; pixel < width * kCount && first + pixel < a.rows; pixel += threads) {
    float sum = 0.0f;
    for (int k = 0; k < groups; ++k) sum += sums[(k * kCount + pixel % kCount) * width + pixel / kCount];
    a.loss[first + pixel] = sum;
  }
  __syncthreads();
}

// width: threads along the pixels, kCount of which each has; the others of a block share the classes of these.
// reads: logits [N, C, P] once, never where none of 16 bytes has a class target that counts; target [N, P], or
//   [N, C, P] once; grad_loss (unless `loss`) [N, P], or [N, C, P] once; the sample weight; weight and pos_weight [C]
//   per thread, from cache.
// writes: loss (unless `backward`) [N, P], or [N, C, P]; grad [N, C, P] (unless `loss`; may be the logits' own memory).
// bytes: one pass over each of the matrices named here, and some 24 N P: the least there is.
template <typename Z, int kCount, bool kDense, typename PassOf>
LONGTAIL_KERNEL(kBlockThreads, 2)
sigmoid_pixels_kernel(LONGTAIL_PARAMETER SigmoidLossArgs a, PassOf pass, int width) {
  const int thread = static_cast<int>(threadIdx.x), groups = static_cast<int>(blockDim.x) >> log2_of(width);
  const int64_t tile = int64_t(width) * kCount, tiles = (a.rows + tile - 1) / tile;
  const bool summing = pass != Pass::backward && !a.elementwise_loss;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    // Backwards: what a pass before has left in the cache.
    const int64_t first = (pass == Pass::backward ? tiles - 1 - i : i) * tile;
    const int64_t pixel = first + (thread & (width - 1)) * kCount;
    float total[kCount] = {};
    if (pixel < a.rows) {
      SigmoidPixels<Z, kCount, kDense, PassOf>(a, pass, pixel, thread >> log2_of(width), groups).sweep(total);
    }
    if (!summing) continue;
    if (groups > 1) {
      store_sums(a, first, total, width);
    } else if (pixel < a.rows) {
      store_floats(a.loss + pixel, total);
    }
  }
}

}  // namespace gpu
}  // namespace longtail
