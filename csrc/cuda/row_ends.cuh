// A row's beginning, its target and what belongs to it, and its end: from its stats to its loss and coefficients.
#pragma once

#include "row.cuh"

namespace longtail {
namespace gpu {

// One row's scalars. In rows that do not count, target is -1 and the rest 0.
struct Row {
  int64_t index;
  int target;
  float u_g;               // with the margin
  float w_g, v, upstream;  // class weight of the target, sample weight, dL/dloss

  LONGTAIL_DEVICE bool counted() const { return target >= 0; }
};

// The target of a row, or -1 where it does not count.
LONGTAIL_DEVICE int load_target(const SoftmaxLossArgs& a, int64_t index) {
  const int64_t g = a.target[index * a.target_stride];
  const bool ignored = g == a.ignore_index, valid = g >= 0 && g < a.num_classes;
  LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
  return ignored || !valid ? -1 : static_cast<int>(g);
}

// A counted row, from its target's logit.
template <bool kExtras>
LONGTAIL_DEVICE Row counted_row(const SoftmaxLossArgs& a, int64_t index, int g, float logit, bool has_upstream) {
  float x[1] = {logit};
  Elements<kExtras>(a, 1).cap(x);
  Row row = {index, g, x[0], 1.0f, 1.0f, 0.0f};
  if (a.class_bias != nullptr) row.u_g += load_constant(a.class_bias + g);
  if (a.class_margin != nullptr) row.u_g -= load_constant(a.class_margin + g);
  if (a.weight != nullptr) row.w_g = load_constant(a.weight + g);
  if (a.sample_weight != nullptr) row.v = a.sample_weight[index];
  if (has_upstream) row.upstream = a.grad_loss[index * a.grad_loss_stride];
  return row;
}

template <typename Z, bool kExtras>
LONGTAIL_DEVICE Row load_row(const SoftmaxLossArgs& a, int64_t index, bool has_upstream) {
  const int g = load_target(a, index);
  if (g < 0) return {index, -1, 0.0f, 0.0f, 0.0f, 0.0f};
  const float logit = to_float(static_cast<const Z*>(a.logits)[index * a.logits_stride + g]);
  return counted_row<kExtras>(a, index, g, logit, has_upstream);
}

// A row's five statistics in memory, `apart` from each other.
struct StatsPlace {
  float* first;
  int64_t apart;

  LONGTAIL_DEVICE Stats load() const {
    return {first[0], first[apart], first[2 * apart], first[3 * apart], first[4 * apart]};
  }
  LONGTAIL_DEVICE void store(const Stats& s) const {
    first[0] = s.m;
    first[apart] = s.d;
    first[2 * apart] = s.t;
    first[3 * apart] = s.u_g;
    first[4 * apart] = s.U;
  }
};

LONGTAIL_DEVICE StatsPlace stats_of_row(const SoftmaxLossArgs& a, int64_t index) { return {a.stats + 5 * index, 1}; }

LONGTAIL_DEVICE void store_row(const SoftmaxLossArgs& a, int64_t index, float loss, const Stats& s) {
  a.loss[index] = loss;
  stats_of_row(a, index).store(s);
}

// From the stats of a counted row, which Pass::backward finds at their place, to the coefficients of its gradient;
// `store` writes its loss and stats.
LONGTAIL_DEVICE Grad finish_at(const SoftmaxLossArgs& a, const Row& row, Stats s, Pass pass, bool store,
                               const StatsPlace& place) {
  const float classes = static_cast<float>(a.num_classes);
  const bool smoothing = a.options.label_smoothing != 0.0f;
  const float weight_sum = smoothing && a.weight != nullptr ? *a.weight_sum : classes;
  if (pass == Pass::backward) {
    s = place.load();
  } else {
    s.m = s.d == s.d ? s.m : s.d;                                 // a maximum passes over NaN, a sum does not
    if (smoothing) s.U += row.w_g * (s.u_g - finite_max(s.u_g));  // the target's share: 0, but for a target at -inf
  }
  // A copy: options that are read in place make more code of some kernels.
  longtail::generic::RowLoss<float> result =
      longtail::generic::finish(s, LossOptions<float>(a.options), classes, weight_sum, row.w_g, row.v);
  if (store && pass != Pass::backward) {
    a.loss[row.index] = result.loss;
    place.store(s);
  }
  longtail::generic::scale_grad(result.grad, row.upstream);
  return result.grad;
}

LONGTAIL_DEVICE Grad finish_row(const SoftmaxLossArgs& a, const Row& row, const Stats& s, Pass pass, bool store) {
  return finish_at(a, row, s, pass, store, stats_of_row(a, row.index));
}

// The row that a place in the grid takes. Backward goes from the last to the first: those that the forward pass read
// last may still be in the L2 cache.
LONGTAIL_DEVICE int64_t row_at(const SoftmaxLossArgs& a, int64_t place, Pass pass) {
  return pass == Pass::backward ? a.rows - 1 - place : place;
}

}  // namespace gpu
}  // namespace longtail
