// The operators' device that is the CPU: rows in parallel on torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../hierarchical_ops.h"
#include "../row_ops.h"
#include "../sigmoid_ops.h"
#include "../softmax_ops.h"
#include "../two_way_ops.h"
#include "hierarchical_members.h"
#include "kernels.h"
#include "long_rows.h"

namespace longtail {

// About 32k logits are worth waking a thread; a short stretch of pixels wastes lines of memory.
template <typename Args>
int64_t grain(const Args& args) {
  constexpr int64_t kElements = 32768, kPixels = 512;
  return std::max<int64_t>(args.pixels > 0 ? kPixels : 1, kElements / std::max<int64_t>(1, args.num_classes));
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

// How many classes targets are among.
template <typename Args>
int64_t target_classes(const Args& args) {
  return args.num_classes;
}
inline int64_t target_classes(const HierarchicalLossArgs& args) { return args.tree_classes; }

template <typename Args>
void check_target(int64_t row, const Args& args, std::optional<int64_t> ignore_index) {
  if (row < 0) return;
  const std::string ignored = ignore_index ? " or ignore_index " + std::to_string(*ignore_index) : "";
  check(false, "target ", args.target[row * args.target_stride], " in row ", row,
        " is out of bounds: expected 0 <= target < ", target_classes(args), ignored);
}

// All targets at once. `lowest`: -1 where that is a target too.
template <typename Args>
void check_targets(const Args& args, std::optional<int64_t> ignore_index, int64_t lowest) {
  const int64_t bad = parallel_rows(args.rows, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = args.target[i * args.target_stride];
      if ((g < lowest || g >= target_classes(args)) && g != ignore_index) return i;
    }
    return int64_t(-1);
  });
  check_target(bad, args, ignore_index);
}

// The same for what overwrites its logits: the loops find a bad target after they have written.
template <typename Args>
void check_targets_first(const Args& args, std::optional<int64_t> ignore_index, int64_t lowest) {
  if (args.grad == nullptr || args.grad != args.logits || args.target == nullptr) return;
  check_targets(args, ignore_index, lowest);
}

inline double number_at(const void* numbers, bool wide, int64_t i) {
  return wide ? static_cast<const double*>(numbers)[i] : static_cast<const float*>(numbers)[i];
}

template <typename T>
void divide(const MeanLossArgs& args, const void* sum, double denominator) {
  const T divisor = static_cast<T>(denominator);
  *static_cast<T*>(args.mean) = *static_cast<const T*>(sum) / divisor;
  *static_cast<T*>(args.divisor) = divisor == 0 ? std::numeric_limits<T>::infinity() : divisor;
}

inline double sum_of_weights(const SoftmaxLossArgs& args) {
  if (args.weight == nullptr) return static_cast<double>(args.num_classes);
  double total = 0.0;
  for (int64_t j = 0; j < args.num_classes; ++j) {
    total += number_at(args.weight, args.storage == Storage::float64, j);
  }
  return total;
}

// Pixels that go through all classes together: fewer where a stretch's logits are kept, to fit the second-level cache.
inline int64_t stretch_of(const SoftmaxLossArgs& args, Pass pass, int64_t bytes) {
  constexpr int64_t kKept = 1024 * 1024, kLanes = 16;
  if (pass != Pass::loss_and_grad) return kLongestStretch;
  const int64_t fitting = kKept / (bytes * std::max<int64_t>(1, args.num_classes)) / kLanes * kLanes;
  return std::min(kLongestStretch, std::max(kLanes, fitting));
}

inline int64_t bytes_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// Whether effective logits of rows cost more than the logits to read, and can be read as they are for the gradient.
// Beside logits of half types a bias does, which is twice as long as they are.
inline bool keeps_effective(const SoftmaxLossArgs& args) {
  const LossOptions<double>& o = args.options;
  if (args.pixels > 0 || o.softcap != 0.0 || o.label_smoothing != 0.0) return false;
  const bool stretched = args.class_scale || args.target_scale || o.scale != 1.0;
  const bool biased = args.class_bias && bytes_of(args.storage) == 2;
  return stretched || biased || args.class_mitigation || o.compensation != 0.0;
}

// Whether a gradient is too large for the caches and better written past them, so that no line is read to be written.
// Fresh pages are not: the system has just put them into the caches, as zeros.
inline bool streamed(void* grad, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kCaches = int64_t(64) << 20;
  if (grad == nullptr || bytes < kCaches) return false;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(grad) + bytes / 2) / page * page;
  unsigned char resident = 0;
  return mincore(reinterpret_cast<void*>(middle), page, &resident) == 0 && (resident & 1) != 0;
#else
  return false;
#endif
}

struct Cpu {
  using Storage = longtail::Storage;
  using Pass = longtail::Pass;
  using SoftmaxLossArgs = longtail::SoftmaxLossArgs;
  using SigmoidLossArgs = longtail::SigmoidLossArgs;
  using HierarchicalLossArgs = longtail::HierarchicalLossArgs;
  using TwoWayLossArgs = longtail::TwoWayLossArgs;
  using ScaleGradArgs = longtail::ScaleGradArgs;
  using Element = void;
  using Number = double;
  static constexpr std::pair<ScalarType, Storage> kStorages[] = {{ScalarType::Double, Storage::float64},
                                                                 {ScalarType::Float, Storage::float32},
                                                                 {ScalarType::BFloat16, Storage::bfloat16},
                                                                 {ScalarType::Half, Storage::float16}};
  static constexpr const char* kStorageNames = "float64, float32, bfloat16 or float16";
  static constexpr int64_t kFewClasses = longtail::kFewClasses;

  static Layout check_layout(const Tensor& t, const char* name) { return longtail::check_layout(t, name); }
  static void check_device(const Tensor&, const char*, const Tensor&) {}

  // As large as the logits, it is mostly fresh memory: huge pages cut the cost of its page faults.
  static Tensor new_gradient(const Tensor& logits) {
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

  static void softmax_loss(SoftmaxLossArgs& args, Pass pass, const Tensor&, const MaybeTensor&) {
    const Kernels& kernel = kernels();
    const bool sums = args.options.label_smoothing != 0.0 && pass != Pass::accumulate && !args.dense;
    if (sums) args.weight_sum = sum_of_weights(args);
    const int64_t bytes = args.storage == Storage::float64 ? 8 : 4;
    args.stretch = stretch_of(args, pass, bytes);
    args.stream =
        args.grad != args.logits && streamed(args.grad, args.rows * args.num_classes * bytes_of(args.storage));
    if (args.dense) {
      parallel_rows(args.rows, grain(args), [&](int64_t begin, int64_t end) {
        return kernel.softmax_loss_rows(args, pass, begin, end, nullptr);
      });
      return;
    }
    if (shares_out_classes(args, pass)) {
      check_targets(args, args.ignore_index, 0);
      const auto each = [](int64_t count, const auto& body) {
        torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) body(i);
        });
      };
      if (args.storage == Storage::float64) return LongRows<double>::run(args, pass, kernel, each);
      return LongRows<float>::run(args, pass, kernel, each);
    }
    size_t scratch_bytes = 0;
    const bool may_keep = args.num_classes > kFewClasses && pass == Pass::loss_and_grad;
    args.keeps = may_keep && keeps_effective(args);
    const bool in_place = args.grad == args.logits && bytes_of(args.storage) == bytes;
    if (may_keep && (args.pixels > 0 || args.options.softcap != 0.0 || (args.keeps && !in_place))) {
      scratch_bytes = args.num_classes * bytes * (args.pixels > 0 ? args.stretch : 1);
    }
    check_targets_first(args, args.ignore_index, pass == Pass::apply ? -1 : 0);
    const int64_t bad = parallel_rows(args.rows, grain(args), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> scratch(scratch_bytes ? new char[scratch_bytes] : nullptr);
      return kernel.softmax_loss_rows(args, pass, begin, end, scratch.get());
    });
    check_target(bad, args, args.ignore_index);
  }

  static void sigmoid_loss(const SigmoidLossArgs& args, Pass pass, const Tensor&) {
    const Kernels& kernel = kernels();
    const auto ignore_index = args.ignoring ? std::optional(args.ignore_index) : std::nullopt;
    check_targets_first(args, ignore_index, 0);
    const int64_t bad = parallel_rows(args.rows, grain(args), [&](int64_t begin, int64_t end) {
      return kernel.sigmoid_loss_rows(args, pass, begin, end);
    });
    check_target(bad, args, ignore_index);
  }

  static void hierarchical_loss(HierarchicalLossArgs& args, Pass pass, const Tensor&) {
    const Kernels& kernel = kernels();
    check_targets_first(args, args.ignore_index, 0);
    const int64_t bytes = bytes_of(args.storage), numbers = args.storage == Storage::float64 ? 8 : 4;
    std::unique_ptr<char[]> ordered_bias;
    MembersOfNodes members;
    if (args.order) {
      check_order(args);
      if (args.class_bias) ordered_bias.reset(new char[args.num_classes * numbers]);
      args.ordered_bias = ordered_bias.get();
      if (ordered_bias) (numbers == 8 ? put_in_order<double> : put_in_order<float>)(args, ordered_bias.get());
      members.find(args);
    } else {
      args.stream = args.grad != args.logits && streamed(args.grad, args.rows * args.num_classes * bytes);
    }
    const int64_t bad = parallel_rows(args.rows, grain(args), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> scratch(args.order ? new char[2 * args.num_classes * bytes + args.mask_bytes]
                                                       : nullptr);
      return kernel.hierarchical_loss_rows(args, pass, begin, end, scratch.get());
    });
    if (bad < 0) return;
    const int64_t g = args.target[bad * args.target_stride];
    check(g < 0 || g >= args.tree_classes, "path, node_begin and node_end of class ", g,
          " do not nest, or do not end at it");
    check_target(bad, args, args.ignore_index);
  }

  static void two_way_loss(TwoWayLossArgs& args, Pass pass, const Tensor&) {
    const Kernels& kernel = kernels();
    const auto ignore_index = args.ignoring ? std::optional(args.ignore_index) : std::nullopt;
    args.stream = args.pixels == 0 && args.grad != args.logits &&
                  streamed(args.grad, args.rows * args.num_classes * bytes_of(args.storage));
    check_targets_first(args, ignore_index, 0);
    const int64_t bad = parallel_rows(args.rows, grain(args), [&](int64_t begin, int64_t end) {
      return kernel.two_way_loss_rows(args, pass, begin, end);
    });
    check_target(bad, args, ignore_index);
  }

  static void check_order(const HierarchicalLossArgs& args) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < args.num_classes; ++j) largest = std::max(largest, static_cast<uint32_t>(args.order[j]));
    check(args.num_classes == 0 || largest < args.num_classes, "order holds ", static_cast<int32_t>(largest),
          ", expected classes in [0, ", args.num_classes, ")");
  }

  template <typename T>
  static void put_in_order(const HierarchicalLossArgs& args, char* ordered) {
    for (int64_t j = 0; j < args.num_classes; ++j) {
      reinterpret_cast<T*>(ordered)[j] = static_cast<const T*>(args.class_bias)[args.order[j]];
    }
  }

  static void scale_grad(const ScaleGradArgs& args, const Tensor&) {
    const Kernels& kernel = kernels();
    torch::stable::parallel_for(0, args.rows, grain(args),
                                [&](int64_t begin, int64_t end) { kernel.scale_grad_rows(args, begin, end); });
  }

  static void mean_denominator(const MeanDenominatorArgs& args, const Tensor&) {
    constexpr int64_t kRows = 16384;  // summed apart, whatever the threads are
    struct Part {
      int64_t count;
      double weight;
    };
    std::vector<Part> parts((args.rows + kRows - 1) / kRows);
    const int64_t bad = parallel_rows(static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t bad_row = add_targets(args, i * kRows, std::min(args.rows, (i + 1) * kRows), parts[i]);
        if (bad_row >= 0) return bad_row;
      }
      return int64_t(-1);
    });
    check_target(bad, args, args.ignore_index);
    Part sum = {};
    for (const Part& part : parts) sum = {sum.count + part.count, sum.weight + part.weight};
    if (args.weight_size == 0) *static_cast<int64_t*>(args.result) = sum.count;
    if (args.weight_size == 4) *static_cast<float*>(args.result) = static_cast<float>(sum.weight);
    if (args.weight_size == 8) *static_cast<double*>(args.result) = sum.weight;
  }

  // Adds the rows [begin, end); returns the first whose target is out of bounds, or -1.
  template <typename Part>
  static int64_t add_targets(const MeanDenominatorArgs& args, int64_t begin, int64_t end, Part& part) {
    const TargetCount found = kernels().count_targets(args, begin, end);
    part.count = found.counted;
    if (found.bad >= 0) return found.bad;
    for (int64_t i = begin; args.weight_size > 0 && i < end; ++i) {
      const int64_t g = args.target[i * args.target_stride];
      if (g != args.ignore_index) part.weight += number_at(args.weight, args.weight_size == 8, g);
    }
    return -1;
  }

  static void mean_loss(const MeanLossArgs& args, const Tensor& loss) {
    const Tensor sum = torch::stable::sum(loss);
    const double denominator = args.denominator_type == Counted::integers
                                   ? static_cast<double>(*static_cast<const int64_t*>(args.denominator))
                                   : number_at(args.denominator, args.denominator_type == Counted::float64, 0);
    (args.loss_size == 8 ? divide<double> : divide<float>)(args, sum.const_data_ptr(), denominator);
  }
};

}  // namespace longtail
