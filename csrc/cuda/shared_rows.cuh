// Loss and gradient of long rows that are read once: their vectors stay in the shared memory of a block, or of a
// cluster of them, from the stats to the gradient.
#pragma once

#include "block_rows.cuh"

namespace longtail {
namespace gpu {

// Chunks of a thread that are under way from device memory: 8 x 32 bytes.
constexpr int kPipeline = 8;

template <typename Z, bool kExtras>
struct SharedRow : BlockRow<Z, 16 / sizeof(Z), kExtras> {
  static constexpr int kCount = 16 / sizeof(Z);
  using Base = BlockRow<Z, kCount, kExtras>;
  using Base::kGroup;
  using Base::vector_at;
  using Held = Vector<Z, kCount>[kGroup];
  Z* const kept;

  LONGTAIL_DEVICE SharedRow(const SoftmaxLossArgs& a, const Row& row, const Joint& joint)
      : Base(a, row, joint), kept(reinterpret_cast<Z*>(dynamic_shared<char>() + joint.bytes())) {}

  LONGTAIL_DEVICE void fetch(int chunk) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = this->first_of(chunk) + k * this->step;
      if (i < this->part.vectors) copy_async_16(vector_at(kept, i), vector_at(this->body, i));
    }
    copy_async_commit();
  }

  // A thread reads what it fetched itself, and nothing else: no barrier stands between the two.
  LONGTAIL_DEVICE void look_up(Held& held, int chunk) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = this->first_of(chunk) + k * this->step;
      held[k] = {};
      if (i < this->part.vectors) held[k].load(vector_at(kept, i));
    }
  }

  LONGTAIL_DEVICE Stats stats() const {
    Stats s = empty_stats(this->row.u_g);
    for (int chunk = 0; chunk < kPipeline; ++chunk) fetch(chunk);
    for (int chunk = 0; chunk < this->chunks; ++chunk) {
      copy_async_wait<kPipeline - 1>();
      Held held;
      look_up(held, chunk);
      this->add_chunk(s, held, chunk);
      fetch(chunk + kPipeline);
    }
    this->add_edge(s);
    return s;
  }

  LONGTAIL_DEVICE void store(const Grad& g) const {
    for (int chunk = 0; chunk < this->chunks; ++chunk) {
      Held held;
      look_up(held, chunk);
      this->store_chunk(held, chunk, g);
    }
    this->store_edge(g);
  }
};

// reads: logits [N, C] once, ignored rows never; the rest as warp_rows_kernel.
// writes: loss [N], stats [N, 5], grad [N, C] (may be the logits' own memory).
// bytes: 2 N C s for elements of s bytes, and some 40 N: the least there is.
template <typename Z, bool kExtras>
LONGTAIL_KERNEL(kBlockThreads, resident_of(true, kExtras))
shared_rows_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a) {
  constexpr Pass kPass = Pass::loss_and_grad;
  Joint joint;
  const int64_t teams = gridDim.x >> log2_of(joint.cluster());
  for (int64_t place = blockIdx.x >> log2_of(joint.cluster()); place < a.rows; place += teams) {
    const Row row = load_row<Z, kExtras>(a, place, true);
    const SharedRow<Z, kExtras> shared_row(a, row, joint);
    if (row.counted()) {
      shared_row.store(finish_in_block(a, row, joint, shared_row.stats(), kPass));
    } else {
      ignore_in_block(a, row, joint, kPass);
      shared_row.store_zeros();
    }
  }
  joint.meet();
}

}  // namespace gpu
}  // namespace longtail
