// What the operators of every family share: types, allocation, layouts, rows in parallel on torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../checks.h"
#include "kernels.h"

namespace longtail {

inline Storage storage_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      check(false, "logits have dtype ", torch::headeronly::toString(logits.scalar_type()),
            ", expected float64, float32, bfloat16 or float16");
      return Storage::float32;
  }
}

inline ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype,
                              std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Shape of the logits, contiguous.
inline Tensor new_like(const Tensor& logits, ScalarType dtype) {
  if (logits.dim() == 2) return new_tensor({logits.size(0), logits.size(1)}, dtype);
  return new_tensor({logits.size(0), logits.size(1), logits.size(2)}, dtype);
}

// A gradient as large as the logits is mostly fresh memory: huge pages cut the cost of its page faults.
inline Tensor new_gradient(const Tensor& logits) {
  Tensor grad = new_like(logits, logits.scalar_type());
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(grad.mutable_data_ptr()) + kHuge - 1) & ~(kHuge - 1);
  const auto end = (reinterpret_cast<uintptr_t>(grad.mutable_data_ptr()) +
                    static_cast<uintptr_t>(grad.numel()) * grad.element_size()) &
                   ~(kHuge - 1);
  if (end > begin + 8 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return grad;
}

// About 32k logits are worth waking a thread; a short stretch of pixels wastes lines of memory.
inline int64_t grain(const Layout& layout) {
  constexpr int64_t kElements = 32768, kPixels = 512;
  return std::max<int64_t>(layout.pixels > 0 ? kPixels : 1, kElements / std::max<int64_t>(1, layout.num_classes));
}

inline void check_target(int64_t row, const Tensor& target, int64_t num_classes, std::optional<int64_t> ignore_index) {
  if (row < 0) return;
  const int64_t value = static_cast<const int64_t*>(target.const_data_ptr())[row * target.stride(0)];
  const std::string ignored = ignore_index ? " or ignore_index " + std::to_string(*ignore_index) : "";
  check(false, "target ", value, " in row ", row, " is out of bounds: expected 0 <= target < ", num_classes, ignored);
}

// `rows(begin, end)` on torch's threads; each call returns a row with a bad target, or -1. Returns the first such row.
template <typename Rows>
int64_t parallel_rows(int64_t count, int64_t grain, const Rows& rows) {
  std::atomic<int64_t> bad_row{-1};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const int64_t bad = rows(begin, end);
    int64_t seen = bad_row.load();
    while (bad >= 0 && (seen < 0 || bad < seen) && !bad_row.compare_exchange_weak(seen, bad)) {
    }
  });
  return bad_row.load();
}

template <typename Rows>
int64_t parallel_rows(const Layout& layout, const Rows& rows) {
  return parallel_rows(layout.rows, grain(layout), rows);
}

// All targets at once, for what overwrites its logits: the loops find a bad one after they have written. `lowest`: -1
// where that is a target too.
template <typename Args>
void check_targets_first(const Args& args, const Tensor& target, std::optional<int64_t> ignore_index, int64_t lowest) {
  if (args.grad == nullptr || args.grad != args.logits || args.target == nullptr) return;
  const int64_t bad = parallel_rows(target.size(0), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = args.target[i * args.target_stride];
      if ((g < lowest || g >= args.num_classes) && g != ignore_index) return i;
    }
    return int64_t(-1);
  });
  check_target(bad, target, args.num_classes, ignore_index);
}

}  // namespace longtail
