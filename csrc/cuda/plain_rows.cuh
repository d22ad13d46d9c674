// A long row's work in one thread where logits are their own effective logits: whole chunks without a comparison per
// vector, and each register loaded anew as soon as it has been read.
#pragma once

#include "block_rows.cuh"

namespace longtail {
namespace gpu {

template <typename Z, bool kExtras>
struct PlainRow {
  static constexpr int kCount = 16 / sizeof(Z);
  using V = Vector<Z, kCount>;
  using Held = V[kPlainGroup];
  using Block = BlockRow<Z, kCount, kExtras>;
  const Block& block;
  const Z* const from;  // where the part's vectors are read: in device memory, or kept in shared memory
  const int whole;      // chunks that are whole
  int target_chunk;     // of this thread, or -1
  int target_place;     // of the target among the elements of its chunk, where it has one

  LONGTAIL_DEVICE PlainRow(const Block& b, const Z* from_)
      : block(b), from(from_), whole(b.part.vectors >> log2_of(kPlainGroup * b.step)) {
    const int place = b.row.target - b.part.origin, vector = place / kCount;
    const int chunk = vector >> log2_of(kPlainGroup * b.step), turn = vector - first_of<kPlainGroup>(chunk);
    const bool mine =
        place >= 0 && vector < b.part.vectors && turn >= 0 && turn < kPlainGroup * kWarpSize && turn % kWarpSize == 0;
    target_chunk = mine ? chunk : -1;
    target_place = turn / kWarpSize * kCount + place % kCount;
  }

  LONGTAIL_DEVICE bool has_tail() const { return whole * kPlainGroup * block.step < block.part.vectors; }
  LONGTAIL_DEVICE const Z* vector(int chunk, int k = 0) const {
    return Block::vector_at(from, first_of<kPlainGroup>(chunk) + k * kWarpSize);
  }

  static LONGTAIL_DEVICE void load(Held& held, const Z* first) {
#pragma unroll
    for (int k = 0; k < kPlainGroup; ++k) held[k].load(first + k * kWarpSize * kCount);
  }

  // The last chunk, which is not whole.
  LONGTAIL_DEVICE void load_tail(Held& held) const {
#pragma unroll
    for (int k = 0; k < kPlainGroup; ++k) {
      held[k].fill_very_low();
      if (first_of<kPlainGroup>(whole) + k * kWarpSize < block.part.vectors) held[k].load(vector(whole, k));
    }
  }

  // Adds the chunk, but for one whose sums base 2 cannot take; `next(k)` when vector k has been read.
  template <bool kEntropy, typename Next>
  LONGTAIL_DEVICE bool add_chunk(Stats& s, Held& held, int chunk, const Next& next) const {
    if (chunk == target_chunk) {
#pragma unroll
      for (int k = 0; k < kPlainGroup; ++k) held[k].make_very_low(target_place - k * kCount);
    }
    const float m = fmaxf(s.m, max_of(held));
    const ChunkSums sums = sums_of<kEntropy>(held, m, next);
    if (!is_moderate(m, Z()) || !sums.valid()) return false;
    float shift = s.m - m;
    const float factor = exp_cut(shift);
    s.t = kEntropy ? fmaf(factor, fmaf(s.d, shift, s.t), sums.t) : 0.0f;
    s.d = fmaf(factor, s.d, sums.d);
    s.m = m;
    return true;
  }

  // The same from memory, whatever the logits are.
  LONGTAIL_DEVICE void add_again(Stats& s, int chunk) const {
#pragma unroll 1
    for (int k = 0; k < kPlainGroup; ++k) {
      const int i = first_of<kPlainGroup>(chunk) + k * kWarpSize;
      if (i >= block.part.vectors) return;
      add_from_memory<kCount>(s, Block::vector_at(from, i), block.row.target - block.part.origin - i * kCount);
    }
  }

  // Adds whole chunks from `chunk` on, which is held; the first that was not added, or `whole`.
  template <bool kEntropy>
  LONGTAIL_DEVICE int sweep_whole(Stats& s, Held& held, int chunk) const {
    const Z* next = vector(chunk);
#pragma unroll 1
    for (; chunk < whole; ++chunk) {
      const bool more = chunk + 1 < whole;
      next += kPlainGroup * kCount * block.step;
      const bool added = add_chunk<kEntropy>(s, held, chunk, [&](int k) {
        if (more) held[k].load(next + k * kWarpSize * kCount);
      });
      if (!added) return chunk;
    }
    return whole;
  }

  LONGTAIL_DEVICE void sweep_stats(Stats& s, bool entropy) const {
    Held held;
    int chunk = 0;
#pragma unroll 1
    while (chunk < whole) {
      load(held, vector(chunk));
      chunk = entropy ? sweep_whole<true>(s, held, chunk) : sweep_whole<false>(s, held, chunk);
      if (chunk < whole) add_again(s, chunk++);
    }
    if (has_tail()) {
      load_tail(held);
      if (!add_chunk<true>(s, held, whole, [](int) {})) add_again(s, whole);
    }
    if (!entropy) s.t = 0.0f;
  }

  // What sweep_grad reads first.
  LONGTAIL_DEVICE void begin_grad(Held& held) const {
    if (whole > 0) load(held, vector(whole - 1));
  }

  // The gradient of this thread's vectors, last whole chunk first; `held`: from begin_grad.
  LONGTAIL_DEVICE void sweep_grad(Held& held, const Grad& g) const {
    if (!is_moderate(g.m, float())) return sweep_grad_again(g);
    if (g.b == 0.0f) {
      sweep_grad(held, PlainGrad<false>(g.m, g.a, g.b));
    } else {
      sweep_grad(held, PlainGrad<true>(g.m, g.a, g.b));
    }
    if (target_chunk < 0) return;
    const float x[1] = {g.target};
    Vector<Z, 1>::store(block.grad + (block.row.target - block.part.origin), x);
  }

  // The same, whatever the logits are.
  LONGTAIL_DEVICE void sweep_grad_again(const Grad& g) const {
#pragma unroll 1
    for (int k = kPlainGroup * (whole + 1) - 1; k >= 0; --k) {
      const int i = first_of<kPlainGroup>(k / kPlainGroup) + k % kPlainGroup * kWarpSize;
      if (i >= block.part.vectors) continue;
      V held;
      held.load(Block::vector_at(from, i));
      float x[kCount];
      held.get(x);
      block.elements.gradient(x, block.part.origin + i * kCount, block.row.target, block.row.terms, g);
      V::store(Block::vector_at(block.grad, i), x);
    }
  }

  template <bool kComplement>
  LONGTAIL_DEVICE void sweep_grad(Held& held, const PlainGrad<kComplement>& g) const {
    const int step = kPlainGroup * kCount * block.step;
    const Z* next = vector(whole - 1) - step;
    Z* to = Block::vector_at(block.grad, first_of<kPlainGroup>(whole - 1));
#pragma unroll 1
    for (int left = whole; left > 0; --left) {
#pragma unroll
      for (int k = 0; k < kPlainGroup; ++k) {
        store(to + k * kWarpSize * kCount, held[k], g);
        if (left > 1) held[k].load(next + k * kWarpSize * kCount);
      }
      next -= step;
      to -= step;
    }
#pragma unroll 1
    for (int k = 0; k < kPlainGroup; ++k) {
      const int i = first_of<kPlainGroup>(whole) + k * kWarpSize;
      if (i >= block.part.vectors) return;
      V one;
      one.load(Block::vector_at(from, i));
      store(Block::vector_at(block.grad, i), one, g);
    }
  }

  template <bool kComplement>
  static LONGTAIL_DEVICE void store(Z* to, const V& held, const PlainGrad<kComplement>& g) {
    float x[kCount];
    held.get(x);
    g.apply(x);
    V::store(to, x);
  }
};

}  // namespace gpu
}  // namespace longtail
