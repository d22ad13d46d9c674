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

// One row's work in one thread. Its vectors are blockDim.x apart, its chunks kGroup of them.
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
    if (part.edge >= 0 && row.counted()) edge_logit = to_float(logits[part.edge]);
  }

  // One multiply-add with a 64-bit result.
  template <typename T>
  static LONGTAIL_DEVICE T* vector_at(T* first, int i) {
    return first + static_cast<uint64_t>(static_cast<unsigned>(i)) * kCount;
  }

  LONGTAIL_DEVICE int first_of(int chunk) const { return chunk * kGroup * step + thread; }

  LONGTAIL_DEVICE void load(Vector<Z, kCount> (&held)[kGroup], int chunk) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first_of(chunk) + k * step;
      held[k] = {};
      if (i < part.vectors) held[k].load(vector_at(body, i));
    }
  }

  LONGTAIL_DEVICE void add_chunk(Stats& s, const Vector<Z, kCount> (&held)[kGroup], int chunk) const {
    add_vectors(s, held, first_of(chunk), step, part.vectors, part.origin, row.target, elements);
  }

  // Vectors beyond the part are not stored. Without extras they are computed all the same: a branch would keep the
  // others apart. With extras their class constants are not there to be read.
  LONGTAIL_DEVICE void store_chunk(const Vector<Z, kCount> (&held)[kGroup], int chunk, const Grad& g) const {
    float x[kGroup][kCount];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first_of(chunk) + k * step;
      if (kExtras && i >= part.vectors) break;
      held[k].get(x[k]);
      elements.gradient(x[k], part.origin + i * kCount, row.target, g);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first_of(chunk) + k * step;
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
    elements.effective(u, part.edge, row.target, s);
    elements.replace(u, row.target - part.edge, -INFINITY);
    add(s, u);
  }

  LONGTAIL_DEVICE void store_edge(const Grad& g) const {
    if (part.edge < 0) return;
    float x[1] = {edge_logit};
    if (row.counted()) elements.gradient(x, part.edge, row.target, g);
    Vector<Z, 1>::store(grad + (part.edge - part.origin), x);
  }

  // The stats of this thread's classes, straight from device memory: the next chunk is on its way while one is added.
  LONGTAIL_DEVICE Stats sweep_stats() const {
    Stats s = empty_stats(row.u_g);
    Vector<Z, kCount> held[kGroup], next[kGroup];
    load(held, 0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load(next, chunk + 1);
      add_chunk(s, held, chunk);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) held[k] = next[k];
    }
    add_edge(s);
    return s;
  }

  // The gradient of this thread's classes, last chunk first: what a sweep for the stats read last is still in cache.
  LONGTAIL_DEVICE void sweep_grad(const Grad& g) const {
    Vector<Z, kCount> held[kGroup];
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      load(held, chunk);
      store_chunk(held, chunk, g);
    }
    store_edge(g);
  }
};

// The row's loss, stats and coefficients from its threads' stats: one warp finishes for all of them.
LONGTAIL_DEVICE Grad finish_in_block(const SoftmaxLossArgs& a, const Row& row, Joint& joint, Stats s, Pass pass) {
  if (pass != Pass::backward) s = joint.join(s);
  Grad g = {};
  if (joint.leads()) g = finish_row(a, row, s, pass, joint.rank() == 0 && threadIdx.x == 0);
  if (pass != Pass::loss) g = joint.share(g);
  joint.next_row();
  return g;
}

// An ignored row's loss and stats, once.
LONGTAIL_DEVICE void ignore_in_block(const SoftmaxLossArgs& a, const Row& row, const Joint& joint, Pass pass) {
  if (pass != Pass::backward && joint.rank() == 0 && threadIdx.x == 0) store_row(a, row.index, 0.0f, Stats{});
}

// Nothing is kept: one sweep for the stats (unless `backward`), one for the gradient (unless `loss`), in reverse.
// reads: logits [N, C] once per sweep, ignored rows never; the rest as warp_rows_kernel.
// writes: as warp_rows_kernel.
// bytes: N C s (loss) or 2 N C s (backward) for elements of s bytes, the least there is; 3 N C s with both sweeps, of
//   which the rows in flight find as much in the L2 cache as fits there; some 40 N.
template <typename Z, int kCount, bool kExtras>
LONGTAIL_KERNEL(kBlockThreads, resident_of(kCount > 1, kExtras))
sweep_rows_kernel(LONGTAIL_PARAMETER SoftmaxLossArgs a, Pass pass) {
  Joint joint;
  const int64_t teams = gridDim.x >> log2_of(joint.cluster());
  for (int64_t place = blockIdx.x >> log2_of(joint.cluster()); place < a.rows; place += teams) {
    const Row row = load_row<Z, kExtras>(a, row_at(a, place, pass), pass != Pass::loss);
    const BlockRow<Z, kCount, kExtras> block_row(a, row, joint);
    if (!row.counted()) {
      ignore_in_block(a, row, joint, pass);
      if (pass != Pass::loss) block_row.store_zeros();
      continue;
    }
    Stats s = empty_stats(row.u_g);
    if (pass != Pass::backward) s = block_row.sweep_stats();
    const Grad g = finish_in_block(a, row, joint, s, pass);
    if (pass != Pass::loss) block_row.sweep_grad(g);
  }
  joint.meet();
}

}  // namespace gpu
}  // namespace longtail
