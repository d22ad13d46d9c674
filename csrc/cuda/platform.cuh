// The only file that knows CUDA itself: everything below it is written against the names that this one gives.
//
// Beside these names kernels use threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, __syncthreads, __syncwarp,
// __shfl_xor_sync and __shfl_sync with a full mask, uint2, uint4, float2, float4, and the <math.h> functions of
// loss_math.h. The tests compile the same kernels for the host (LONGTAIL_EMULATED), where emulation.h gives every one
// of these names.
#pragma once

#ifdef LONGTAIL_EMULATED
#include "emulation.h"
#else

#include <assert.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#define LONGTAIL_DEVICE __device__ __forceinline__
// Threads per block, at most, and blocks of them that a multiprocessor has registers for, at least.
#define LONGTAIL_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define LONGTAIL_PARAMETER const __grid_constant__

namespace longtail {
namespace gpu {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Arithmetic ----

// 2^x, subnormal results as 0; 2 ULP.
LONGTAIL_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) of a normal number: 2^-22 of itself, or, between 1/2 and 2, 2^-22.
LONGTAIL_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger; NaN if either is.
LONGTAIL_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// 1 / x, subnormal results as 0; 1 ULP.
LONGTAIL_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a * b within [0, 1]; NaN becomes 0.
LONGTAIL_DEVICE float multiply_saturated(float a, float b) {
  float y;
  asm("mul.sat.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// a / b, 2 ULP.
LONGTAIL_DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }

LONGTAIL_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
LONGTAIL_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// Two half-width numbers in one word, the first in its low half; rounded to nearest even.
LONGTAIL_DEVICE uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
LONGTAIL_DEVICE uint32_t pack_float16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
LONGTAIL_DEVICE float2 unpack_float16(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// The larger of each half of a word; of a number and NaN, the number.
LONGTAIL_DEVICE uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
LONGTAIL_DEVICE uint32_t max_float16(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Whether it is so in any lane of the warp.
LONGTAIL_DEVICE bool any_lane(bool x) { return __any_sync(kAllLanes, x) != 0; }

// An address in device memory, computed here and kept: not anew in every turn of a loop.
template <typename T>
LONGTAIL_DEVICE T* kept(T* p) {
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}

// Of a power of two.
LONGTAIL_DEVICE int log2_of(int n) { return 31 - __clz(n); }

// ---- Memory ----

// 16 bytes at a 16-byte boundary. Streaming: the first to leave the cache.
LONGTAIL_DEVICE uint4 load_16(const void* p) { return *static_cast<const uint4*>(p); }
LONGTAIL_DEVICE uint4 load_16_streaming(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
LONGTAIL_DEVICE void store_16(void* p, uint4 x) { *static_cast<uint4*>(p) = x; }
LONGTAIL_DEVICE void store_16_streaming(void* p, uint4 x) { __stcs(static_cast<uint4*>(p), x); }

LONGTAIL_DEVICE uint2 load_8(const void* p) { return *static_cast<const uint2*>(p); }
LONGTAIL_DEVICE void store_8_streaming(void* p, uint2 x) { __stcs(static_cast<uint2*>(p), x); }

// Constant for the whole launch, and read by many rows.
LONGTAIL_DEVICE float load_constant(const float* p) { return __ldg(p); }
LONGTAIL_DEVICE float4 load_constant_16(const float* p) { return __ldg(reinterpret_cast<const float4*>(p)); }

// The block's shared memory, all of it dynamic, at a 16-byte boundary.
template <typename T>
LONGTAIL_DEVICE T* dynamic_shared() {
  extern __shared__ uint4 longtail_shared[];
  return reinterpret_cast<T*>(longtail_shared);
}

// Copies 16 bytes from device memory to shared memory behind the thread's back. A thread may read what it copied itself
// after copy_async_wait<n>, which leaves at most the n youngest of its groups under way; `commit` ends a group.
LONGTAIL_DEVICE void copy_async_16(void* shared, const void* p) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
}
LONGTAIL_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
LONGTAIL_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Clusters: blocks that run together and see each other's shared memory; a cluster of one before sm_90 ----

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
LONGTAIL_DEVICE int cluster_size() { return 1; }
LONGTAIL_DEVICE int cluster_rank() { return 0; }
LONGTAIL_DEVICE void cluster_arrive() {}
LONGTAIL_DEVICE void cluster_wait() {}
template <typename T>
LONGTAIL_DEVICE T* map_shared(T* local, int) {
  return local;
}
#else
LONGTAIL_DEVICE int cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
  return static_cast<int>(n);
}
LONGTAIL_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Each thread of the cluster arrives, then waits until all have; what was written before the one is seen after the
// other.
LONGTAIL_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
LONGTAIL_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The same place in the shared memory of block `rank` of the cluster.
template <typename T>
LONGTAIL_DEVICE T* map_shared(T* local, int rank) {
  uint64_t remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(reinterpret_cast<uint64_t>(local)), "r"(rank));
  return reinterpret_cast<T*>(remote);
}
#endif

// ---- Assertions and launches ----

// As torch's device-side assertions: the launch fails, and so does every later call on the device.
#define LONGTAIL_DEVICE_ASSERT(condition, message)                            \
  do {                                                                        \
    if (!(condition)) __assert_fail(message, "longtail", __LINE__, __func__); \
  } while (0)

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here, not by the next call
  throw std::runtime_error(std::string("longtail: ") + what + ": " + cudaGetErrorString(status));
}

// What a launch needs before it holds rows in shared memory or has more than 8 blocks per cluster. The attributes are
// limits that the last call sets: they are only ever raised.
inline void allow(const void* kernel, int cluster, int shared_bytes) {
  struct Limits {
    int shared_bytes = 0, cluster = 8;
  };
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Limits> all;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  Limits& limits = all[{kernel, device}];
  if (shared_bytes > limits.shared_bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    // Several blocks of them on a multiprocessor; the first-level cache has nothing to hold.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    static_cast<int>(cudaSharedmemCarveoutMaxShared)),
               "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)");
    limits.shared_bytes = shared_bytes;
  }
  if (cluster > limits.cluster) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)");
    limits.cluster = cluster;
  }
}

// Runs `kernel` on `grid` blocks, in clusters of `cluster`, on a cudaStream_t.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t grid, int threads, int cluster, int shared_bytes, void* stream,
            Parameters... parameters) {
  constexpr int kFew = 8 * 1024;  // bytes that any kernel may have, and as many blocks as it wants
  if (cluster > 8 || shared_bytes > kFew) allow(reinterpret_cast<const void*>(kernel), cluster, shared_bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  void* addresses[] = {&parameters...};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses), "kernel launch");
}

}  // namespace gpu
}  // namespace longtail

#endif  // LONGTAIL_EMULATED
