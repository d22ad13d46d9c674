// Hierarchical cross-entropy over rows [N, C]: a block per row, the rings of the target's path one after the other.
//
// Where classes are at their own positions, a ring is two stretches of the row at most. Elsewhere ring 0, nearly all of
// a row, is swept in memory order, the members of A_1 left out; the rings within are gathered by position.
#pragma once

#include <type_traits>

#include "hierarchical_path.cuh"

namespace longtail {
namespace gpu {

// The classes of a row, as the threads of its block take them.
template <typename Z, int kCount>
struct RowClasses {
  static constexpr int kGroup = group_of(kCount);  // vectors that a thread has under way
  const HierarchicalLossArgs& a;
  const SharedPath& path;
  const Z* const logits;
  const int thread = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);

  LONGTAIL_DEVICE RowClasses(const HierarchicalLossArgs& args, const SharedPath& shared, int64_t row)
      : a(args), path(shared), logits(kept(static_cast<const Z*>(args.logits) + row * args.logits_stride)) {}

  // Effective logits of neighbours from `column` on.
  template <int kWidth>
  LONGTAIL_DEVICE void effective(const Vector<Z, kWidth>& held, int column, float (&u)[kWidth]) const {
    held.get(u);
    if (a.class_bias == nullptr) return;
    float b[kWidth];
    load_constants(a.class_bias, column, reinterpret_cast<uintptr_t>(a.class_bias + column) % 16 == 0, b);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) u[i] += b[i];
  }

  // Which neighbours from `column` on belong to A_1, by bits, where there is an order.
  template <int kWidth>
  LONGTAIL_DEVICE unsigned members(int column) const {
    const float* const positions = reinterpret_cast<const float*>(a.position);  // read as what they are not
    float p[kWidth];
    load_constants(positions, column, reinterpret_cast<uintptr_t>(positions + column) % 16 == 0, p);
    const unsigned first = static_cast<unsigned>(path.begin[1]), size = static_cast<unsigned>(path.end[1]) - first;
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) found |= (bits_of_float(p[i]) - first < size ? 1u : 0u) << i;
    return found;
  }

  // `take(held, column)` of the classes from begin to end: whole vectors, those beside them singly.
  template <typename Take>
  LONGTAIL_DEVICE void each_in(int begin, int end, const Take& take) const {
    const int count = end - begin;
    if (count <= 0) return;
    const int head = kCount > 1 ? head_of(logits + begin, count) : 0, vectors = (count - head) / kCount;
    const int first = begin + head;
    int i = thread;
#pragma unroll 1
    for (; i - thread + kGroup * width <= vectors; i += kGroup * width) {
      Vector<Z, kCount> held[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) held[k].load(logits + first + (i + k * width) * kCount);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) take(held[k], first + (i + k * width) * kCount);
    }
#pragma unroll 1
    for (; i < vectors; i += width) {
      Vector<Z, kCount> held;
      held.load(logits + first + i * kCount);
      take(held, first + i * kCount);
    }
    if constexpr (kCount > 1) {
      const int beside = count - vectors * kCount;
#pragma unroll 1
      for (int j = thread; j < beside; j += width) take_single(j < head ? begin + j : end - beside + j, take);
    }
  }

  // The same of ring k, which is not the first where there is an order.
  template <typename Take>
  LONGTAIL_DEVICE void each_of_ring(int k, const Take& take) const {
    const int begin = path.begin[k], inner_begin = path.begin[k + 1], inner_end = path.end[k + 1], end = path.end[k];
    if (a.order == nullptr) {
      each_in(begin, inner_begin, take);
      each_in(inner_end, end, take);
      return;
    }
    const int left = inner_begin - begin, count = left + end - inner_end;
#pragma unroll 1
    for (int i = thread; i < count; i += width) {
      const int column = a.order[i < left ? begin + i : inner_end + i - left];
      LONGTAIL_DEVICE_ASSERT(column >= 0 && column < a.num_classes, "order is out of bounds");
      take_single(column, take);
    }
  }

  template <typename Take>
  LONGTAIL_DEVICE void take_single(int column, const Take& take) const {
    Vector<Z, 1> held;
    held.load(logits + column);
    take(held, column);
  }

  // This thread's share of ring k.
  LONGTAIL_DEVICE RingSum sum_of_ring(int k) const {
    RingSum s;
    const auto take = [&](const auto& held, int column) {
      float u[std::remove_reference_t<decltype(held)>::kWidth];
      effective(held, column, u);
      add(s, u);
    };
    if (k > 0 || a.order == nullptr) {
      each_of_ring(k, take);
      return s;
    }
    each_in(0, static_cast<int>(a.num_classes), [&](const auto& held, int column) {
      constexpr int kWidth = std::remove_reference_t<decltype(held)>::kWidth;
      float u[kWidth];
      effective(held, column, u);
      const unsigned left_out = members<kWidth>(column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) u[i] = left_out >> i & 1u ? -INFINITY : u[i];
      add(s, u);
    });
    return s;
  }

  LONGTAIL_DEVICE void store_ring(int k, Z* grad) const {
    const float m = path.m[k], c = path.c[k];
    each_of_ring(k, [&](const auto& held, int column) {
      constexpr int kWidth = std::remove_reference_t<decltype(held)>::kWidth;
      float u[kWidth];
      effective(held, column, u);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) u[i] = exp_of(u[i] - m) * c;
      Vector<Z, kWidth>::store(grad + column, u);
    });
  }

  // Ring 0 where there is an order: what belongs to A_1 is not touched.
  LONGTAIL_DEVICE void store_beyond(Z* grad) const {
    const float m = path.m[0], c = path.c[0];
    each_in(0, static_cast<int>(a.num_classes), [&](const auto& held, int column) {
      constexpr int kWidth = std::remove_reference_t<decltype(held)>::kWidth;
      float u[kWidth];
      effective(held, column, u);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) u[i] = exp_of(u[i] - m) * c;
      const unsigned left_out = members<kWidth>(column);
      if (left_out == 0) return Vector<Z, kWidth>::store(grad + column, u);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float x[1] = {u[i]};
        if ((left_out >> i & 1u) == 0) Vector<Z, 1>::store(grad + column + i, x);
      }
    });
  }

  // target: its column; read by the first thread alone.
  LONGTAIL_DEVICE void store_grad(int target, Z* grad) const {
    if (a.order != nullptr) {
      store_beyond(grad);
      __syncthreads();  // in place, its vectors hold elements of A_1, too
    } else {
      store_ring(0, grad);
    }
#pragma unroll 1
    for (int k = 1; k < a.depth; ++k) store_ring(k, grad);
    const float own[1] = {path.target};
    if (thread == 0 && target >= 0) Vector<Z, 1>::store(grad + target, own);
  }

  // The gradient of a row that does not count, whose logits nothing reads.
  LONGTAIL_DEVICE void store_zeros(Z* grad) const {
    const int classes = static_cast<int>(a.num_classes), head = kCount > 1 ? head_of(grad, classes) : 0;
    const int vectors = (classes - head) / kCount, beside = classes - vectors * kCount;
    const float zeros[kCount] = {}, zero[1] = {};
    for (int i = thread; i < vectors; i += width) Vector<Z, kCount>::store(grad + head + i * kCount, zeros);
    if constexpr (kCount > 1) {
      for (int j = thread; j < beside; j += width)
        Vector<Z, 1>::store(grad + (j < head ? j : classes - beside + j), zero);
    }
  }
};

// What belongs to a row beside its logits; by all lanes of the warp that leads.
LONGTAIL_DEVICE float row_factor(const HierarchicalLossArgs& a, int64_t row, int64_t g) {
  const float weight = a.weight != nullptr ? load_constant(a.weight + g) : 1.0f;
  return a.sample_weight != nullptr ? weight * a.sample_weight[row] : weight;
}

// Ring k in lane k, from the sums of the row's warps.
LONGTAIL_DEVICE RingSum join_warps(const RingSum* sums, int depth, int warps, int lane) {
  RingSum ring;
  if (lane >= depth) return ring;
#pragma unroll 1
  for (int i = 0; i < warps; ++i) {
    RingSum part = sums[lane * warps + i];
    const float m = fmaxf(ring.m, part.m);
    raise_max(ring, m);
    raise_max(part, m);
    ring.d += part.d;
  }
  ring.m = ring.d == ring.d ? ring.m : ring.d;  // a maximum passes over NaN, a sum does not
  return ring;
}

// From the rings to the loss, the stats and what all threads need for the gradient, by the warp that leads.
template <typename Z, typename PassOf>
LONGTAIL_DEVICE void end_row(const HierarchicalLossArgs& a, PassOf pass, int64_t row, int64_t g, int target,
                             const PathNode& node, const RingSum* sums, SharedPath& path) {
  const int lane = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarpSize;
  float* const stats = a.stats + row * (2 * a.depth + 1);
  RingSum ring;
  float u_g = -INFINITY;
  if (makes_stats(pass)) {
    ring = join_warps(sums, a.depth, warps, lane);
    if (target >= 0) u_g = to_float(static_cast<const Z*>(a.logits)[row * a.logits_stride + target]);
    if (target >= 0 && a.class_bias != nullptr) u_g += load_constant(a.class_bias + target);
  } else {
    if (lane < a.depth) {
      ring.m = stats[2 * lane];
      ring.d = stats[2 * lane + 1];
    }
    u_g = stats[2 * a.depth];
  }
  const PathEnd end = finish_path(a.depth, lane, ring, node, u_g, row_factor(a, row, g));
  if (makes_stats(pass)) {
    if (lane < a.depth) {
      stats[2 * lane] = ring.m;
      stats[2 * lane + 1] = ring.d;
    }
    if (lane == 0) {
      stats[2 * a.depth] = u_g;
      a.loss[row] = end.loss;
    }
  }
  if (!makes_grad(pass)) return;
  const float upstream = a.grad_loss[row * a.grad_loss_stride];
  if (lane < a.depth) {
    path.m[lane] = finite_max(ring.m);
    path.c[lane] = end.c * upstream;
  }
  if (lane == 0) path.target = end.target * upstream;
}

// reads: logits [N, C] once a sweep, ignored rows never; target; per row its path and nodes, weight, sample weight, the
//   upstream gradient (unless `loss`), the stats [N, 2 L + 1] (for `backward`); class_bias, order and position [C] per
//   row, from cache; with an order A_1 once more.
// writes: loss [N] and stats [N, 2 L + 1] (unless `backward`); grad [N, C] (unless `loss`; may be the logits' own).
// bytes: one pass over the logits for the loss, one over logits and gradient for the gradient.
template <typename Z, int kCount, typename PassOf>
LONGTAIL_KERNEL(kBlockThreads, 4)
hierarchical_rows_kernel(LONGTAIL_PARAMETER HierarchicalLossArgs a, PassOf pass) {
  SharedPath& path = *dynamic_shared<SharedPath>();
  RingSum* const sums = reinterpret_cast<RingSum*>(&path + 1);
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int64_t place = blockIdx.x; place < a.rows; place += gridDim.x) {
    const int64_t row = makes_stats(pass) ? place : a.rows - 1 - place;
    const int64_t g = a.target[row * a.target_stride];
    const bool ignored = g == a.ignore_index, valid = g >= 0 && g < a.tree_classes;
    LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
    const RowClasses<Z, kCount> classes(a, path, row);
    Z* const grad = makes_grad(pass) ? kept(static_cast<Z*>(a.grad) + row * a.grad_stride) : nullptr;
    if (ignored || !valid) {
      if (makes_grad(pass)) classes.store_zeros(grad);
      if (makes_stats(pass) && thread == 0) a.loss[row] = 0.0f;
      if (makes_stats(pass) && thread <= 2 * a.depth) a.stats[row * (2 * a.depth + 1) + thread] = 0.0f;
      continue;
    }
    __syncthreads();  // the row before has been written
    PathNode node;
    int target = -1;
    if (thread < kWarpSize) {
      node = load_path(a, g, thread);
      target = target_column(a, g, node);
      if (thread < a.depth) {
        path.begin[thread + 1] = node.begin;
        path.end[thread + 1] = node.end;
      }
      if (thread == 0) {
        path.begin[0] = 0;
        path.end[0] = static_cast<int>(a.num_classes);
      }
    }
    __syncthreads();
    if (makes_stats(pass)) {
#pragma unroll 1
      for (int k = 0; k < a.depth; ++k) {
        const RingSum sum = join_lanes(classes.sum_of_ring(k), kWarpSize);
        if (thread % kWarpSize == 0) sums[k * warps + thread / kWarpSize] = sum;
      }
      __syncthreads();
    }
    if (thread < kWarpSize) end_row<Z>(a, pass, row, g, target, node, sums, path);
    if (!makes_grad(pass)) continue;
    __syncthreads();
    classes.store_grad(target, grad);
  }
}

}  // namespace gpu
}  // namespace longtail
