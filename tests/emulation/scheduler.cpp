#include "scheduler.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "fibre.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Control control;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostSites = 256;

struct Thread;

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  Site site;
  std::vector<Thread*> waiting;
  char order[2] =
      {};  // addresses for ThreadSanitizer, by turns: who is past a barrier orders nothing at the one before
};

struct Warp {
  Barrier barrier;
  uint64_t given[2][kWarp];  // what the lanes exchange, by turns
};

struct Block {
  int rank = 0, running = 0;
  bool started = false;
  std::unique_ptr<char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
  char exits = 0;
};

struct Met {
  Site site;
  bool ordered, skipped;
};

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Thread {
  Fibre fibre{kStackBytes};
  uint3 index = {}, block_index = {};
  Block* block = nullptr;
  Site site;                    // where it waits
  uint64_t generation[3] = {};  // of the barrier it arrived at, by scope
  bool arrived[3] = {}, waits = false, done = false;
  Scope scope = Scope::block;  // what it waits for
  std::deque<Copy> copies;
  int group = 0;
};

std::unique_ptr<Fibre> host;                   // runs the scheduler
std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch
std::vector<std::unique_ptr<Block>> blocks;    // of the cluster that runs
Barrier cluster_barrier;
std::deque<Thread*> ready;
Thread* current = nullptr;
Launch launch;
void (*body)(void*);
void* context;
std::string failure;
Met met[kMostSites];  // the barriers of this launch
int met_count = 0;
char starts, ends;  // addresses for ThreadSanitizer

std::string name_of(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(thread.index.x) + " of block " + std::to_string(thread.block_index.x);
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

Barrier& barrier_of(const Thread& thread, Scope scope) {
  if (scope == Scope::cluster) return cluster_barrier;
  return scope == Scope::block ? thread.block->barrier : thread.block->warps[thread.index.x / kWarp].barrier;
}

void leave(Thread& thread) { host->resume(thread.fibre); }

// What is planted at this barrier. Notes that it was met.
const Met& meet(const Site& site) {
  for (int i = 0; i < met_count; ++i) {
    if (same(met[i].site, site)) return met[i];
  }
  if (met_count == kMostSites) fail("more barriers than the emulation has room for");
  const std::string name = name_of(site);
  met[met_count] = {site, control.unordered.count(name) == 0, control.skipped.count(name) > 0};
  return met[met_count++];
}

// ---- Threads ----

void run_thread() {
  Thread& thread = *current;
  thread.fibre.entered();
  thread.block->started = true;
  happens_after(&starts);
  body(context);
  if (!thread.copies.empty()) fail("exits with copies under way");
  Block& block = *thread.block;
  happens_before(&ends);
  happens_before(&block.exits);
  if (--block.running == 0) {
    happens_after(&block.exits);
    block.shared.reset();  // a GPU gives it to the next block: no other may look here any more
  }
  thread.done = true;
  leave(thread);
  __builtin_unreachable();
}

// The scheduler's part of an arrival: whoever waited for it may go on.
void let_through(Barrier& barrier) {
  if (barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

void arrive_at(Thread& thread, Scope scope, const Site& site) {
  Barrier& barrier = barrier_of(thread, scope);
  bool& arrived = thread.arrived[int(scope)];
  if (arrived) fail("arrives again at " + name_of(site) + " without having waited");
  if (barrier.arrived > 0 && !same(barrier.site, site)) {
    fail("is at " + name_of(site) + ", others of its group at " + name_of(barrier.site));
  }
  arrived = true;
  thread.generation[int(scope)] = barrier.generation;
  barrier.site = site;
  ++barrier.arrived;
  thread.scope = scope;
}

void wait_at(Thread& thread, Scope scope, const Site& site) {
  if (!thread.arrived[int(scope)]) fail("waits at " + name_of(site) + " without having arrived");
  thread.arrived[int(scope)] = false;
  thread.site = site;
  thread.scope = scope;
  thread.waits = true;
  leave(thread);
}

}  // namespace

// ---- What threads call. Containers change in the scheduler alone: the sanitizers see what memmove does. ----

void fail(const std::string& why) {
  failure = name_of(*current) + ": " + why;
  happens_before(&ends);
  leave(*current);  // for good: the launch ends here
  __builtin_unreachable();
}

void arrive(Scope scope, const Site& site) {
  const Met& here = meet(site);
  if (here.skipped) return;
  Barrier& barrier = barrier_of(*current, scope);
  if (here.ordered) happens_before(&barrier.order[barrier.generation % 2]);
  arrive_at(*current, scope, site);
  leave(*current);
}

void wait(Scope scope, const Site& site) {
  const Met& here = meet(site);
  if (here.skipped) return;
  Thread& thread = *current;
  wait_at(thread, scope, site);
  if (here.ordered) happens_after(&barrier_of(thread, scope).order[thread.generation[int(scope)] % 2]);
}

void synchronise(Scope scope, const Site& site) {
  const Met& here = meet(site);
  if (here.skipped) return;
  Thread& thread = *current;
  Barrier& barrier = barrier_of(thread, scope);
  char* const order = &barrier.order[barrier.generation % 2];
  if (here.ordered) happens_before(order);
  arrive_at(thread, scope, site);
  wait_at(thread, scope, site);
  if (here.ordered) happens_after(order);
}

uint64_t exchange(uint64_t mine, unsigned lane, const Site& site) {
  Thread& thread = *current;
  Warp& warp = thread.block->warps[thread.index.x / kWarp];
  auto& given = warp.given[warp.barrier.generation % 2];
  given[thread.index.x % kWarp] = mine;
  arrive_at(thread, Scope::warp, site);
  wait_at(thread, Scope::warp, site);
  return given[lane % kWarp];
}

int cluster_rank() { return current->block->rank; }
int cluster_size() { return launch.cluster; }
char* shared_memory() { return current->block->shared.get(); }

char* shared_of(const void* local, int rank) {
  const ptrdiff_t offset = static_cast<const char*>(local) - shared_memory();
  if (offset < 0 || offset >= launch.shared_bytes) fail("maps what is not its shared memory");
  if (rank < 0 || rank >= launch.cluster) fail("maps memory of rank " + std::to_string(rank));
  if (!blocks[rank]->started) fail("maps memory of a block that has not started");
  char* const base = blocks[rank]->shared.get();
  if (base == nullptr) fail("maps memory of a block that has exited");
  return base + offset;
}

void copy_later(void* to, const void* from) { current->copies.push_back({to, from, current->group}); }
void close_group() { ++current->group; }

void finish_copies(int groups_left, void (*copy)(void*, const void*)) {
  Thread& thread = *current;
  while (!thread.copies.empty() && thread.copies.front().group < thread.group - groups_left) {
    copy(thread.copies.front().to, thread.copies.front().from);
    thread.copies.pop_front();
  }
}

// ---- Launching ----

namespace {

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
