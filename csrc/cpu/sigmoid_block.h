// A block of neighbouring elements of the sigmoid family: classes of one row, or pixels of one class.
//
// Reads each logit and each dense target once, writes each gradient once; class targets are compared, never expanded.
#pragma once

#include "../sigmoid_general.h"
#include "kernels.h"
#include "simd_math.h"

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
  // Of Focus::general alone. Numbers of one class, or those of each of the block's classes.
  GeneralOptions<T> general;
  T bias, gamma_positive, gamma_negative, inverse_count;
  const T *biases, *alphas, *gammas, *inverse_counts;
  bool same_gamma, rebalancing;
  T row;  // what `rebalanced` multiplies the counts by, or those of each pixel
  const T* rows;
};

template <typename T>
LONGTAIL_INLINE Vec<T> each_or(const T* each, T all, int64_t k, int64_t left) {
  return each ? load_some(each + k, left) : Vec<T>(all);
}

// With every option: the losses and their slopes by the logits, factors of alpha, pos_weight and the row included.
template <typename T, typename Target>
LONGTAIL_INLINE Element<Vec<T>> general_elements(const Target& target, const SigmoidBlock<T>& b, Vec<T> z, Vec<T> raw,
                                                 int64_t k, int64_t left) {
  using V = Vec<T>;
  constexpr T kLowest = ExpRange<T>::kLowest;
  const V zero = T(0), unit = T(1), u = z + each_or(b.biases, b.bias, k, left), row_factor = b.factor;
  const auto one = target.one(raw);
  const V y = Target::kDense ? raw : select(one, unit, zero);
  V positive = b.alpha_positive, negative = b.alpha_negative;
  if (b.alphas) {
    positive = load_some(b.alphas + k, left);
    negative = unit - positive;
  }
  const V weights = each_or(b.pos_weights, b.pos_weight, k, left);
  const V gamma_positive = each_or(b.gammas, b.gamma_positive, k, left);
  const V gamma_negative = b.same_gamma ? gamma_positive : V(b.gamma_negative);
  const bool smooth = b.general.smoothing != T(0);
  Element<V> found = {zero, zero};
  V factor = zero;
  if (!smooth) {
    const auto exponent = [&] { return select(one, gamma_positive, gamma_negative); };
    found = general_hard(u, one, exponent, b.general, kLowest);
    factor = select(one, positive * weights * row_factor, negative * row_factor);
  }
  auto settled = one | (y == zero);
  if constexpr (Target::kDense) {
    if (target.ignoring()) settled = settled | (y == V(target.ignored));
  }
  if (smooth || (Target::kDense && !all(settled))) {
    const V soft_y = y + V(b.general.smoothing) * (V(T(0.5)) - y);
    const V rest = unit - soft_y, alpha = positive * soft_y + negative * rest;
    const V gamma = gamma_positive * soft_y + gamma_negative * rest;
    const Element<V> soft = general_soft(u, soft_y, weights, gamma, b.general, kLowest);
    const auto taken = smooth ? settled & (zero == unit) : settled;
    found = {select(taken, found.loss, soft.loss), select(taken, found.slope, soft.slope)};
    factor = select(taken, factor, alpha * row_factor);
  }
  if (b.rebalancing) {
    const V count = each_or(b.inverse_counts, b.inverse_count, k, left);
    factor = factor * rebalanced(count, each_or(b.rows, b.row, k, left), b.general, kLowest);
  }
  return {factor * found.loss, factor * found.slope};
}

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
  for (int64_t k = 0; k < whole; k += V::kLanes) {
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
