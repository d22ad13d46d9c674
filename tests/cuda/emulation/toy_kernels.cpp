// Small kernels, right and wrong, to see that the emulation runs the former and finds fault with the latter.
//
// As a library: `toy` for ctypes. As a program: `toy_kernels CASE`, for the sanitizers.
#include <cstdio>
#include <memory>

#include "emulation.h"

namespace {

using namespace longtail::gpu;

// clang-format off
enum Fault {
  none, no_barrier, no_last_barrier, no_cluster_barrier, beyond_shared, beyond_input,
  misaligned, divergent, two_barriers, lone_lane, unfinished_copy, early_read,
  no_wait, unmapped, assertion
};
const char* const kNames[] = {
  "none", "no_barrier", "no_last_barrier", "no_cluster_barrier", "beyond_shared", "beyond_input",
  "misaligned", "divergent", "two_barriers", "lone_lane", "unfinished_copy", "early_read",
  "no_wait", "unmapped", "assertion"
};
// clang-format on

struct Sum {
  const float* x;  // [blocks, count] of one cluster, or of many
  float* sums;     // one per cluster
  int count;       // per block
  Fault fault;
};

float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Each block sums its part with all its warps; block 0 of a cluster adds up what the others have in shared memory.
void sum_kernel(const Sum a) {
  float* shared = dynamic_shared<float>();
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const float* x = a.x + static_cast<int64_t>(blockIdx.x) * a.count;
  float own = 0.0f;
  const int end = a.count + (a.fault == beyond_input && blockIdx.x == gridDim.x - 1);
  for (int i = static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) own += x[i];
  own = warp_sum(own);
  if (threadIdx.x % 32 == 0) shared[warp + (a.fault == beyond_shared)] = own;
  if (a.fault != no_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += shared[i];
    shared[0] = sum;
  }
  cluster_arrive();
  if (a.fault != no_cluster_barrier) cluster_wait();
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    float sum = 0.0f;
    for (int rank = 0; rank < cluster_size(); ++rank) sum += *map_shared(shared, rank);
    a.sums[blockIdx.x / static_cast<unsigned>(cluster_size())] = sum;
  }
  if (a.fault == no_last_barrier) return;
  if (a.fault == no_cluster_barrier) cluster_wait();
  cluster_arrive();
  cluster_wait();
}

void faulty_kernel(const Sum a) {
  float4* shared = dynamic_shared<float4>();
  const float* x = a.x + 4 * threadIdx.x;
  if (a.fault == misaligned) a.sums[0] = load_constant_16(x + 1).x;
  if (a.fault == divergent && threadIdx.x < 64) __syncthreads();
  if (a.fault == two_barriers) {
    if (threadIdx.x < 64) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (a.fault == lone_lane && threadIdx.x % 32 > 0) warp_sum(1.0f);
  if (a.fault == no_wait) cluster_arrive();
  if (a.fault == unmapped) *map_shared(dynamic_shared<float>(), 1) = 0.0f;
  LONGTAIL_DEVICE_ASSERT(a.fault != assertion, "as it should");
  if (a.fault != unfinished_copy && a.fault != early_read) return;
  copy_async_16(shared + threadIdx.x, x);
  copy_async_commit();
  if (a.fault == early_read) copy_async_wait<1>();
  a.sums[threadIdx.x] = shared[threadIdx.x].x;
  if (a.fault == early_read) copy_async_wait<0>();
}

void run(const Sum& a, int clusters, int cluster, int threads) {
  if (a.fault <= beyond_input) {
    launch(sum_kernel, int64_t{clusters} * cluster, threads, cluster, threads / 32 * 4, nullptr, a);
  } else {
    launch(faulty_kernel, 1, threads, 1, threads * 16, nullptr, a);
  }
}

Fault fault_named(const std::string& name) {
  for (int i = 0; i <= assertion; ++i) {
    if (name == kNames[i]) return static_cast<Fault>(i);
  }
  throw std::invalid_argument("no such case: " + name);
}

}  // namespace

// "" or why the launch failed.
extern "C" const char* toy(const char* name, const float* x, float* sums, int count, int clusters, int cluster,
                           int threads, int skewed) {
  static std::string failure;
  emulation::control.order = skewed ? emulation::Order::skewed : emulation::Order::even;
  try {
    failure.clear();
    run({x, sums, count, fault_named(name)}, clusters, cluster, threads);
  } catch (const std::exception& e) {
    failure = e.what();
  }
  return failure.c_str();
}

extern "C" void convert(const float* x, uint32_t* bfloat16, uint32_t* float16, float* back, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bfloat16[i] = pack_bfloat16(x[i], 0.0f);
    float16[i] = pack_float16(x[i], 0.0f);
    back[i] = unpack_float16(float16[i]).x;
  }
}

int main(int count, char** arguments) {
  constexpr int kClusters = 3, kCluster = 2, kThreads = 96, kCount = 1000;
  const std::unique_ptr<float[]> x(new float[kClusters * kCluster * kCount]), sums(new float[kThreads]);
  for (int i = 0; i < kClusters * kCluster * kCount; ++i) x[i] = 1.0f;
  const char* failure =
      toy(count > 1 ? arguments[1] : "none", x.get(), sums.get(), kCount, kClusters, kCluster, kThreads, 0);
  printf("%s %g\n", failure, static_cast<double>(sums[0]));
  return *failure != '\0';
}
