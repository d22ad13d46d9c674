// What threads ask for. Containers that are shared change in the scheduler alone: the sanitizers see what memmove does.
#include <cstring>

#include "machine.h"

namespace emulation {

std::string name_of(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(thread.index.x) + " of block " + std::to_string(thread.block_index.x);
}

Barrier& barrier_of(const Thread& thread, Scope scope) {
  if (scope == Scope::cluster) return cluster_barrier;
  return scope == Scope::block ? thread.block->barrier : thread.block->warps[thread.index.x / kWarp].barrier;
}

namespace {

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
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

void run_thread() {
  Thread& thread = *current;
  thread.fibre.entered();
  thread.block->started = true;
  happens_after(&starts);
  body(context);
  if (!thread.copies.empty()) fail("exits with copies under way");
  if (thread.arrived[int(Scope::cluster)]) fail("exits without having waited for its cluster");
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

}  // namespace emulation
