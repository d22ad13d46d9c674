// A row's beginning, its target and what belongs to it, and its end: from its stats to its loss and coefficients.
#pragma once

#include "row.cuh"

namespace longtail {
namespace gpu {

// One row's scalars. In rows that do not count, target is -1 and the rest 0.
struct Row {
  int64_t index;
  bool counted;
  int target;                // -1 also where another shard has it
  float u_g;                 // with the margin; of class 0, without, where another shard has the target
  float w_g, v, upstream;    // class weight of the target, sample weight, dL/dloss
  Terms terms = no_terms();  // of the target, where Elements::by_target
};

// The target of a row, and whether the row counts. Passes of a shard know -1: a class of another shard.
LONGTAIL_DEVICE Row load_target(const SoftmaxLossArgs& a, int64_t index, Pass pass) {
  const int64_t g = a.target[index * a.target_stride];
  const bool ignored = g == a.ignore_index, inside = g >= 0 && g < a.num_classes;
  const bool valid = inside || (of_shard(pass) && g == -1);
  LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
  return {index, valid && !ignored, inside && !ignored ? static_cast<int>(g) : -1, 0.0f, 0.0f, 0.0f, 0.0f};
}

// What the target of a counted row brings, but for an x_g that nobody has told.
LONGTAIL_DEVICE Terms load_terms(const SoftmaxLossArgs& a, const Row& row) {
  Terms terms = no_terms();
  if (a.target_terms != nullptr) {
    const float* const told = a.target_terms + 3 * row.index;
    return {a.target_scale != nullptr ? told[0] : terms.scale, told[1], told[2]};
  }
  if (row.target < 0) return terms;
  if (a.target_scale != nullptr) terms.scale = load_constant(a.target_scale + row.target);
  if (a.class_mitigation != nullptr) terms.mitigation = load_constant(a.class_mitigation + row.target);
  return terms;
}

// Whether x_g is wanted, and to be found here.
LONGTAIL_DEVICE bool wants_reference(const SoftmaxLossArgs& a) {
  return a.options.compensation != 0.0f && a.target_terms == nullptr;
}

// u_g is x_g so far: it joins the terms, or, of a class of another shard, is shifted by them.
template <bool kExtras>
LONGTAIL_DEVICE void add_reference(const SoftmaxLossArgs& a, const Elements<kExtras>& elements, Row& row) {
  if (row.target >= 0) {
    if (a.target_terms == nullptr) row.terms.reference = finite_max(row.u_g);
    return;
  }
  if (a.num_classes == 0) return;
  float u[1] = {row.u_g};
  elements.shift(u, 0, row.terms);
  row.u_g = u[0];
}

// What belongs to the target of a counted row, from its logit; that of class 0 where another shard has the target.
template <bool kExtras>
LONGTAIL_DEVICE void add_scalars(const SoftmaxLossArgs& a, Row& row, float logit, Pass pass) {
  float x[1] = {logit};
  const Elements<kExtras> elements(a, 1);
  elements.cap(x);
  const int g = row.target < 0 ? 0 : row.target;
  if (elements.by_target) row.terms = load_terms(a, row);
  elements.stretch(x, g, row.terms.scale);
  row.u_g = x[0];
  row.w_g = row.v = 1.0f;
  if (a.class_bias != nullptr) row.u_g += load_constant(a.class_bias + g);
  if (elements.by_target) add_reference(a, elements, row);
  if (a.class_margin != nullptr && row.target >= 0) row.u_g -= load_constant(a.class_margin + g);
  if (a.weight != nullptr) row.w_g = load_constant(a.weight + g);
  if (of_shard(pass)) return;
  if (a.sample_weight != nullptr) row.v = a.sample_weight[row.index];
  if (pass != Pass::loss) row.upstream = a.grad_loss[row.index * a.grad_loss_stride];
}

// All of it but the target, for rows [N, C].
template <typename Z, bool kExtras>
LONGTAIL_DEVICE void load_scalars(const SoftmaxLossArgs& a, Row& row, Pass pass) {
  if (!row.counted || (pass == Pass::apply && !(kExtras && is_by_target(a)))) return;
  const int g = row.target < 0 ? 0 : row.target;
  // Backward finds u_g in the stats, but not x_g; a shard may have no classes.
  const bool finished = pass == Pass::backward || (kExtras && pass == Pass::apply);
  const bool untold = kExtras && wants_reference(a) && row.target >= 0;
  const bool found = (finished && !untold) || a.num_classes == 0;
  const float logit = found ? 0.0f : to_float(static_cast<const Z*>(a.logits)[row.index * a.logits_stride + g]);
  add_scalars<kExtras>(a, row, logit, pass);
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

// The loss and stats of a row that does not count.
LONGTAIL_DEVICE void ignore_at(const SoftmaxLossArgs& a, int64_t index, Pass pass, const StatsPlace& place) {
  if (!makes_stats(pass)) return;
  if (pass != Pass::accumulate) a.loss[index] = 0.0f;
  place.store(Stats{});
}

// From the stats of a counted row, which Pass::backward finds at their place, to the coefficients of its gradient;
// `store` writes its loss and stats.
LONGTAIL_DEVICE Grad finish_at(const SoftmaxLossArgs& a, const Row& row, Stats s, Pass pass, bool store,
                               const StatsPlace& place) {
  if (pass == Pass::apply) {
    const float* g = a.row_grad + 5 * row.index;
    return {g[0], g[1], g[2], g[3], g[4]};
  }
  const float classes = static_cast<float>(a.num_classes);
  const bool smoothing = a.options.label_smoothing != 0.0f;
  const float weight_sum = smoothing && a.weight != nullptr && pass != Pass::accumulate ? *a.weight_sum : classes;
  if (pass == Pass::backward) {
    s = place.load();
  } else {
    s.m = s.d == s.d ? s.m : s.d;  // a maximum passes over NaN, a sum does not
    // The target's share: 0, but for a target at -inf.
    if (smoothing && row.target >= 0) s.U += row.w_g * (s.u_g - finite_max(s.u_g));
  }
  if (pass == Pass::accumulate) {
    if (store) place.store(s);
    return {};
  }
  // A copy: options that are read in place make more code of some kernels.
  longtail::generic::RowLoss<float> result =
      longtail::generic::finish(s, LossOptions<float>(a.options), a.smooth, weight_sum, row.w_g, row.v);
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

// The row that a place in the grid takes. Passes that read again go from the last to the first: those that the pass
// before read last may still be in the L2 cache.
LONGTAIL_DEVICE int64_t row_at(const SoftmaxLossArgs& a, int64_t place, Pass pass) {
  return makes_stats(pass) ? place : a.rows - 1 - place;
}

}  // namespace gpu
}  // namespace longtail
