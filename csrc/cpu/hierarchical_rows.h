// The row loop of hierarchical cross-entropy, written once and compiled once per instruction set.
//
// A ring is two stretches of positions at most. Where classes are at their own positions, the stretches are read and
// written where they lie. Elsewhere ring 0, nearly all of a row, is swept in memory order, the members of A_1 masked;
// they are gathered on the way, those of A_2 then by position, and all are put back in the sweep that writes.
#pragma once

#include <algorithm>

#include "../hierarchical_math.h"
#include "kernels.h"
#include "masked_logits.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class HierarchicalRows {
 public:
  // scratch: see HierarchicalLossRows.
  HierarchicalRows(const HierarchicalLossArgs& args, Pass pass, void* scratch)
      : args_(args),
        pass_(pass),
        depth_(args.depth),
        columns_(2 * args.depth + 1),
        bias_(static_cast<const T*>(args.class_bias)),
        ordered_bias_(static_cast<const T*>(args.ordered_bias)),
        members_(static_cast<Z*>(scratch)),
        inner_(members_ + args.num_classes),
        own_mask_(reinterpret_cast<uint8_t*>(inner_ + args.num_classes)) {
    if (scratch) memset(own_mask_, 0, args.mask_bytes);
  }

  // Returns the first row whose target, or its path, is wrong, or -1.
  int64_t run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = args_.target[i * args_.target_stride];
      if (g == args_.ignore_index) {
        ignore_row(i);
      } else if (g < 0 || g >= args_.tree_classes || !find_path(g)) {
        return i;
      } else {
        next_ =
            i + 1 < end ? static_cast<const char*>(args_.logits) + (i + 1) * args_.logits_stride * sizeof(Z) : nullptr;
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

  // The nodes of the path of class g, and where it lies; false where they do not nest, or do not end at it.
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
    begin_[depth_ + 1] = begin_[depth_];
    end_[depth_ + 1] = end_[depth_];
    if (args_.order) find_members(args_.path[g * depth_]);
    const int64_t place = begin_[depth_], count = end_[depth_] - place;
    const bool sharded = args_.tree_classes > args_.num_classes;
    column_ = count <= 0 ? -1 : args_.order ? args_.order[place] : place;
    if (count == 0) return sharded;
    return count == 1 && (!args_.position || args_.position[column_] == place) && (sharded || column_ == g);
  }

  // Whether those of A_1 were found for all rows, in memory order; else they are taken by position.
  void find_members(int32_t top) {
    const Members *first = args_.members, *last = first + args_.members_count;
    const Members* found = std::lower_bound(first, last, top);
    made_ = found == last || found->node != top ? nullptr : found;
    origin_ = made_ ? 2 : 1;
  }

  void run_row(int64_t i, int64_t g) {
    const Z* z = static_cast<const Z*>(args_.logits) + i * args_.logits_stride;
    T* stats = static_cast<T*>(args_.stats) + i * columns_;
    if (pass_ != Pass::backward) find_stats(z, stats);
    T factor = args_.weight ? static_cast<const T*>(args_.weight)[g] : T(1);
    if (args_.sample_weight) factor *= static_cast<const T*>(args_.sample_weight)[i];
    HierarchicalRow<T> row = finish_rings(depth_, stats, lambda_, factor);
    if (pass_ != Pass::backward) static_cast<T*>(args_.loss)[i] = row.loss;
    if (pass_ == Pass::loss) return;
    const T upstream = static_cast<const T*>(args_.grad_loss)[i * args_.grad_loss_stride];
    for (int k = 0; k < depth_; ++k) row.ring[k] *= upstream;
    row.target *= upstream;
    write_row(z, stats, row, static_cast<Z*>(args_.grad) + i * args_.grad_stride);
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

  int64_t size_of(int k) const { return end_[k] - begin_[k]; }

  // Members by position: of A_1, or, where those are in memory order, of A_2, in whose place -inf is left there.
  void gather(const Z* z) {
    const int32_t* order = args_.order + begin_[origin_];
    const int64_t count = size_of(origin_);
    if (!made_) {
      for (int64_t k = 0; k < count; ++k) members_[k] = z[order[k]];
      return;
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t place = made_->place_of(order[k]);
      inner_[k] = members_[place];
      write_number(T(-INFINITY), members_ + place);
    }
  }

  // Those of A_1 in memory order, of one block of classes.
  void gather_block(const Z* z, int64_t begin, int64_t end) {
    static_assert(kBlock == Members::kBlock, "offsets are within a block");
    const int64_t last = made_->before(end);
    const uint16_t* offsets = made_->offsets;
    for (int64_t k = made_->before(begin); k < last; ++k) members_[k] = z[begin + offsets[k]];
  }

  void gather_blocks(const Z* z) {
    for (int64_t begin = 0; made_ && begin < args_.num_classes; begin += kBlock) {
      gather_block(z, begin, end_of_block(begin));
    }
  }

  int64_t end_of_block(int64_t begin) const {
    return args_.num_classes - begin < kBlock ? args_.num_classes : begin + kBlock;
  }

  T target_logit(const Z* z) const {
    if (column_ < 0) return T(-INFINITY);
    const T u_g = load_some(z + column_, 1).v[0];
    return bias_ ? u_g + bias_[column_] : u_g;
  }

  void find_stats(const Z* z, T* stats) {
    stats[2 * depth_] = target_logit(z);
    int first = 0;
    if (args_.order) {
      Running ring;
      if (!only_child()) add_outer(z, ring);
      write_stats(ring, stats);
      if (only_child()) gather_blocks(z);
      gather(z);
      if (made_ && depth_ > 1) add_members(stats + 2);
      z = made_ ? inner_ : members_;
      first = origin_;
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

  // Where position p lies in what is taken by position: the row, or the members of A_origin.
  int64_t offset(int64_t p) const { return args_.order ? p - begin_[origin_] : p; }
  const T* bias_at(int64_t p) const { return (args_.order ? ordered_bias_ : bias_) + p; }

  void add(const Z* z, int64_t begin, int64_t end, Running& ring) {
    if (begin >= end) return;
    if (bias_) {
      add_stretch(BiasedLogits<Z>{z + offset(begin), bias_at(begin)}, end - begin, ring);
    } else {
      add_stretch(Logits<Z>{z + offset(begin)}, end - begin, ring);
    }
  }

  // Ring 0, in memory order.
  void add_outer(const Z* z, Running& ring) {
    if (!made_) mark_members();
    const auto* bits = made_ ? reinterpret_cast<const uint8_t*>(made_->bits) : own_mask_;
    if (bias_) {
      add_masked(MaskedLogits<Z, true>{z, bias_, bits}, ring);
    } else {
      add_masked(MaskedLogits<Z, false>{z, nullptr, bits}, ring);
    }
    if (!made_) unmark_members();
  }

  // Ring 1, of members in memory order.
  void add_members(T* stats) {
    Running ring;
    if (bias_) {
      add_stretch(BiasedLogits<Z>{members_, static_cast<const T*>(made_->bias)}, made_->count, ring);
    } else {
      add_stretch(Logits<Z>{members_}, made_->count, ring);
    }
    write_stats(ring, stats);
  }

  void mark_members() {
    for (int64_t p = begin_[1]; p < end_[1]; ++p) own_mask_[args_.order[p] / 8] |= 1 << args_.order[p] % 8;
  }
  void unmark_members() {
    for (int64_t p = begin_[1]; p < end_[1]; ++p) own_mask_[args_.order[p] / 8] = 0;
  }

  // A function of its own for each source, as those of SoftmaxRows.
  template <typename Source>
  __attribute__((noinline)) static void add_stretch(const Source u, int64_t count, Running& ring) {
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      add_block(u, begin, count - begin < kBlock ? count : begin + kBlock, ring);
    }
  }

  // The whole row; members of A_1 are gathered on the way, while memory is waited for.
  template <bool kBiased>
  __attribute__((noinline)) void add_masked(const MaskedLogits<Z, kBiased> u, Running& ring) {
    for (int64_t begin = 0; begin < args_.num_classes; begin += kBlock) {
      const int64_t end = end_of_block(begin);
      add_block(u, begin, end, ring);
      if (made_) gather_block(u.z, begin, end);
    }
  }

  template <typename Source>
  static LONGTAIL_INLINE void add_block(const Source u, int64_t begin, int64_t end, Running& ring) {
    const T m = horizontal_max(largest_of(u, begin, end, V(T(-INFINITY))));
    if (m > ring.m) {
      V factor = V(ring.m) - V(m);
      ring.d = ring.d * exp_cut(factor, ExpRange<T>::kLowest);
      ring.m = m;
    }
    Sums<T> block;  // apart: long rows would lose digits in one running sum
    sum_of<false>(u, begin, end, V(finite_max(ring.m)), block);
    ring.d = ring.d + block.d;
  }

  void write_row(const Z* z, const T* stats, const HierarchicalRow<T>& row, Z* grad) {
    if (!args_.order) {
      for (int k = 0; k < depth_; ++k) write_ring(z, stats, row, k, grad);
      if (column_ >= 0) write_number(row.target, grad + column_);
      return;
    }
    if (pass_ == Pass::backward) {
      gather_blocks(z);
      gather(z);
    }
    Z* inner = made_ ? inner_ : members_;
    for (int k = origin_; k < depth_; ++k) write_ring(inner, stats, row, k, inner);
    if (column_ >= 0) write_number(row.target, inner + offset(begin_[depth_]));
    if (made_ && depth_ > 1) write_members({finite_max(stats[2]), row.ring[1], T(0), T(0), T(0)});
    const int32_t* order = args_.order + begin_[origin_];
    const int64_t count = size_of(origin_);
    for (int64_t k = 0; made_ && k < count; ++k) members_[made_->place_of(order[k])] = inner[k];
    const RowGrad<T> outer = {finite_max(stats[0]), row.ring[0], T(0), T(0), T(0)};
    if (bias_) {
      write_outer(BiasedLogits<Z>{z, bias_}, outer, grad);
    } else {
      write_outer(Logits<Z>{z}, outer, grad);
    }
    for (int64_t k = 0; !made_ && k < count; ++k) grad[order[k]] = inner[k];
  }

  // Ring 1; over the members of A_2, too, which follow.
  void write_members(const RowGrad<T>& ring) {
    if (bias_) {
      write_stretch(BiasedLogits<Z>{members_, static_cast<const T*>(made_->bias)}, 0, made_->count, ring, members_);
    } else {
      write_stretch(Logits<Z>{members_}, 0, made_->count, ring, members_);
    }
  }

  // Ring 0, in memory order; over the members of A_1, too, whose own gradients follow while a block is in the cache.
  template <typename Source>
  __attribute__((noinline)) void write_outer(const Source u, const RowGrad<T>& ring, Z* grad) {
    const RowGrad<V> row = {V(ring.m), V(ring.a), V(T(0)), V(T(0)), V(T(0))};
    for (int64_t begin = 0; begin < args_.num_classes; begin += kBlock) {
      const int64_t end = end_of_block(begin);
      if (!only_child()) write_gradient<false, false>(from(u, begin), end - begin, row, grad + begin);
      if (made_) scatter_block(begin, end, grad);
      prefetch_next(begin, end);
    }
  }

  void scatter_block(int64_t begin, int64_t end, Z* grad) const {
    const int64_t last = made_->before(end);
    const uint16_t* offsets = made_->offsets;
    for (int64_t k = made_->before(begin); k < last; ++k) grad[begin + offsets[k]] = members_[k];
  }

  // While this row is written, the next one comes into the second-level cache, as far as that holds both.
  LONGTAIL_INLINE void prefetch_next(int64_t begin, int64_t end) const {
    constexpr int64_t kLine = 64, kMost = 256 * 1024;
    const int64_t first = begin * int64_t(sizeof(Z)), last = end * int64_t(sizeof(Z));
    if (!next_ || last > kMost) return;
    for (int64_t i = first; i < last; i += kLine) __builtin_prefetch(next_ + i, 0, 2);
  }

  static LONGTAIL_INLINE Logits<Z> from(const Logits<Z> u, int64_t j) { return {u.z + j}; }
  static LONGTAIL_INLINE BiasedLogits<Z> from(const BiasedLogits<Z> u, int64_t j) { return {u.z + j, u.bias + j}; }

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
      write_stretch(BiasedLogits<Z>{z + at, bias_at(begin)}, begin, end - begin, ring, grad + at);
    } else {
      write_stretch(Logits<Z>{z + at}, begin, end - begin, ring, grad + at);
    }
  }

  template <typename Source>
  __attribute__((noinline)) void write_stretch(const Source u, int64_t at, int64_t count, const RowGrad<T>& ring,
                                               Z* grad) {
    const RowGrad<V> row = {V(ring.m), V(ring.a), V(T(0)), V(T(0)), V(T(0))};
    if constexpr (kStreams<Z>) {
      constexpr int64_t kLong = 256;  // a short stretch would be pieces of lines
      if (args_.stream && count >= kLong) return write_gradient<false, true>(u, count, row, grad);
    }
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t end = count - begin < kBlock ? count : begin + kBlock;
      write_gradient<false, false>(from(u, begin), end - begin, row, grad + begin);
      if (!args_.order) prefetch_next(at + begin, at + end);
    }
  }

  const HierarchicalLossArgs& args_;
  const Pass pass_;
  const int depth_;
  const int64_t columns_;
  const T* const bias_;
  const T* const ordered_bias_;
  // Logits, then gradients: of A_1, in memory order or by position, and then of A_2 by position.
  Z *const members_, *const inner_;
  uint8_t* const own_mask_;  // all zeros between rows
  // Of the row at hand: the positions of A_0, A_1, ... A_L, {g}, the weights of A_1, A_2, ..., that of the target.
  int64_t begin_[kDeepestTree + 2], end_[kDeepestTree + 2];
  T lambda_[kDeepestTree];
  int64_t column_ = 0;          // of the target; -1 where another shard has it
  const char* next_ = nullptr;  // the logits of the row that follows
  const Members* made_ = nullptr;
  int origin_ = 1;  // the node whose members are taken by position: 2 where those of A_1 are in memory order
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
