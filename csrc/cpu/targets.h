// Loops over targets alone. Those over classes have a form that compilers turn into vectors: no branches, and no
// comparison of 64 bits but for equality.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Over all targets together. bad: negative where one is neither a class nor ignored; ignored: minus how many are.
struct FoundTargets {
  int64_t bad = 0, ignored = 0;
};

// Calls each(k, g) with -1 for ignored targets.
template <typename Stride, typename Each>
LONGTAIL_INLINE FoundTargets for_targets(const int64_t* __restrict__ target, Stride stride, int64_t count,
                                         int64_t ignore_index, int64_t num_classes, const Each& each) {
  FoundTargets found;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t g = target[k * stride], skip = g == ignore_index ? -1 : 0;
    const uint64_t after = static_cast<uint64_t>(num_classes - 1) - static_cast<uint64_t>(g);
    found.bad |= (g | static_cast<int64_t>(after)) & ~skip;
    found.ignored += skip;
    each(k, g | skip);
  }
  return found;
}

template <typename Each>
LONGTAIL_INLINE FoundTargets for_targets(const int64_t* target, int64_t stride, int64_t count, int64_t ignore_index,
                                         int64_t num_classes, const Each& each) {
  if (stride != 1) return for_targets<int64_t>(target, stride, count, ignore_index, num_classes, each);
  return for_targets(target, std::integral_constant<int64_t, 1>(), count, ignore_index, num_classes, each);
}

// The first that is neither a class nor ignored, or -1.
inline int64_t first_bad(const int64_t* target, int64_t stride, int64_t count, int64_t ignore_index,
                         int64_t num_classes) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t g = target[k * stride];
    if (g != ignore_index && (g < 0 || g >= num_classes)) return k;
  }
  return -1;
}

inline TargetCount count_targets(const MeanDenominatorArgs& args, int64_t begin, int64_t end) {
  const int64_t stride = args.target_stride, count = end - begin;
  const int64_t* target = args.target + begin * stride;
  const FoundTargets found =
      for_targets(target, stride, count, args.ignore_index, args.num_classes, [](int64_t, int64_t) {});
  const int64_t bad =
      found.bad < 0 ? begin + first_bad(target, stride, count, args.ignore_index, args.num_classes) : -1;
  return {count + found.ignored, bad};
}

template <typename Z, typename T>
bool dense_targets_fit_of(const DenseTargets& targets) {
  using V = Vec<T>;
  constexpr int64_t kAhead = 16384 / sizeof(Z);  // fetched into the second-level cache
  const Z* y = static_cast<const Z*>(targets.y);
  const V zero = T(0), one = T(1), ignored = static_cast<T>(targets.ignore_index);
  Mask<T> bad = zero < zero;
  for (int64_t k = 0; k < targets.count; k += V::kLanes) {
    __builtin_prefetch(y + k + kAhead, 0, 2);
    const V v = load_some(y + k, targets.count - k);
    Mask<T> outside = (v < zero) | (one < v);
    if (targets.ignoring) outside = outside & Mask<T>{v.v != ignored.v};
    bad = bad | outside;
  }
  return all(Mask<T>{~bad.v});
}

inline bool dense_targets_fit(const DenseTargets& targets) {
  switch (targets.storage) {
    case Storage::float64:
      return dense_targets_fit_of<double, double>(targets);
    case Storage::float32:
      return dense_targets_fit_of<float, float>(targets);
    case Storage::bfloat16:
      return dense_targets_fit_of<bfloat16, float>(targets);
    case Storage::float16:
      return dense_targets_fit_of<float16, float>(targets);
  }
  return false;
}

}  // namespace LONGTAIL_ISA
}  // namespace longtail
