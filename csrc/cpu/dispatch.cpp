// Which instruction set runs here: asked once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace longtail {
namespace {

// Narrowest first.
std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found = {&kernels_baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) found.push_back(&kernels_avx2);
  if (avx2 && avx512) found.push_back(&kernels_avx512);
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512_bf16);
#endif
  return found;
}

const Kernels& choose_kernels() {
  const auto found = supported_kernels();
  const char* forced = std::getenv("LONGTAIL_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *found.back();
  std::string names;
  for (const Kernels* candidate : found) {
    if (std::string(candidate->isa) == forced) return *candidate;
    names += std::string(names.empty() ? "" : ", ") + candidate->isa;
  }
  throw std::runtime_error("longtail: LONGTAIL_CPU_ISA is '" + std::string(forced) +
                           "', expected one that this processor runs: " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace longtail
