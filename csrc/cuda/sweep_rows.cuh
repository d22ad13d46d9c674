// Long rows from device memory: nothing is kept between one sweep for the stats and one for the gradient.
#pragma once

#include "plain_rows.cuh"

namespace longtail {
namespace gpu {

// The two sweeps of one row, in the way that its logits allow.
template <typename Z, int kCount, bool kExtras>
struct SweptRow {
  const BlockRow<Z, kCount, kExtras>& block;

  LONGTAIL_DEVICE Stats stats(Pass) const {
    Stats s = empty_stats(block.row.u_g);
    block.sweep_stats(s);
    block.add_edge(s);
    return s;
  }

  LONGTAIL_DEVICE void begin_grad() {}
  LONGTAIL_DEVICE void store_grad(const Grad& g) const {
    block.store_edge(g);
    block.sweep_grad(block.body, g);
  }
};

// Without extras; or from coefficients alone, which may turn out to be without.
template <typename Z, bool kExtras>
struct SweptPlainRow {
  using Plain = PlainRow<Z, kExtras>;
  const Plain row;
  typename Plain::Held held;

  LONGTAIL_DEVICE explicit SweptPlainRow(const typename Plain::Block& block) : row(block, block.body) {}

  LONGTAIL_DEVICE Stats stats(Pass pass) const {
    Stats s = empty_stats(row.block.row.u_g);
    row.sweep_stats(s, wants_entropy(row.block.a, pass));
    row.block.add_edge(s);
    return s;
  }

  LONGTAIL_DEVICE void begin_grad() { row.begin_grad(held); }
  LONGTAIL_DEVICE void store_grad(const Grad& g) {
    row.block.store_edge(g);
    if (!row.block.elements.plain() || (kExtras && g.S != 0.0f)) {
      row.block.sweep_grad(row.from, g);
    } else {
      row.sweep_grad(held, g);
    }
  }
};

// reads: logits [N, C] once per sweep, ignored rows never; target;
//   per row the target's logit and entries of the vectors [C], or target_terms [N, 3], the sample weight, the upstream
//   gradient (unless `loss`), the stats [N, 5] (`backward`) or row_grad [N, 5] (`apply`); the vectors [C] of what
//   touches every element, weight with label smoothing, per row, from cache.
// writes: loss [N] (but for shards) and stats [N, 5]; grad [N, C] (may be the logits' own memory but for `backward`).
// bytes: N C s (loss, accumulate) or 2 N C s (backward, apply) for elements of s bytes, the least there is;
//   3 N C s with both sweeps, of which the rows in flight find as much in the L2 cache as fits there; some 40 N.
template <typename Z, int kCount, bool kExtras, typename PassOf>
LONGTAIL_KERNEL(kBlockThreads, resident_of(kCount > 1, kExtras, PassOf()))
sweep_rows_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a, PassOf fixed) {
  const Pass pass = fixed;
  constexpr bool kPlain = kCount > 1 && (!kExtras || PassOf() == Pass::apply);
  Joint joint;
  const int64_t teams = gridDim.x >> log2_of(joint.cluster());
  for (int64_t place = blockIdx.x >> log2_of(joint.cluster()); place < a.rows; place += teams) {
    Row row = load_target(a, row_at(a, place, pass), pass);
    load_scalars<Z, kExtras>(a, row, pass);
    const BlockRow<Z, kCount, kExtras> block_row(a, row, joint);
    if (!row.counted) {
      ignore_in_block(a, row, joint, pass);
      if (makes_grad(pass)) block_row.store_zeros();
      continue;
    }
    std::conditional_t<kPlain, SweptPlainRow<Z, kExtras>, SweptRow<Z, kCount, kExtras>> swept{block_row};
    Stats s = empty_stats(row.u_g);
    if (makes_stats(pass)) s = swept.stats(pass);
    // The gradient may take the place of the target's logit, which every block has read.
    if (kExtras && pass == Pass::apply && wants_reference(a)) joint.wait_for_blocks();
    if (!makes_stats(pass)) swept.begin_grad();  // the first chunk is on its way while the row is finished
    const Grad g = finish_in_block(a, row, joint, s, pass);
    if (makes_stats(pass) && makes_grad(pass)) swept.begin_grad();
    if (makes_grad(pass)) swept.store_grad(g);
  }
  joint.meet();
}

}  // namespace gpu
}  // namespace longtail
