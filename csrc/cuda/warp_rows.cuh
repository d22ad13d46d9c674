// Short rows: a team of `lanes` lanes of a warp holds one row after the other in registers. Of `batch` rows together,
// each lane loads, finishes and writes what is one row's alone.
#pragma once

#include "reduce.cuh"

namespace longtail {
namespace gpu {

// A team's work in one lane; vector k of a lane begins at column (k * lanes + lane) * kCount.
template <typename Z, int kCount, bool kExtras>
struct WarpTeam {
  static constexpr bool kPlain = kCount > 1 && !kExtras;
  static constexpr int kVectors = held_of(kCount) / kCount;
  static constexpr int kGroup = kPlain ? kVectors : group_of(kCount), kGroups = kVectors / kGroup;
  using V = Vector<Z, kCount>;
  const SoftmaxLossArgs& a;
  const Pass pass;
  const int lane, lanes, vectors;  // vectors: of the whole row
  const Elements<kExtras> elements;
  int64_t begin = 0;        // the place of the batch's first row
  V held[kGroups][kGroup];  // vector k of this lane: held[k / kGroup][k % kGroup]
  bool loaded = false;      // whether they are those of the row that comes next

  LONGTAIL_DEVICE WarpTeam(const SoftmaxLossArgs& args, Pass pass_, int lanes_)
      : a(args),
        pass(pass_),
        lane(static_cast<int>(threadIdx.x) & (lanes_ - 1)),
        lanes(lanes_),
        vectors(static_cast<int>(args.num_classes) / kCount),
        elements(args, 0) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if constexpr (kPlain) {
        held[0][k].fill_very_low();
      } else {
        held[k / kGroup][k % kGroup] = {};
      }
    }
  }

  // What the lane of the batch's row `j` has.
  template <typename T>
  LONGTAIL_DEVICE T of_row(T x, int j) const {
    return __shfl_sync(kAllLanes, x, (static_cast<int>(threadIdx.x) & (kWarpSize - lanes)) + j);
  }

  LONGTAIL_DEVICE Terms terms_of_row(const Row& mine, int j) const {
    if (!elements.by_target) return no_terms();
    return {of_row(mine.terms.scale, j), of_row(mine.terms.mitigation, j), of_row(mine.terms.reference, j)};
  }

  LONGTAIL_DEVICE const Z* logits_of(int j) const {
    return static_cast<const Z*>(a.logits) + row_at(a, begin + j, pass) * a.logits_stride;
  }

  LONGTAIL_DEVICE void load_vector(const Z* row, int k) {
    const int i = k * lanes + lane;
    if (i < vectors) held[k / kGroup][k % kGroup].load(row + i * kCount);
  }

  LONGTAIL_DEVICE bool holds(int target) const { return (target / kCount & (lanes - 1)) == lane; }

  // The stats of the row that is held, in every lane. `next(k)` is called when vector k has been read.
  template <bool kEntropy, typename Next>
  LONGTAIL_DEVICE Stats stats(const Z* row, int target, float u_g, const Terms& terms, const Next& next) {
    if constexpr (kPlain) {
      if (target >= 0 && holds(target)) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          held[0][k].make_very_low(target / kCount / lanes == k ? target % kCount : -1);
        }
      }
      const float m = max_lanes(max_of(held[0]), lanes);
      const ChunkSums sums = sums_of<kEntropy>(held[0], m, next);
      const bool again = !is_moderate(m, Z()) || !sums.valid();
      if (any_lane(again)) {
        const bool ours = max_lanes(again ? 1.0f : 0.0f, lanes) != 0.0f;  // not of another row in this warp
        const Stats all = {m, sums.d, sums.t, u_g, 0.0f};
        return join_lanes(ours ? stats_again(row, target, u_g) : all, lanes);
      }
      return {m, sum_lanes(sums.d, lanes), kEntropy ? sum_lanes(sums.t, lanes) : 0.0f, u_g, 0.0f};
    } else {
      Stats s = empty_stats(u_g);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int first = group * kGroup * lanes;
        if (first < vectors) add_vectors(s, held[group], first + lane, lanes, vectors, 0, target, terms, elements);
      }
#pragma unroll
      for (int k = 0; k < kVectors; ++k) next(k);
      return join_lanes(s, lanes);
    }
  }

  // Of this lane's classes, from memory, whatever the logits are.
  LONGTAIL_DEVICE Stats stats_again(const Z* row, int target, float u_g) const {
    Stats s = empty_stats(u_g);
#pragma unroll 1
    for (int i = lane; target >= 0 && i < vectors; i += lanes) {
      add_from_memory<kCount>(s, row + i * kCount, target - i * kCount);
    }
    return s;
  }

  // Of every row of the batch, each in its lane.
  template <bool kEntropy>
  LONGTAIL_DEVICE Stats batch_stats(const Row& mine, int batch) {
    Stats found = empty_stats(mine.u_g);
#pragma unroll 1
    for (int j = 0; j < batch; ++j) {
      const int target = of_row(mine.target, j), following = of_row(mine.target, min(j + 1, batch - 1));
      const float u_g = kExtras ? of_row(mine.u_g, j) : 0.0f;
      const Terms terms = terms_of_row(mine, j);
      if (lanes == kWarpSize && target < 0) continue;
      const Z* const row = logits_of(j);
      load(row, target >= 0);
      const bool more = j + 1 < batch && following >= 0;
      const Z* const after = logits_of(j + 1);
      const Stats s = stats<kEntropy>(row, target, u_g, terms, [&](int k) {
        if (more) load_vector(after, k);
      });
      loaded = more;
      if (lane == j) found = {s.m, s.d, s.t, mine.u_g, s.U};
    }
    loaded = false;
    return found;
  }

  // Where a row before has not done so.
  LONGTAIL_DEVICE void load(const Z* row, bool counted) {
    if (loaded || !counted) return;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) load_vector(row, k);
  }

  // The gradient of every row of the batch, from the coefficients in its lane, last row first.
  LONGTAIL_DEVICE void store_batch(const Row& mine, const Grad& g, int batch) {
#pragma unroll 1
    for (int j = batch - 1; j >= 0; --j) {
      const int target = of_row(mine.target, j), following = of_row(mine.target, max(j - 1, 0));
      const Grad c = {of_row(g.m, j), of_row(g.a, j), of_row(g.b, j), kExtras ? of_row(g.S, j) : 0.0f,
                      of_row(g.target, j)};
      const Terms terms = terms_of_row(mine, j);
      if (begin + j >= a.rows) continue;
      Z* const grad = static_cast<Z*>(a.grad) + row_at(a, begin + j, pass) * a.grad_stride;
      load(logits_of(j), target >= 0);
      loaded = j > 0 && following >= 0;
      store_row(grad, target, terms, c, logits_of(j - 1));
    }
    loaded = false;
  }

  // The gradient of the row that is held, 0 where it does not count; loads those of the row `after` if they are wanted.
  LONGTAIL_DEVICE void store_row(Z* grad, int target, const Terms& terms, const Grad& c, const Z* after) {
    const bool plain = kPlain && is_moderate(c.m, float());
    if (target < 0) {
      store_each(grad, after, [](float (&x)[kCount], int) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] = 0.0f;
      });
    } else if (plain && c.b == 0.0f) {
      const PlainGrad<false> g(c.m, c.a, c.b);
      store_each(grad, after, [&](float (&x)[kCount], int) { g.apply(x); });
    } else if (plain) {
      const PlainGrad<true> g(c.m, c.a, c.b);
      store_each(grad, after, [&](float (&x)[kCount], int) { g.apply(x); });
    } else {
      store_each(grad, after, [&](float (&x)[kCount], int column) { elements.gradient(x, column, target, terms, c); });
    }
    if (!plain || target < 0 || !holds(target)) return;
    const float x[1] = {c.target};
    Vector<Z, 1>::store(grad + target, x);
  }

  template <typename Gradient>
  LONGTAIL_DEVICE void store_each(Z* grad, const Z* after, const Gradient& gradient) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int i = k * lanes + lane;
      if (i >= vectors) break;
      float x[kCount];
      held[k / kGroup][k % kGroup].get(x);
      gradient(x, i * kCount);
      V::store(grad + i * kCount, x);
      if (loaded) load_vector(after, k);
    }
  }
};

// lanes: per row; batch: rows that a team takes together, at most as many as it has lanes.
// reads: logits [N, C] once for the stats and once for the gradient (with both, from cache), ignored rows never;
// target;
//   per row the target's logit and entries of the vectors [C], the sample weight, the upstream gradient (unless
//   `loss`), the stats [N, 5] (`backward`); the vectors [C] of what touches every element, weight with label smoothing,
//   per row, from cache.
// writes: loss [N] and stats [N, 5] (unless `backward`); grad [N, C] (unless `loss`; may be the logits' own memory).
// bytes: N C s (loss) or 2 N C s for elements of s bytes, and some 40 N: the least there is.
template <typename Z, int kCount, bool kExtras, typename PassOf>
LONGTAIL_KERNEL(kWarpThreads, warp_resident(kCount, kExtras, PassOf()))
warp_rows_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a, PassOf fixed, int lanes, int batch) {
  const Pass pass = fixed;
  WarpTeam<Z, kCount, kExtras> team(a, pass, lanes);
  const int teams = static_cast<int>(blockDim.x) >> log2_of(lanes);
  const int64_t rows_per_block = teams * batch;
  // Every lane of a warp stays until its last row is done: the shuffles need them all.
  for (int64_t first = blockIdx.x * rows_per_block; first < a.rows; first += gridDim.x * rows_per_block) {
    team.begin = first + (static_cast<int>(threadIdx.x) >> log2_of(lanes)) * batch;
    const int64_t place = team.begin + team.lane;
    const bool exists = team.lane < batch && place < a.rows;
    Row mine = {-1, false, -1, 0.0f, 0.0f, 0.0f, 0.0f};
    if (exists) {
      mine = load_target(a, row_at(a, place, pass), pass);
      load_scalars<Z, kExtras>(a, mine, pass);
    }
    Stats s = empty_stats(mine.u_g);
    if (makes_stats(pass)) {
      // Others than plain rows have entropy in any case.
      s = !team.kPlain || wants_entropy(a, pass) ? team.template batch_stats<true>(mine, batch)
                                                 : team.template batch_stats<!team.kPlain>(mine, batch);
    }
    __syncwarp();  // every lane has read its target's logit before one writes its gradient there; shuffles order
                   // nothing
    Grad g = {};
    if (mine.counted) {
      g = finish_row(a, mine, s, pass, true);
    } else if (exists) {
      ignore_at(a, mine.index, pass, stats_of_row(a, mine.index));
    }
    if (makes_grad(pass)) team.store_batch(mine, g, batch);
  }
}

}  // namespace gpu
}  // namespace longtail
