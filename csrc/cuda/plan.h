// Which kernel serves a problem, and with what launch: the only place with numbers that could be tuned.
// They are reasoned from the hardware and from the compiler's register report; none is measured yet.
#pragma once

#include <stdint.h>

#include "passes.h"

namespace longtail {
namespace gpu {

// Warp: `lanes` lanes of a warp per row, which they hold in registers.
// Shared: `cluster` blocks per row, each of which holds its part of it in shared memory; Pass::loss_and_grad only.
// Sweep: `cluster` blocks per row, nothing kept; Pass::loss_and_grad reads the row twice.
enum class Regime { warp, shared, sweep };

struct Device {
  int capability;            // 90 for 9.0
  int processors;            // multiprocessors
  int shared_per_block;      // bytes that a block may have
  int shared_per_processor;  // bytes that the blocks of a multiprocessor have together
};

struct Problem {
  Pass pass;
  int element_size;  // bytes
  int64_t rows, num_classes;
  bool aligned;            // every row of logits, and of grad, begins and ends at a 16-byte boundary
  bool alike;              // each row of grad lies as that of logits with regard to 16-byte boundaries
  bool extras;             // with options that touch every element: kExtras of row.cuh
  bool images = false;     // [N, C, P], rows being pixels: pixel_plan.h
  bool dense = false;      // of class probabilities; then `alike` is for their rows too
  bool by_target = false;  // extras with which the target's class changes the effective logits of the others
};

struct Plan {
  Regime regime;
  bool vector;     // accesses of 16 bytes, else of one element
  int threads;     // per block, a power of two
  int lanes;       // per row, a power of two; Regime::warp. Of images: threads of a block along the pixels
  int cluster;     // blocks per row, a power of two; otherwise
  int batch = 1;   // rows that a team of lanes takes together, a power of two; Regime::warp of the softmax family
  int shared = 0;  // bytes of shared memory per block; of the softmax family
};

constexpr int kWarpSize = 32;
// Elements that a lane holds: 16 or 32 registers of vectors. Single elements take a register each, whatever their type.
constexpr int held_of(int count) { return count > 1 ? 32 : 16; }
// Rows that are not aligned have only single-element accesses in the warp regime; from here on, the vectors between
// their edges are worth a block of their own.
constexpr int kLongestUnaligned = 256;
// Elements per lane, if the warp is wide enough: what each lane does for a row beside them takes as long as 6 elements.
constexpr int kPerLane = 16;
constexpr int kWarpThreads = 128;
// What a thread takes at a time: two 16-byte loads, or 8 single elements. Of plain rows: kPlainGroup of
// plain_chunk.cuh.
constexpr int group_of(int count) { return count > 1 ? 2 : 8; }
// At most, of a row's block. Small ones share a multiprocessor and hide each other's ends.
constexpr int kBlockThreads = 256;
// Blocks of that size that a multiprocessor's registers suffice for: 64 a thread, or 128 with single elements, with
// options that touch every element, and where one kernel has both sweeps.
LONGTAIL_INLINE constexpr int resident_of(bool vector, bool extras, Pass pass) {
  return vector && !extras && pass != Pass::loss_and_grad ? 4 : 2;
}
constexpr int kKeptResident = 3;  // of rows that are kept in shared memory: 80 registers
// 128 registers, or 168 with single elements; 64 or 80 for half types and 80 or 96 for float32, whose rows take twice
// as many, without extras.
LONGTAIL_INLINE constexpr int warp_resident(int count, bool extras, Pass pass) {
  if (count == 1 || extras) return count > 1 ? 4 : 3;
  return (count == 8 ? 8 : 6) - (pass == Pass::loss_and_grad ? count / 4 : 0);
}
// Rows that a team of lanes finishes together: their own arithmetic, some 250 instructions, is then done once for all
// of them; but no more than leave every multiprocessor kBatchedWarps warps. With both passes a row is read twice, the
// second time from cache.
constexpr int kBatch = 8;
constexpr int kBatchedWarps = 32;
// Elements of a row that each of its threads should have: its own start, its share of the joins and of the end are some
// 250 instructions, as many as 40 elements take.
constexpr int kPerThread = 64;
// Blocks on a multiprocessor: with three, one computes while the others read and write.
constexpr int kOverlapping = 3;
constexpr int kReservedPerBlock = 1024;  // bytes of shared memory that the system takes
// A block that is not needed for a row's size pays only if it takes this much of it.
constexpr int kSmallestSlice = 16 * 1024;  // bytes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int power_of_two(int64_t n, int smallest, int largest) {
  int p = smallest;
  while (p < n && p < largest) p *= 2;
  return p;
}

// 16 is not portable; the data-centre parts have it.
inline int largest_cluster(const Device& device) {
  if (device.capability < 90) return 1;
  return device.capability < 110 ? 16 : 8;
}

// Bytes of a row that one block of a cluster keeps: its vectors, spread evenly. The edges are in registers.
inline int64_t slice_bytes(int64_t row_bytes, int cluster) { return ceil_div(row_bytes / 16, cluster) * 16; }

// Bytes of shared memory beside the slice: a float4 per warp of the cluster, and the row's coefficients, twice.
inline int joint_bytes(int threads, int cluster) { return 2 * 16 * cluster * (threads / kWarpSize) + 64; }

inline int64_t shared_bytes(const Plan& plan, const Problem& problem) {
  if (plan.regime == Regime::warp) return 0;
  const int64_t slice = slice_bytes(problem.num_classes * problem.element_size, plan.cluster);
  return joint_bytes(plan.threads, plan.cluster) + (plan.regime == Regime::shared ? slice : 0);
}

// How many blocks of such a cluster fit on a multiprocessor; 0 if not even one.
inline int resident_blocks(const Device& device, int64_t row_bytes, int cluster) {
  const int64_t block = slice_bytes(row_bytes, cluster) + joint_bytes(kBlockThreads, cluster);
  if (block > device.shared_per_block) return 0;
  return static_cast<int>(device.shared_per_processor / (block + kReservedPerBlock));
}

// The smallest cluster that leaves room for `blocks` blocks per multiprocessor, or 0.
inline int cluster_for(const Device& device, int64_t row_bytes, int blocks) {
  for (int cluster = 1; cluster <= largest_cluster(device); cluster *= 2) {
    if (resident_blocks(device, row_bytes, cluster) >= blocks) return cluster;
  }
  return 0;
}

inline Plan warp_plan(const Problem& p, const Device& device) {
  const int lanes = power_of_two(ceil_div(p.num_classes, kPerLane), 1, kWarpSize);
  const int64_t enough = int64_t(device.processors) * kBatchedWarps * kWarpSize / lanes;  // teams
  int batch = 1;
  while (batch < kBatch && batch < lanes && p.rows / (2 * batch) >= enough) batch *= 2;
  return {Regime::warp, p.aligned, kWarpThreads, lanes, 1, batch};
}

// Spreads a row over more blocks, of kSmallestSlice at least, while `most` blocks are not exceeded.
inline int spread(const Problem& p, const Device& device, int cluster, int64_t most) {
  const int64_t row_bytes = p.num_classes * p.element_size;
  while (cluster < largest_cluster(device) && 2 * cluster <= most &&
         slice_bytes(row_bytes, 2 * cluster) >= kSmallestSlice) {
    cluster *= 2;
  }
  return cluster;
}

// Where rows are fewer than multiprocessors, as many blocks for each as there is room for.
inline int64_t blocks_to_fill(const Problem& p, const Device& device) {
  return p.rows > 0 ? device.processors / p.rows : 1;
}

inline Plan shared_plan(const Problem& p, const Device& device) {
  const int64_t row_bytes = p.num_classes * p.element_size;
  int cluster = 0;
  for (int blocks = kOverlapping; blocks > 0 && cluster == 0; --blocks)
    cluster = cluster_for(device, row_bytes, blocks);
  if (cluster == 0) return {Regime::sweep, true, 0, 0, 0};
  cluster = spread(p, device, cluster, blocks_to_fill(p, device));
  const int64_t elements = slice_bytes(row_bytes, cluster) / p.element_size;
  const int threads = power_of_two(ceil_div(elements, kPerThread), 2 * kWarpSize, kBlockThreads);
  return {Regime::shared, true, threads, 0, cluster};
}

inline Plan sweep_plan(const Problem& p, const Device& device) {
  const bool vector = !makes_grad(p.pass) || p.alike;
  const bool twice = p.pass == Pass::loss_and_grad;
  // Twice: the fewer rows in flight, the more of each is still in the L2 cache when the second sweep comes.
  const int cluster = spread(p, device, 1, twice ? largest_cluster(device) : blocks_to_fill(p, device));
  const int64_t elements = ceil_div(p.num_classes, cluster);
  return {Regime::sweep, vector, power_of_two(ceil_div(elements, kPerThread), kWarpSize, kBlockThreads), 0, cluster};
}

inline Plan plan_of(const Problem& p, const Device& device) {
  if (!of_shard(p.pass) && p.num_classes <= (p.aligned ? held_of(16) * kWarpSize : kLongestUnaligned))
    return warp_plan(p, device);
  if (p.pass == Pass::loss_and_grad && p.alike) {
    const Plan plan = shared_plan(p, device);
    if (plan.regime == Regime::shared) return plan;
  }
  return sweep_plan(p, device);
}

// ---- The sigmoid family, and class probabilities: Regime::warp without a limit of what lanes hold, or Regime::sweep
// ----

// Elements of a row from which on it has a block, or a cluster, of its own.
constexpr int kLongestInWarp = 2048;
// Blocks of kBlockThreads that a multiprocessor's registers suffice for; `one`: kernels of the loss or of the gradient
// alone. Class targets: 64 registers a thread, or 80 with both; dense targets: 80, or 128.
constexpr int sigmoid_resident(bool dense, bool one) { return 2 + (dense ? 0 : 1) + (one ? 1 : 0); }
// What a thread of theirs reads at a time: vectors of class targets, or single elements. Each vector of dense targets
// is alone with them.
constexpr int sigmoid_group(int count, bool dense, bool one) {
  if (count == 1) return dense ? 4 : 8;
  return count == 4 && one ? 3 : 2;
}

// Of class probabilities: 64 registers a thread, or 128 with single elements and with options that touch every element.
constexpr int dense_resident(int count, bool extras) { return count > 1 && !extras ? 4 : 2; }

inline Plan sigmoid_plan_of(const Problem& p, const Device& device) {
  if (p.num_classes <= kLongestInWarp) {
    const int lanes = power_of_two(ceil_div(p.num_classes, kPerLane), 1, kWarpSize);
    return {Regime::warp, p.alike, kWarpThreads, lanes, 1};
  }
  const int cluster = spread(p, device, 1, blocks_to_fill(p, device));
  const int64_t elements = ceil_div(p.num_classes, cluster);
  return {Regime::sweep, p.alike, power_of_two(ceil_div(elements, kPerThread), kWarpSize, kBlockThreads), 0, cluster};
}

// Bytes of neighbouring pixels that a block takes, at least: two sectors of memory.
constexpr int kNarrowest = 64;
// Classes of a pixel that each of its threads should have, if there is a choice.
constexpr int kPerGroup = 8;

// Images [N, C, P], p.rows = N * P: Regime::sweep. Where pixels are few, the threads of a block share their classes.
inline Plan sigmoid_pixels_plan_of(const Problem& p, const Device& device) {
  const int bytes = p.alike ? 16 : p.element_size;  // that a thread takes of each class
  const int64_t units = ceil_div(p.rows * p.element_size, bytes);
  int lanes = kBlockThreads;
  while (lanes > kNarrowest / bytes && ceil_div(units, lanes) < kOverlapping * device.processors) lanes /= 2;
  const int groups = power_of_two(ceil_div(p.num_classes, kPerGroup), 1, kBlockThreads / lanes);
  return {Regime::sweep, p.alike, lanes * groups < kWarpSize ? kWarpSize : lanes * groups, lanes, 1};
}

// Blocks of kBlockThreads of ZLPR and the two-way loss, whose plans are those of the sigmoid family, that a
// multiprocessor's registers suffice for: 128 a thread.
constexpr int kTwoWayResident = 2;

// ---- Hierarchical cross-entropy: Regime::sweep, a block per row ----

inline Plan hierarchical_plan_of(const Problem& p, const Device&) {
  return {Regime::sweep, p.alike, power_of_two(ceil_div(p.num_classes, kPerThread), kWarpSize, kBlockThreads), 0, 1};
}

// ---- Every family ----

// Blocks that a launch has, whole clusters; kernels go on to the rows beyond them.
inline int64_t grid_of(int64_t rows, const Plan& plan) {
  constexpr int64_t kMost = int64_t(1) << 30;
  const int64_t rows_per_block = plan.regime == Regime::warp ? plan.threads / plan.lanes * plan.batch : 1;
  const int64_t teams = ceil_div(rows, rows_per_block), most = kMost / plan.cluster;
  return (teams < most ? teams : most) * plan.cluster;
}

}  // namespace gpu
}  // namespace longtail
