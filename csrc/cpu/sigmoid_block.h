// A block of neighbouring elements of the sigmoid family: classes of one row, or pixels of one class.
//
// Reads each logit and each dense target once, writes each gradient once; class targets are compared, never expanded.
#pragma once

#include "sigmoid_general_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

// ---- Where y comes from ----
// `some`: whether any target of the register that starts at element k may be other than 0; `one`, `counts`: its masks.

// Classes of one row whose target is the g-th of the block (or none, outside).
template <typename T>
struct OneHotClasses {
  static constexpr bool kDense = false, kSparse = true;
  int64_t g;
  LONGTAIL_INLINE bool some(int64_t k) const { return g >= k && g < k + Vec<T>::kLanes; }
  // The target's element, if it is one of [k, count), else count.
  LONGTAIL_INLINE int64_t next(int64_t k, int64_t count) const { return k <= g && g < count ? g : count; }
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
  static constexpr bool kDense = false, kSparse = false;
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
  static constexpr bool kDense = true, kSparse = false;
  const T* y;
  bool any_ignored;
  T ignored;
  LONGTAIL_INLINE bool some(int64_t) const { return true; }
  LONGTAIL_INLINE Vec<T> load_y(int64_t k, int64_t left) const { return load_some(y + k, left); }
  LONGTAIL_INLINE Mask<T> one(Vec<T> y) const { return y == Vec<T>(T(1)); }
  LONGTAIL_INLINE bool ignoring() const { return any_ignored; }
  LONGTAIL_INLINE Mask<T> counts(Vec<T> y) const { return {y.v != Vec<T>(ignored).v}; }
};

// For y = 0, from the logistic of z; for y = 1, from that of -z.
template <Focus kFocus, typename T>
LONGTAIL_INLINE Element<Vec<T>> hard_from(const Logistic<Vec<T>>& against, Vec<T> gamma) {
  const Logistic<Vec<T>> towards = {against.q, against.p, against.minus, against.plus};
  return hard_element<kFocus>(towards, gamma, ExpRange<T>::kLowest);
}

// Whole registers [begin, end) of classes with y = 0. Returns their losses, lane by lane.
template <Pass kPass, Focus kFocus, bool kWeighted, typename T>
LONGTAIL_INLINE Vec<T> negatives(const SigmoidBlock<T>& b, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const V gamma = b.gamma, upstream = b.upstream, shared = V(b.alpha_negative) * V(b.factor);
  const V shared_slope = shared * upstream;
  V sum = T(0);
  for (int64_t k = begin; k < end; k += V::kLanes) {
    __builtin_prefetch(b.next_z + k * b.z_bytes);
    const Element<V> hard = hard_from<kFocus, T>(logistic(load(b.z + k), ExpRange<T>::kLowest), gamma);
    const V factor = kWeighted ? shared * load(b.factors + k) : shared;
    if (kPass != Pass::backward) sum = sum + (kWeighted ? factor * hard.loss : hard.loss);
    if (kPass != Pass::loss) store(b.grad + k, (kWeighted ? factor * upstream : shared_slope) * hard.slope);
  }
  return kWeighted ? sum : sum * shared;
}

// Returns the sum of the losses.
template <Pass kPass, Focus kFocus, typename T, typename Target>
T sigmoid_block(const Target target, const SigmoidBlock<T> b) {
  using V = Vec<T>;
  constexpr T kLowest = ExpRange<T>::kLowest;
  constexpr bool kGeneral = kFocus == Focus::general;
  // Factors multiply in one order, so that every layout rounds alike: alpha, pos_weight, weights, upstream gradient.
  const V positive = V(b.alpha_positive) * V(b.pos_weight) * V(b.factor);
  const V negative = V(b.alpha_negative) * V(b.factor);
  const V zero = T(0), gamma = b.gamma;
  V sum = zero;
  const auto step = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
    __builtin_prefetch(b.next_z + k * b.z_bytes);
    if (Target::kDense) __builtin_prefetch(b.next_y + k * b.y_bytes);
    V z = load_some(b.z + k, left), y, factor = negative;
    if (kGeneral || target.some(k)) y = target.load_y(k, left);
    Element<V> element;
    if constexpr (kGeneral) {
      element = general_elements(target, b, z, y, k, left);
      factor = T(1);
    } else {
      if (target.some(k)) {
        const auto one = target.one(y);
        z = select(one, -z, z);
        const V weighted =
            b.pos_weights ? V(b.alpha_positive) * load_some(b.pos_weights + k, left) * V(b.factor) : positive;
        factor = select(one, weighted, negative);
      }
    }
    const Logistic<V> by_z = logistic(z, kLowest);
    if constexpr (!kGeneral) element = hard_from<kFocus, T>(by_z, gamma);
    if constexpr (Target::kDense && !kGeneral) {
      auto settled = target.one(y) | (y == zero);
      if (target.ignoring()) settled = settled | (y == V(target.ignored));
      if (!all(settled)) {
        const V weights = b.pos_weights ? load_some(b.pos_weights + k, left) : V(b.pos_weight);
        const Element<V> soft = soft_element<kFocus>(by_z, y, weights, gamma, kLowest);
        const V alpha = V(b.alpha_positive) * y + V(b.alpha_negative) * (V(T(1)) - y);
        element = {select(settled, element.loss, soft.loss), select(settled, element.slope, soft.slope)};
        factor = select(settled, factor, alpha * V(b.factor));
      }
    }
    if (b.factors) factor = factor * load_some(b.factors + k, left);
    if (kPass != Pass::backward) {
      V loss = factor * element.loss;
      if (target.ignoring()) loss = select(target.counts(y), loss, zero);
      if (left < V::kLanes) loss = select(lane_numbers<T>() < V(T(left)), loss, zero);
      sum = sum + loss;
      if (b.loss) store_some(b.loss + k, b.add_loss ? load_some(b.loss + k, left) + loss : loss, left);
    }
    if (kPass == Pass::loss) return;
    V upstream = b.upstreams ? load_some(b.upstreams + k, left) : V(b.upstream);
    // from -dloss/dx_t to dloss/dz
    if (!kGeneral && target.some(k)) upstream = select(target.one(y), -upstream, upstream);
    V grad = factor * upstream * element.slope;
    if (target.ignoring()) grad = select(target.counts(y), grad, zero);
    store_some(b.grad + k, grad, left);
  };
  const bool summed = !b.upstreams && !b.loss;
  const int64_t whole = b.count / V::kLanes * V::kLanes;
  bool running = false;
  if constexpr (kGeneral) {
    constexpr bool kRuns = Target::kDense || Target::kSparse;
    running = kRuns && summed && b.simple_negatives && !b.factors && !b.alphas && !b.rows && !target.ignoring();
  }
  for (int64_t k = 0; k < whole; k += V::kLanes) {
    if constexpr (kGeneral) {
      if (running) {
        k = negative_run<kPass>(target, b, k, whole, sum);
        if (k == whole) break;
      }
    }
    if constexpr (Target::kSparse && !kGeneral) {
      if (summed) {
        const int64_t end = target.next(k, whole) / V::kLanes * V::kLanes;
        sum =
            sum + (b.factors ? negatives<kPass, kFocus, true>(b, k, end) : negatives<kPass, kFocus, false>(b, k, end));
        k = end;
        if (k == whole) break;
      }
    }
    step(k, V::kLanes);
  }
  if (whole < b.count) step(whole, b.count - whole);
  return horizontal_sum(sum);
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
