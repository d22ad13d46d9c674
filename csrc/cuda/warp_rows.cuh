// Short rows: `lanes` lanes of a warp per row, which they hold in registers.
#pragma once

#include "reduce.cuh"

namespace longtail {
namespace gpu {

// One row, or none (`index` >= N), by `lanes` lanes; vector k of a lane begins at column (k * lanes + lane) * kCount.
template <typename Z, int kCount, bool kExtras>
struct WarpRow {
  static constexpr int kGroup = group_of(kCount), kGroups = held_of(kCount) / kCount / kGroup;
  const SoftmaxLossArgs& a;
  const int lane, lanes, vectors;           // vectors: of the whole row
  Vector<Z, kCount> held[kGroups][kGroup];  // vector k of this lane: held[k / kGroup][k % kGroup]

  LONGTAIL_DEVICE WarpRow(const SoftmaxLossArgs& args, int lane_, int lanes_)
      : a(args), lane(lane_), lanes(lanes_), vectors(static_cast<int>(args.num_classes) / kCount) {}

  LONGTAIL_DEVICE void load(const Row& row) {
    const Z* z = static_cast<const Z*>(a.logits) + row.index * a.logits_stride;
#pragma unroll
    for (int k = 0; k < kGroups * kGroup; ++k) {
      const int i = k * lanes + lane;
      if (i < vectors) held[k / kGroup][k % kGroup].load(z + i * kCount);
    }
  }

  LONGTAIL_DEVICE Stats stats(const Row& row) const {
    const Elements<kExtras> elements(a, 0);
    Stats s = empty_stats(row.u_g);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int first = group * kGroup * lanes;
      if (first >= vectors) break;
      add_vectors(s, held[group], first + lane, lanes, vectors, 0, row.target, elements);
    }
    return s;
  }

  LONGTAIL_DEVICE void store(const Row& row, const Grad& g) const {
    const Elements<kExtras> elements(a, 0);
    Z* grad = static_cast<Z*>(a.grad) + row.index * a.grad_stride;
#pragma unroll
    for (int k = 0; k < kGroups * kGroup; ++k) {
      const int i = k * lanes + lane;
      if (i >= vectors) break;
      float x[kCount] = {};
      if (row.counted()) {
        held[k / kGroup][k % kGroup].get(x);
        elements.gradient(x, i * kCount, row.target, g);
      }
      Vector<Z, kCount>::store(grad + i * kCount, x);
    }
  }
};

// reads: logits [N, C] once, ignored rows never; target; per row the target's logit, weight, bias, margin, the sample
//   weight, the upstream gradient (unless `loss`), the stats [N, 5] (`backward`); class_bias and, with label smoothing,
//   weight [C] per row, from cache.
// writes: loss [N] and stats [N, 5] (unless `backward`); grad [N, C] (unless `loss`; may be the logits' own memory).
// bytes: N C s (loss) or 2 N C s for elements of s bytes, and some 40 N: the least there is.
template <typename Z, int kCount, bool kExtras>
LONGTAIL_KERNEL(kWarpThreads, warp_resident(kCount > 1))
warp_rows_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a, Pass pass, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t rows_per_block = static_cast<int>(blockDim.x) / lanes;
  // Every lane of a warp stays until its last row is done: the shuffles need them all.
  for (int64_t first = blockIdx.x * rows_per_block; first < a.rows; first += gridDim.x * rows_per_block) {
    const int64_t place = first + static_cast<int>(threadIdx.x) / lanes;
    const bool exists = place < a.rows;
    WarpRow<Z, kCount, kExtras> warp_row(a, lane, lanes);
    Row row = {-1, -1, 0.0f, 0.0f, 0.0f, 0.0f};
    if (exists) row = load_row<Z, kExtras>(a, row_at(a, place, pass), pass != Pass::loss);
    Stats s = empty_stats(row.u_g);
    if (row.counted()) {
      warp_row.load(row);
      if (pass != Pass::backward) s = warp_row.stats(row);
    }
    if (pass != Pass::backward) s = join_lanes(s, lanes);
    __syncwarp();  // every lane has read the target's logit before one writes its gradient there; shuffles order
                   // nothing
    if (!exists) continue;
    Grad g = {};
    if (row.counted()) {
      g = finish_row(a, row, s, pass, lane == 0);
    } else if (pass != Pass::backward && lane == 0) {
      store_row(a, row.index, 0.0f, Stats{});
    }
    if (pass != Pass::loss) warp_row.store(row, g);
  }
}

}  // namespace gpu
}  // namespace longtail
