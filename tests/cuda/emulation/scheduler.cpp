#include "scheduler.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Control control;
std::unique_ptr<Fibre> host;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<std::unique_ptr<Block>> blocks;
Barrier cluster_barrier;
Thread* current = nullptr;
Launch launch;
void (*body)(void*);
void* context;
std::string failure;
Met met[kMostSites];
int met_count = 0;
char starts, ends;

namespace {

std::deque<Thread*> ready;

std::string wrong_launch() {
  const auto text = [](const char* what, int64_t got) { return "launch of " + std::to_string(got) + " " + what; };
  if (launch.grid < 1 || launch.grid > 0x7fffffff) return text("blocks", launch.grid);
  if (launch.block < 1 || launch.block > 1024) return text("threads per block", launch.block);
  if (launch.block % kWarp != 0) return text("threads per block: not whole warps", launch.block);
  if (launch.cluster < 1 || launch.cluster > 16) return text("blocks per cluster", launch.cluster);
  if (launch.grid % launch.cluster != 0) return text("blocks: not whole clusters", launch.grid);
  if (launch.shared_bytes < 0 || launch.shared_bytes > 227 * 1024) return text("shared bytes", launch.shared_bytes);
  return "";
}

std::unique_ptr<Block> new_block(int rank) {
  auto block = std::make_unique<Block>();
  block->rank = rank;
  block->running = launch.block;
  block->shared.reset(new char[launch.shared_bytes]);      // no byte more: AddressSanitizer finds what goes beyond
  memset(block->shared.get(), 0xff, launch.shared_bytes);  // NaN in every format
  block->barrier.expected = launch.block;
  block->warps.resize(launch.block / kWarp);
  for (Warp& warp : block->warps) warp.barrier.expected = kWarp;
  return block;
}

void start(Thread& thread, int64_t first_block, int i) {
  thread.index = {unsigned(i % launch.block), 0, 0};
  thread.block_index = {unsigned(first_block + i / launch.block), 0, 0};
  thread.block = blocks[i / launch.block].get();
  thread.waits = thread.done = false;
  std::fill(thread.arrived, thread.arrived + 3, false);
  thread.copies.clear();
  thread.group = 0;
  thread.fibre.prepare(&run_thread);
  ready.push_back(&thread);
}

void set_up_cluster(int64_t first_block) {
  blocks.clear();
  for (int rank = 0; rank < launch.cluster; ++rank) blocks.push_back(new_block(rank));
  const int count = launch.cluster * launch.block;
  cluster_barrier = {};
  cluster_barrier.expected = count;
  while (int(threads.size()) < count) threads.push_back(std::make_unique<Thread>());
  ready.clear();
  // Which fibre is which thread changes, so that the same thread of two clusters is not one thread to the sanitizer.
  const int64_t turn = first_block / launch.cluster * 7;
  for (int i = 0; i < count; ++i) start(*threads[(i + turn) % count], first_block, i);
  happens_before(&starts);
}

// After an arrival: whoever waited for it may go on.
void let_through(Barrier& barrier) {
  if (barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// Runs the thread until it waits in vain, has exited or has failed.
void go_on(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block_index;
  do {
    thread.waits = false;
    thread.fibre.resume(*host);
    if (!failure.empty() || thread.done) return;
    Barrier& barrier = barrier_of(thread, thread.scope);
    let_through(barrier);
    if (thread.waits && barrier.generation == thread.generation[int(thread.scope)]) {
      barrier.waiting.push_back(&thread);
      return;
    }
  } while (true);
}

Thread* next() {
  if (ready.empty()) return nullptr;
  const bool last = control.order == Order::skewed;
  Thread* const thread = last ? ready.back() : ready.front();
  if (last) {
    ready.pop_back();
  } else {
    ready.pop_front();
  }
  return thread;
}

void run_cluster(int64_t first_block) {
  set_up_cluster(first_block);
  while (Thread* const thread = next()) {
    go_on(*thread);
    if (!failure.empty()) return;
  }
  const int count = launch.cluster * launch.block;
  const auto done = [](const auto& thread) { return thread->done; };
  const auto stuck = std::find_if_not(threads.begin(), threads.begin() + count, done);
  if (stuck == threads.begin() + count) return;
  failure = "deadlock: " + name_of(**stuck) + " waits at " + name_of((*stuck)->site) + ", and " +
            std::to_string(std::count_if(threads.begin(), threads.begin() + count, done)) + " of " +
            std::to_string(count) + " threads of the cluster have exited";
}

}  // namespace

std::string run(const Launch& what, void (*thread_body)(void*), void* thread_context) {
  launch = what;
  body = thread_body;
  context = thread_context;
  met_count = 0;
  failure = wrong_launch();
  if (!failure.empty()) return failure;
  if (host == nullptr) host = std::make_unique<Fibre>();
  blockDim = {unsigned(launch.block), 1, 1};
  gridDim = {unsigned(launch.grid), 1, 1};
  for (int64_t block = 0; block < launch.grid && failure.empty(); block += launch.cluster) run_cluster(block);
  happens_after(&ends);
  for (int i = 0; i < met_count; ++i) control.met.insert(name_of(met[i].site));
  return failure;
}

}  // namespace emulation
