// The row loop of hierarchical cross-entropy, written once and compiled once per instruction set.
//
// A ring is two stretches of positions at most. Where classes are at their own positions, the stretches are read and
// written where they lie. Elsewhere ring 0, nearly all of a row, is swept in memory order, the members of A_1 masked;
// they are gathered by position for the rings within, and their gradients written over those of the sweep.
#pragma once

#include "../hierarchical_math.h"
#include "kernels.h"
#include "softmax_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Logits, -inf in the place of those at the positions [begin, begin + size).
template <typename Z, bool kBiased>
struct MaskedLogits {
  using T = typename Stored<Z>::Arithmetic;
  using Places = typename Vec<T>::Unsigned;
  typedef int32_t Positions __attribute__((vector_size(Vec<T>::kLanes * sizeof(int32_t))));
  const Z* z;
  const T* bias;
  const int32_t* position;
  uint32_t begin, size;

  LONGTAIL_INLINE Vec<T> masked(Vec<T> u, Positions at) const {
    const Places beyond = __builtin_convertvector(at, Places) - begin;
    return select(Mask<T>{beyond < size}, Vec<T>(T(-INFINITY)), u);
  }
  LONGTAIL_INLINE Vec<T> whole(int64_t j) const {
    Positions at;
    memcpy(&at, position + j, sizeof(at));
    const Vec<T> u = load(z + j);
    return masked(kBiased ? u + load(bias + j) : u, at);
  }
  LONGTAIL_INLINE Vec<T> some(int64_t j, int64_t count) const {
    Positions at = {};
    memcpy(&at, position + j, count * sizeof(int32_t));
    const Vec<T> u = padded(z + j, count, T(-INFINITY));
    return masked(kBiased ? u + widen(bias + j, load_raw(bias + j, count)) : u, at);
  }
  LONGTAIL_INLINE void prefetch(int64_t j) const { prefetch_ahead(z + j, 2 * Vec<T>::kLanes); }
};

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class HierarchicalRows {
 public:
  HierarchicalRows(const HierarchicalLossArgs& args, Pass pass, void* scratch)
      : args_(args),
        pass_(pass),
        depth_(args.depth),
        columns_(2 * args.depth + 1),
        bias_(static_cast<const T*>(args.class_bias)),
        ordered_bias_(static_cast<const T*>(args.ordered_bias)),
        members_(static_cast<Z*>(scratch)) {}

  // Returns the first row whose target, or its path, is wrong, or -1.
  int64_t run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = args_.target[i * args_.target_stride];
      if (g == args_.ignore_index) {
        ignore_row(i);
      } else if (g < 0 || g >= args_.num_classes || !find_path(g)) {
        return i;
      } else {
        run_row(i, g);
      }
    }
    if (args_.stream) stream_end();
    return -1;
  }

 private:
  using V = Vec<T>;

  struct Running {
    T m = -INFINITY;
    V d = T(0);
  };

  // The nodes of the path of class g; false where they do not nest.
  bool find_path(int64_t g) {
    begin_[0] = 0;
    end_[0] = args_.num_classes;
    for (int k = 0; k < depth_; ++k) {
      const int64_t node = args_.path[g * depth_ + k];
      if (node < 0 || node >= args_.nodes) return false;
      begin_[k + 1] = args_.node_begin[node];
      end_[k + 1] = args_.node_end[node];
      if (begin_[k + 1] < begin_[k] || end_[k + 1] > end_[k]) return false;
      lambda_[k] = static_cast<const T*>(args_.node_weight)[node];
    }
    place_ = args_.position ? args_.position[g] : g;
    return begin_[depth_] == place_ && end_[depth_] == place_ + 1;
  }

  void run_row(int64_t i, int64_t g) {
    const Z* z = static_cast<const Z*>(args_.logits) + i * args_.logits_stride;
    T* stats = static_cast<T*>(args_.stats) + i * columns_;
    if (pass_ != Pass::backward) find_stats(z, g, stats);
    T factor = args_.weight ? static_cast<const T*>(args_.weight)[g] : T(1);
    if (args_.sample_weight) factor *= static_cast<const T*>(args_.sample_weight)[i];
    HierarchicalRow<T> row = finish_rings(depth_, stats, lambda_, factor);
    if (pass_ != Pass::backward) static_cast<T*>(args_.loss)[i] = row.loss;
    if (pass_ == Pass::loss) return;
    const T upstream = static_cast<const T*>(args_.grad_loss)[i * args_.grad_loss_stride];
    for (int k = 0; k < depth_; ++k) row.ring[k] *= upstream;
    row.target *= upstream;
    write_row(z, stats, row, g, static_cast<Z*>(args_.grad) + i * args_.grad_stride);
  }

  void ignore_row(int64_t i) {
    if (pass_ != Pass::backward) {
      static_cast<T*>(args_.loss)[i] = T(0);
      memset(static_cast<T*>(args_.stats) + i * columns_, 0, columns_ * sizeof(T));
    }
    if (pass_ != Pass::loss) {
      memset(static_cast<Z*>(args_.grad) + i * args_.grad_stride, 0, args_.num_classes * sizeof(Z));
    }
  }

  // Whether all classes are below A_1: ring 0 is empty.
  bool only_child() const { return end_[1] - begin_[1] == args_.num_classes; }

  void gather(const Z* z) {
    const int32_t* order = args_.order + begin_[1];
    const int64_t count = end_[1] - begin_[1];
    for (int64_t k = 0; k < count; ++k) members_[k] = z[order[k]];
  }

  void find_stats(const Z* z, int64_t g, T* stats) {
    T u_g = load_some(z + g, 1).v[0];
    if (bias_) u_g += bias_[g];
    stats[2 * depth_] = u_g;
    int first = 0;
    if (args_.order) {
      Running ring;
      if (!only_child()) add_masked(z, ring);
      write_stats(ring, stats);
      gather(z);
      z = members_;
      first = 1;
    }
    for (int k = first; k < depth_; ++k) {
      Running ring;
      add(z, begin_[k], begin_[k + 1], ring);
      add(z, end_[k + 1], end_[k], ring);
      write_stats(ring, stats + 2 * k);
    }
  }

  static void write_stats(const Running& ring, T* stats) {
    stats[0] = ring.m;
    stats[1] = horizontal_sum(ring.d);
  }

  // Where position p of what z points to lies: that of the row, or the members of A_1.
  int64_t offset(int64_t p) const { return args_.order ? p - begin_[1] : p; }
  const T* bias_at(int64_t p) const { return (args_.order ? ordered_bias_ : bias_) + p; }

  void add(const Z* z, int64_t begin, int64_t end, Running& ring) {
    if (begin >= end) return;
    if (bias_) {
      add_stretch(BiasedLogits<Z>{z + offset(begin), bias_at(begin)}, end - begin, ring);
    } else {
      add_stretch(Logits<Z>{z + offset(begin)}, end - begin, ring);
    }
  }

  void add_masked(const Z* z, Running& ring) {
    const uint32_t begin = static_cast<uint32_t>(begin_[1]), size = static_cast<uint32_t>(end_[1] - begin_[1]);
    if (bias_) {
      add_masked_row(MaskedLogits<Z, true>{z, bias_, args_.position, begin, size}, args_.num_classes, ring);
    } else {
      add_masked_row(MaskedLogits<Z, false>{z, nullptr, args_.position, begin, size}, args_.num_classes, ring);
    }
  }

  // A function of its own for each source, as those of SoftmaxRows.
  template <typename Source>
  __attribute__((noinline)) static void add_stretch(const Source u, int64_t count, Running& ring) {
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t end = count - begin < kBlock ? count : begin + kBlock;
      add_block(u, begin, end, largest_of(u, begin, end, V(T(-INFINITY))), ring);
    }
  }

  // What is masked is kept from the maximum to the sum.
  template <bool kBiased>
  __attribute__((noinline)) static void add_masked_row(const MaskedLogits<Z, kBiased> u, int64_t count, Running& ring) {
    T kept[kBlock];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t n = count - begin < kBlock ? count - begin : kBlock;
      add_block(Computed<T>{kept}, 0, n, mask_block(u, begin, n, kept), ring);
    }
  }

  // Of n masked logits from the begin-th on: their maximum.
  template <bool kBiased>
  static LONGTAIL_INLINE V mask_block(const MaskedLogits<Z, kBiased> u, int64_t begin, int64_t n, T* kept) {
    constexpr int kLanes = V::kLanes;
    V largest = T(-INFINITY), other = T(-INFINITY);
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
      u.prefetch(begin + j);
      const V first = u.whole(begin + j), second = u.whole(begin + j + kLanes);
      largest = maximum(largest, first);
      other = maximum(other, second);
      store(kept + j, first);
      store(kept + j + kLanes, second);
    }
    for (; j < n; j += kLanes) {
      const int64_t left = n - j;
      const V x = left < kLanes ? u.some(begin + j, left) : u.whole(begin + j);
      largest = maximum(largest, x);
      store_some(kept + j, x, left);
    }
    return maximum(largest, other);
  }

  template <typename Source>
  static LONGTAIL_INLINE void add_block(const Source u, int64_t begin, int64_t end, V largest, Running& ring) {
    const T m = horizontal_max(largest);
    if (m > ring.m) {
      V factor = V(ring.m) - V(m);
      ring.d = ring.d * exp_cut(factor, ExpRange<T>::kLowest);
      ring.m = m;
    }
    Sums<T> block;  // apart: long rows would lose digits in one running sum
    sum_of<false>(u, begin, end, V(finite_max(ring.m)), block);
    ring.d = ring.d + block.d;
  }

  void write_row(const Z* z, const T* stats, const HierarchicalRow<T>& row, int64_t g, Z* grad) {
    if (!args_.order) {
      for (int k = 0; k < depth_; ++k) write_ring(z, stats, row, k, grad);
      return write_number(row.target, grad + g);
    }
    const bool gathered = pass_ == Pass::loss_and_grad;
    if (!only_child()) write_all(z, {finite_max(stats[0]), row.ring[0], T(0), T(0), T(0)}, grad);
    if (!gathered) gather(z);  // after the sweep, which has brought the row into the cache
    for (int k = 1; k < depth_; ++k) write_ring(members_, stats, row, k, members_);
    write_number(row.target, members_ + offset(place_));
    const int32_t* order = args_.order + begin_[1];
    const int64_t count = end_[1] - begin_[1];
    for (int64_t k = 0; k < count; ++k) grad[order[k]] = members_[k];
  }

  static void write_number(T x, Z* grad) { store_raw(grad, narrow(grad, V(x)), 1); }

  void write_ring(const Z* z, const T* stats, const HierarchicalRow<T>& row, int k, Z* grad) {
    const RowGrad<T> ring = {finite_max(stats[2 * k]), row.ring[k], T(0), T(0), T(0)};
    write(z, begin_[k], begin_[k + 1], ring, grad);
    write(z, end_[k + 1], end_[k], ring, grad);
  }

  void write(const Z* z, int64_t begin, int64_t end, const RowGrad<T>& ring, Z* grad) {
    if (begin >= end) return;
    const int64_t at = offset(begin);
    if (bias_) {
      write_stretch(BiasedLogits<Z>{z + at, bias_at(begin)}, end - begin, ring, grad + at);
    } else {
      write_stretch(Logits<Z>{z + at}, end - begin, ring, grad + at);
    }
  }

  void write_all(const Z* z, const RowGrad<T>& ring, Z* grad) {
    if (bias_) {
      write_stretch(BiasedLogits<Z>{z, bias_}, args_.num_classes, ring, grad);
    } else {
      write_stretch(Logits<Z>{z}, args_.num_classes, ring, grad);
    }
  }

  template <typename Source>
  __attribute__((noinline)) void write_stretch(const Source u, int64_t count, const RowGrad<T>& ring, Z* grad) {
    const RowGrad<V> row = {V(ring.m), V(ring.a), V(T(0)), V(T(0)), V(T(0))};
    if constexpr (kStreams<Z>) {
      constexpr int64_t kLong = 256;  // a short stretch would be pieces of lines
      if (args_.stream && count >= kLong) return write_gradient<false, true>(u, count, row, grad);
    }
    write_gradient<false, false>(u, count, row, grad);
  }

  const HierarchicalLossArgs& args_;
  const Pass pass_;
  const int depth_;
  const int64_t columns_;
  const T* const bias_;
  const T* const ordered_bias_;
  Z* const members_;  // of A_1, by position: logits, then gradients
  // Of the row at hand: the positions of A_0, A_1, ..., the weights of A_1, A_2, ..., the position of the target.
  int64_t begin_[kDeepestTree + 1], end_[kDeepestTree + 1];
  T lambda_[kDeepestTree];
  int64_t place_ = 0;
};

inline int64_t hierarchical_loss_rows(const HierarchicalLossArgs& args, Pass pass, int64_t begin, int64_t end,
                                      void* scratch) {
  switch (args.storage) {
    case Storage::float64:
      return HierarchicalRows<double, double>(args, pass, scratch).run(begin, end);
    case Storage::float32:
      return HierarchicalRows<float, float>(args, pass, scratch).run(begin, end);
    case Storage::bfloat16:
      return HierarchicalRows<bfloat16, float>(args, pass, scratch).run(begin, end);
    case Storage::float16:
      return HierarchicalRows<float16, float>(args, pass, scratch).run(begin, end);
  }
  return -1;
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
