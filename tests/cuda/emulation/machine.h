// The state of the emulated machine, between what threads ask for (threads.cpp) and the scheduler (scheduler.cpp).
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "fibre.h"
#include "scheduler.h"

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostSites = 256;

struct Thread;

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  Site site;
  std::vector<Thread*> waiting;
  // Addresses for ThreadSanitizer, by turns: who is past a barrier orders nothing at the one before.
  char order[2] = {};
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

extern std::unique_ptr<Fibre> host;                   // runs the scheduler
extern std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch
extern std::vector<std::unique_ptr<Block>> blocks;    // of the cluster that runs
extern Barrier cluster_barrier;
extern Thread* current;
extern Launch launch;
extern void (*body)(void*);
extern void* context;
extern std::string failure;
extern Met met[kMostSites];  // the barriers of this launch
extern int met_count;
extern char starts, ends;  // addresses for ThreadSanitizer

std::string name_of(const Site& site);
std::string name_of(const Thread& thread);
Barrier& barrier_of(const Thread& thread, Scope scope);
// Where every fibre begins.
void run_thread();

}  // namespace emulation
