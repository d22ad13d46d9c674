// Long rows: one block or a cluster of blocks per row, in 16-byte vectors between the row's unaligned edges.
#pragma once

#include "reduce.cuh"

namespace longtail {
namespace gpu {

// The part of a row that this block takes: `vectors` vectors of kCount elements from class `origin` on, and in the
// threads that have one, one element of the row's edges.
template <typename Z, int kCount>
struct Part {
  int origin, vectors;
  int edge;  // a class, or -1

  LONGTAIL_DEVICE Part(const SoftmaxLossArgs& a, const Z* row, int cluster, int rank) {
    const int classes = static_cast<int>(a.num_classes), thread = static_cast<int>(threadIdx.x);
    int head = 0;
    if constexpr (kCount > 1) head = head_of(row, classes);
    const int all = (classes - head) / kCount, tail = classes - head - all * kCount;
    const int each = (all + cluster - 1) >> log2_of(cluster), begin = min(all, rank * each);
    origin = head + begin * kCount;
    vectors = min(all - begin, each);
    edge = -1;
    if constexpr (kCount > 1) {
      if (rank == 0 && thread < head) edge = thread;
      if (rank == cluster - 1 && thread >= kCount && thread < kCount + tail) edge = classes - tail + thread - kCount;
    }
  }
};

// The first vector of a thread's chunk of kGroup: those of a chunk are a warp apart, so that their addresses differ by
// constants; the warps' shares of a chunk lie side by side.
template <int kGroup>
LONGTAIL_DEVICE int first_of(int chunk) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread & (kWarpSize - 1);
  return (chunk * static_cast<int>(blockDim.x) + (thread - lane)) * kGroup + lane;
}

// One row's work in one thread.
template <typename Z, int kCount, bool kExtras>
struct BlockRow {
  static constexpr int kGroup = group_of(kCount);
  const SoftmaxLossArgs& a;
  const Row row;
  const Z* const logits;
  const Part<Z, kCount> part;
  const Z* const body;  // the first vector of the part
  Z* const grad;        // that of the gradient; not to be used in Pass::loss
  const Elements<kExtras> elements;
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const int chunks;
  float edge_logit = 0.0f;

  LONGTAIL_DEVICE BlockRow(const SoftmaxLossArgs& args, const Row& r, const Joint& joint)
      : a(args),
        row(r),
        logits(static_cast<const Z*>(args.logits) + r.index * args.logits_stride),
        part(args, logits, joint.cluster(), joint.rank()),
        body(logits + part.origin),
        grad(static_cast<Z*>(args.grad) + (r.index * args.grad_stride + part.origin)),
        elements(args, part.origin),
        chunks((part.vectors + kGroup * step - 1) >> log2_of(kGroup * step)) {
    if (part.edge >= 0 && row.counted) edge_logit = to_float(logits[part.edge]);
  }

  // One multiply-add with a 64-bit result.
  template <typename T>
  static LONGTAIL_DEVICE T* vector_at(T* first, int i) {
    return first + static_cast<uint64_t>(static_cast<unsigned>(i)) * kCount;
  }

  LONGTAIL_DEVICE void load(Vector<Z, kCount> (&held)[kGroup], const Z* from, int chunk) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first_of<kGroup>(chunk) + k * kWarpSize;
      held[k] = {};
      if (i < part.vectors) held[k].load(vector_at(from, i));
    }
  }

  LONGTAIL_DEVICE void add_chunk(Stats& s, const Vector<Z, kCount> (&held)[kGroup], int chunk) const {
    add_vectors(s, held, first_of<kGroup>(chunk), kWarpSize, part.vectors, part.origin, row.target, row.terms,
                elements);
  }

  // Vectors beyond the part are not stored. Without extras they are computed all the same: a branch would keep the
  // others apart. With extras their class constants are not there to be read.
  LONGTAIL_DEVICE void store_chunk(const Vector<Z, kCount> (&held)[kGroup], int chunk, const Grad& g) const {
    float x[kGroup][kCount];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first_of<kGroup>(chunk) + k * kWarpSize;
      if (kExtras && i >= part.vectors) break;
      held[k].get(x[k]);
      elements.gradient(x[k], part.origin + i * kCount, row.target, row.terms, g);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first_of<kGroup>(chunk) + k * kWarpSize;
      if (i < part.vectors) Vector<Z, kCount>::store(vector_at(grad, i), x[k]);
    }
  }

  // The gradient of an ignored row.
  LONGTAIL_DEVICE void store_zeros() const {
    const float zeros[kCount] = {};
    for (int i = thread; i < part.vectors; i += step) Vector<Z, kCount>::store(vector_at(grad, i), zeros);
    if (part.edge >= 0) store_edge(Grad{});
  }

  LONGTAIL_DEVICE void add_edge(Stats& s) const {
    if (part.edge < 0) return;
    float u[1] = {edge_logit};
    elements.effective(u, part.edge, row.target, row.terms, s);
    elements.replace(u, row.target - part.edge, -INFINITY);
    add(s, u);
  }

  LONGTAIL_DEVICE void store_edge(const Grad& g) const {
    if (part.edge < 0) return;
    float x[1] = {edge_logit};
    if (row.counted) elements.gradient(x, part.edge, row.target, row.terms, g);
    Vector<Z, 1>::store(grad + (part.edge - part.origin), x);
  }

  // The stats of this thread's vectors, straight from device memory: the next chunk is on its way while one is added.
  LONGTAIL_DEVICE void sweep_stats(Stats& s) const {
    Vector<Z, kCount> held[kGroup], next[kGroup];
    load(held, body, 0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load(next, body, chunk + 1);
      add_chunk(s, held, chunk);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) held[k] = next[k];
    }
  }

  // The gradient of this thread's vectors, last chunk first: what a sweep for the stats read last is still in cache.
  LONGTAIL_DEVICE void sweep_grad(const Z* from, const Grad& g) const {
    Vector<Z, kCount> held[kGroup];
#pragma unroll 1
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      load(held, from, chunk);
      store_chunk(held, chunk, g);
    }
  }
};

// The row's loss, stats and coefficients from its threads' stats: one warp finishes for all of them.
LONGTAIL_DEVICE Grad finish_in_block(const SoftmaxLossArgs& a, const Row& row, Joint& joint, Stats s, Pass pass) {
  if (makes_stats(pass)) s = joint.join(s);
  Grad g = {};
  if (joint.leads()) g = finish_row(a, row, s, pass, joint.rank() == 0 && threadIdx.x == 0);
  if (makes_grad(pass)) g = joint.share(g);
  joint.next_row();
  return g;
}

// An ignored row's loss and stats, once.
LONGTAIL_DEVICE void ignore_in_block(const SoftmaxLossArgs& a, const Row& row, const Joint& joint, Pass pass) {
  if (joint.rank() == 0 && threadIdx.x == 0) ignore_at(a, row.index, pass, stats_of_row(a, row.index));
}

}  // namespace gpu
}  // namespace longtail
