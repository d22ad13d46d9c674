// A block of neighbouring elements of the sigmoid family: classes of one row, or pixels of one class.
//
// Reads each logit and each dense target once, writes each gradient once; class targets are compared, never expanded.
#pragma once

#include "../sigmoid_math.h"
#include "kernels.h"
#include "simd_math.h"

namespace longtail {
namespace LONGTAIL_ISA {

// ---- Where y comes from ----
// `some`: whether any target of the register that starts at element k may be other than 0; `one`, `counts`: its masks.

// Classes of one row whose target is the g-th of the block (or none, outside).
template <typename T>
struct OneHotClasses {
  static constexpr bool kDense = false;
  int64_t g;
  LONGTAIL_INLINE bool some(int64_t k) const { return g >= k && g < k + Vec<T>::kLanes; }
  LONGTAIL_INLINE Vec<T> load_y(int64_t k, int64_t) const {
    return select(lane_numbers<T>() == Vec<T>(T(g - k)), Vec<T>(T(1)), Vec<T>(T(0)));
  }
  LONGTAIL_INLINE Mask<T> one(Vec<T> y) const { return y == Vec<T>(T(1)); }
  LONGTAIL_INLINE bool ignoring() const { return false; }
  LONGTAIL_INLINE Mask<T> counts(Vec<T> y) const { return y == y; }
};

// Pixels of class j; an ignored pixel has target -1.
template <typename T>
struct OneHotPixels {
  static constexpr bool kDense = false;
  const T* target;
  T j;
  bool any_ignored;
  LONGTAIL_INLINE bool some(int64_t) const { return true; }
  LONGTAIL_INLINE Vec<T> load_y(int64_t k, int64_t left) const { return load_some(target + k, left); }
  LONGTAIL_INLINE Mask<T> one(Vec<T> y) const { return y == Vec<T>(j); }
  LONGTAIL_INLINE bool ignoring() const { return any_ignored; }
  LONGTAIL_INLINE Mask<T> counts(Vec<T> y) const { return Vec<T>(T(-1)) < y; }
};

// A target for each element; those equal to `ignored` do not count.
template <typename T>
struct Dense {
  static constexpr bool kDense = true;
  const T* y;
  bool any_ignored;
  LONGTAIL_INLINE bool some(int64_t) const { return true; }
  T ignored;
  LONGTAIL_INLINE Vec<T> load_y(int64_t k, int64_t left) const { return load_some(y + k, left); }
  LONGTAIL_INLINE Mask<T> one(Vec<T> y) const { return y == Vec<T>(T(1)); }
  LONGTAIL_INLINE bool ignoring() const { return any_ignored; }
  LONGTAIL_INLINE Mask<T> counts(Vec<T> y) const { return {y.v != Vec<T>(ignored).v}; }
};

template <typename T>
struct SigmoidBlock {
  int64_t count;
  T alpha_positive, alpha_negative, gamma;
  T factor, pos_weight, upstream;  // times those of each element, where there are any
  const T *factors, *pos_weights, *upstreams;
  const T* z;
  // Where the next block's logits and dense targets lie, and the bytes of one: fetched while this block is computed,
  // because the arithmetic on a line outlasts what the processor fetches ahead by itself.
  const char *next_z, *next_y;
  int64_t z_bytes, y_bytes;
  T* loss;  // of each element, or null
  bool add_loss;
  T* grad;
};

// Returns the sum of the losses.
template <Pass kPass, Focus kFocus, typename T, typename Target>
T sigmoid_block(const Target target, const SigmoidBlock<T> b) {
  using V = Vec<T>;
  constexpr T kLowest = ExpRange<T>::kLowest;
  const V zero = T(0), gamma = b.gamma;
  V sum = zero;
  for (int64_t k = 0; k < b.count; k += V::kLanes) {
    const int64_t left = b.count - k;
    __builtin_prefetch(b.next_z + k * b.z_bytes);
    if (Target::kDense) __builtin_prefetch(b.next_y + k * b.y_bytes);
    const V z = load_some(b.z + k, left);
    const V factor = b.factors ? V(b.factor) * load_some(b.factors + k, left) : V(b.factor);
    V y, pos_weight, x = -z, coefficient = factor * V(b.alpha_negative), upwards = coefficient;
    if (target.some(k)) {
      y = target.load_y(k, left);
      const auto one = target.one(y);
      pos_weight = b.pos_weights ? load_some(b.pos_weights + k, left) : V(b.pos_weight);
      x = select(one, z, x);
      coefficient = select(one, factor * V(b.alpha_positive) * pos_weight, coefficient);
      upwards = select(one, -coefficient, coefficient);
    }
    const Logistic<V> by_x = logistic(x, kLowest);
    const Element<V> hard = hard_element<kFocus>(by_x, gamma, kLowest);
    V loss = coefficient * hard.loss, slope = upwards * hard.slope;
    if constexpr (Target::kDense) {
      auto settled = target.one(y) | (y == zero);
      if (target.ignoring()) settled = settled | (y == V(target.ignored));
      if (!all(settled)) {
        const Logistic<V> by_z = {by_x.q, by_x.p, by_x.minus, by_x.plus};  // x is -z wherever the target is soft
        const Element<V> soft = soft_element<kFocus>(by_z, y, pos_weight, gamma, kLowest);
        const V alpha = V(b.alpha_positive) * y + V(b.alpha_negative) * (V(T(1)) - y);
        loss = select(settled, loss, factor * alpha * soft.loss);
        slope = select(settled, slope, factor * alpha * soft.slope);
      }
    }
    if (target.ignoring()) {
      loss = select(target.counts(y), loss, zero);
      slope = select(target.counts(y), slope, zero);
    }
    if (kPass != Pass::backward) {
      if (left < V::kLanes) loss = select(lane_numbers<T>() < V(T(left)), loss, zero);
      sum = sum + loss;
      if (b.loss) store_some(b.loss + k, b.add_loss ? load_some(b.loss + k, left) + loss : loss, left);
    }
    if (kPass == Pass::loss) continue;
    const V upstream = b.upstreams ? load_some(b.upstreams + k, left) : V(b.upstream);
    V grad = slope * upstream;
    if (target.ignoring()) grad = select(target.counts(y), grad, zero);  // an infinite upstream gradient times 0
    store_some(b.grad + k, grad, left);
  }
  return horizontal_sum(sum);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
