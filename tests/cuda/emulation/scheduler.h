// Runs a CUDA grid on one host thread: each CUDA thread is a fibre, the blocks of a cluster run together.
//
// A fibre runs until it waits at a barrier; who goes next is decided by `Order`, the same at every run. Under
// ThreadSanitizer every fibre is a thread that barriers alone order: races are found whatever the order was. This code
// itself is compiled without sanitizers, so that they watch the kernels only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <source_location>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

using Site = std::source_location;

enum class Scope { warp, block, cluster };

// `skewed`: the last thread first, and whoever was let through a barrier runs ahead of the others as far as possible.
enum class Order { even, skewed };

struct Launch {
  int64_t grid;
  int block, cluster, shared_bytes;
};

// What a test may change about the launches that follow, and what it may learn from them.
struct Control {
  Order order = Order::even;
  int64_t most_blocks = 0;  // of a grid, which loops over what is left; 0: no limit
  // Barriers, as "file:line". Planted faults: those that order no memory although threads wait there, and those that
  // are not there at all.
  std::set<std::string> unordered, skipped;
  std::set<std::string> met;
};
extern Control control;

// Runs `body(context)` as every thread of the grid, cluster after cluster. Why it failed, or "".
std::string run(const Launch& launch, void (*body)(void*), void* context);

// ---- What a thread may ask for ----

void arrive(Scope scope, const Site& site);
void wait(Scope scope, const Site& site);
void synchronise(Scope scope, const Site& site);
// Gives `mine` to the other lanes of the warp and returns what `lane` gave. Orders no memory.
uint64_t exchange(uint64_t mine, unsigned lane, const Site& site);
int cluster_rank();
int cluster_size();
char* shared_memory();
// The place in the shared memory of block `rank` of the cluster that corresponds to `local` in this block's.
char* shared_of(const void* local, int rank);
// Copies of 16 bytes that happen as late as they may: when their group is waited for.
void copy_later(void* to, const void* from);
void close_group();
void finish_copies(int groups_left, void (*copy)(void* to, const void* from));
// Ends the launch.
[[noreturn]] void fail(const std::string& why);

}  // namespace emulation
