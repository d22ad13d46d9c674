// Loss and gradient of long rows that are read once: their vectors stay in the shared memory of a block, or of a
// cluster of them, from the stats to the gradient.
#pragma once

#include "plain_rows.cuh"

namespace longtail {
namespace gpu {

// Vectors of a thread that are under way from device memory: 256 bytes.
constexpr int kUnderWay = 16;

// Chunks of kGroup vectors in the shared memory of their block. A thread reads what it fetched itself, and nothing
// else: no barrier stands between the two.
template <typename Z, bool kExtras, int kGroup>
struct KeptRow {
  static constexpr int kCount = 16 / sizeof(Z), kPipeline = kUnderWay / kGroup;
  using Block = BlockRow<Z, kCount, kExtras>;
  const Block& block;
  Z* const kept;
  const int chunks;

  LONGTAIL_DEVICE KeptRow(const Block& b, const Joint& joint)
      : block(b),
        kept(reinterpret_cast<Z*>(dynamic_shared<char>() + joint.bytes())),
        chunks((b.part.vectors + kGroup * b.step - 1) >> log2_of(kGroup * b.step)) {}

  LONGTAIL_DEVICE void fetch(int chunk) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first_of<kGroup>(chunk) + k * kWarpSize;
      if (i < block.part.vectors) copy_async_16(Block::vector_at(kept, i), Block::vector_at(block.body, i));
    }
    copy_async_commit();
  }

  // Calls `add(chunk)` for each chunk once it is there.
  template <typename Add>
  LONGTAIL_DEVICE void sweep(const Add& add) const {
    for (int chunk = 0; chunk < kPipeline; ++chunk) fetch(chunk);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<kPipeline - 1>();
      add(chunk);
      fetch(chunk + kPipeline);
    }
  }
};

template <bool kEntropy, typename Z>
LONGTAIL_DEVICE void sweep_kept(const KeptRow<Z, false, kPlainGroup>& row, const PlainRow<Z, false>& plain, Stats& s) {
  row.sweep([&](int chunk) {
    typename PlainRow<Z, false>::Held held;
    if (chunk < plain.whole) {
      plain.load(held, plain.vector(chunk));
    } else {
      plain.load_tail(held);
    }
    if (!plain.template add_chunk<kEntropy>(s, held, chunk, [](int) {})) plain.add_again(s, chunk);
  });
}

// The loss, stats and gradient of one row that counts.
template <typename Z, bool kExtras>
LONGTAIL_DEVICE void take_kept(const BlockRow<Z, 16 / sizeof(Z), kExtras>& block, Joint& joint, Pass pass) {
  Stats s = empty_stats(block.row.u_g);
  if constexpr (kExtras) {
    const KeptRow<Z, kExtras, BlockRow<Z, 16 / sizeof(Z), kExtras>::kGroup> row(block, joint);
    row.sweep([&](int chunk) {
      Vector<Z, 16 / sizeof(Z)> held[row.block.kGroup];
      block.load(held, row.kept, chunk);
      block.add_chunk(s, held, chunk);
    });
    block.add_edge(s);
    const Grad g = finish_in_block(block.a, block.row, joint, s, pass);
    block.store_edge(g);
    block.sweep_grad(row.kept, g);
  } else {
    const KeptRow<Z, kExtras, kPlainGroup> row(block, joint);
    const PlainRow<Z, kExtras> plain(block, row.kept);
    if (wants_entropy(block.a, pass)) {
      sweep_kept<true>(row, plain, s);
    } else {
      sweep_kept<false>(row, plain, s);
    }
    block.add_edge(s);
    typename PlainRow<Z, kExtras>::Held held;
    const Grad g = finish_in_block(block.a, block.row, joint, s, pass);
    plain.begin_grad(held);
    block.store_edge(g);
    plain.sweep_grad(held, g);
  }
}

// reads: logits [N, C] once, ignored rows never; the rest as sweep_rows_kernel.
// writes: loss [N], stats [N, 5], grad [N, C] (may be the logits' own memory).
// bytes: 2 N C s for elements of s bytes, and some 40 N: the least there is.
template <typename Z, bool kExtras>
LONGTAIL_KERNEL(kBlockThreads, kExtras ? 2 : kKeptResident)
shared_rows_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a) {
  constexpr Pass kPass = Pass::loss_and_grad;
  Joint joint;
  const int64_t teams = gridDim.x >> log2_of(joint.cluster());
  for (int64_t place = blockIdx.x >> log2_of(joint.cluster()); place < a.rows; place += teams) {
    Row row = load_target(a, place, kPass);
    load_scalars<Z, kExtras>(a, row, kPass);
    const BlockRow<Z, 16 / sizeof(Z), kExtras> block_row(a, row, joint);
    if (row.counted) {
      take_kept(block_row, joint, kPass);
    } else {
      ignore_in_block(a, row, joint, kPass);
      block_row.store_zeros();
    }
  }
  joint.meet();
}

}  // namespace gpu
}  // namespace longtail
