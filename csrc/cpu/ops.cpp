// The operators of the CPU: rows in parallel on torch's threads.
// Python owns the schemas of the namespace longtail_cpu and calls these by way of torch.ops.longtail.
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

#include "../row_ops.h"
#include "../sigmoid_ops.h"
#include "../softmax_ops.h"
#include "kernels.h"
#include "long_rows.h"

namespace longtail {
namespace {

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

template <typename Args>
void check_target(int64_t row, const Args& args, std::optional<int64_t> ignore_index) {
  if (row < 0) return;
  const std::string ignored = ignore_index ? " or ignore_index " + std::to_string(*ignore_index) : "";
  check(false, "target ", args.target[row * args.target_stride], " in row ", row,
        " is out of bounds: expected 0 <= target < ", args.num_classes, ignored);
}

// All targets at once. `lowest`: -1 where that is a target too.
template <typename Args>
void check_targets(const Args& args, std::optional<int64_t> ignore_index, int64_t lowest) {
  const int64_t bad = parallel_rows(args.rows, 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = args.target[i * args.target_stride];
      if ((g < lowest || g >= args.num_classes) && g != ignore_index) return i;
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

double number_at(const void* numbers, bool wide, int64_t i) {
  return wide ? static_cast<const double*>(numbers)[i] : static_cast<const float*>(numbers)[i];
}

template <typename T>
void divide(const MeanLossArgs& args, const void* sum, double denominator) {
  const T divisor = static_cast<T>(denominator);
  *static_cast<T*>(args.mean) = *static_cast<const T*>(sum) / divisor;
  *static_cast<T*>(args.divisor) = divisor == 0 ? std::numeric_limits<T>::infinity() : divisor;
}

double sum_of_weights(const SoftmaxLossArgs& args) {
  if (args.weight == nullptr) return static_cast<double>(args.num_classes);
  double total = 0.0;
  for (int64_t j = 0; j < args.num_classes; ++j) {
    total += number_at(args.weight, args.storage == Storage::float64, j);
  }
  return total;
}

// Pixels that go through all classes together: fewer where a stretch's logits are kept, to fit the second-level cache.
int64_t stretch_of(const SoftmaxLossArgs& args, Pass pass, int64_t bytes) {
  constexpr int64_t kKept = 1024 * 1024, kLanes = 16;
  if (pass != Pass::loss_and_grad) return kLongestStretch;
  const int64_t fitting = kKept / (bytes * std::max<int64_t>(1, args.num_classes)) / kLanes * kLanes;
  return std::min(kLongestStretch, std::max(kLanes, fitting));
}

int64_t bytes_of(Storage storage) { return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2; }

// Whether a gradient is too large for the caches and better written past them, so that no line is read to be written.
// Fresh pages are not: the system has just put them into the caches, as zeros.
bool streamed(void* grad, int64_t bytes) {
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
    if (args.options.label_smoothing != 0.0 && pass != Pass::accumulate) args.weight_sum = sum_of_weights(args);
    const int64_t bytes = args.storage == Storage::float64 ? 8 : 4;
    args.stretch = stretch_of(args, pass, bytes);
    args.stream =
        args.grad != args.logits && streamed(args.grad, args.rows * args.num_classes * bytes_of(args.storage));
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
    const bool keeps = args.num_classes > kFewClasses && pass == Pass::loss_and_grad;
    if (keeps && (args.pixels > 0 || args.options.softcap != 0.0)) {
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

// Whether the targets of all elements, [N, C] or [N, C, P], are in [0, 1], NaN or ignore_index.
bool dense_targets_fit(const Tensor& target, std::optional<int64_t> ignore_index) {
  constexpr int64_t kPiece = 16384;
  const Layout layout = check_layout(target, "target");
  const bool images = layout.pixels > 0, whole = target.is_contiguous();
  const int64_t length = whole ? target.numel() : images ? layout.pixels : layout.num_classes;
  const int64_t classes = images ? layout.num_classes : 1, pieces = (length + kPiece - 1) / kPiece;
  const int64_t runs = length == 0 ? 0 : target.numel() / length;
  const char* data = static_cast<const char*>(target.const_data_ptr());
  const Storage storage = storage_of<Cpu>(target);
  const auto piece = [&](int64_t i) {
    const int64_t run = i / pieces, first = i % pieces * kPiece;
    const int64_t offset = run / classes * layout.stride + run % classes * layout.class_stride + first;
    const int64_t count = std::min(kPiece, length - first);
    return DenseTargets{storage, data + offset * bytes_of(storage), count, ignore_index.has_value(),
                        ignore_index.value_or(0)};
  };
  const int64_t grain = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, length));
  const int64_t bad = parallel_rows(runs * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!kernels().dense_targets_fit(piece(i))) return i;
    }
    return int64_t(-1);
  });
  return bad < 0;
}

// softmax_loss, and what mean_loss makes of it, in one call: of few logits it is calls that take the time. `count`:
// divides by the counted rows, at least 1, whatever they weigh. The statistics are for softmax_loss_backward alone.
std::tuple<Tensor, Tensor, Tensor> softmax_mean(const Tensor& logits, const Tensor& target LONGTAIL_SOFTMAX_PARAMETERS,
                                                bool count) {
  SoftmaxLossArgs args = SoftmaxOps<Cpu>::with_options(logits, target, LONGTAIL_SOFTMAX_VALUES);
  const auto [loss, stats] = SoftmaxOps<Cpu>::loss_of(args, logits, weight, true);
  const Tensor denominator =
      RowOps<Cpu>::mean_denominator(target, count ? std::nullopt : weight, ignore_index, logits.size(1));
  if (count) {
    int64_t& rows = *static_cast<int64_t*>(denominator.mutable_data_ptr());
    rows = std::max<int64_t>(rows, 1);
  }
  const auto [mean, divisor] = RowOps<Cpu>::mean_loss(loss, denominator);
  return {mean, stats, divisor};
}

// The same of sigmoid_loss. rows: divides by the counted rows, at least 1, not by their elements.
std::tuple<Tensor, Tensor> sigmoid_mean(const Tensor& logits, const Tensor& target LONGTAIL_SIGMOID_PARAMETERS,
                                        bool rows) {
  using Ops = SigmoidOps<Cpu>;
  SigmoidLossArgs args = Ops::with_options(logits, target, LONGTAIL_SIGMOID_VALUES);
  const bool dense = target.scalar_type() != ScalarType::Long;
  check(!dense || !ignore_index, "ignore_index is ", ignore_index.value_or(0), ", expected none of dense targets");
  check(!dense || dense_targets_fit(target, std::nullopt), "a target is out of bounds: expected 0 <= target <= 1");
  const Tensor loss = Ops::new_loss(args, logits, false);
  Cpu::sigmoid_loss(args, Pass::loss, logits);
  const Tensor denominator =
      dense ? new_tensor(logits, {}, ScalarType::Long)
            : RowOps<Cpu>::mean_denominator(target, std::nullopt, ignore_index.value_or(-100), args.num_classes);
  int64_t& counted = *static_cast<int64_t*>(denominator.mutable_data_ptr());
  if (dense) counted = args.rows;
  counted = rows ? std::max<int64_t>(counted, 1) : counted * args.num_classes;
  return RowOps<Cpu>::mean_loss(loss, denominator);
}

}  // namespace
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cpu, CPU, library) {
  longtail::SoftmaxOps<longtail::Cpu>::add_to(library);
  longtail::SigmoidOps<longtail::Cpu>::add_to(library);
  longtail::RowOps<longtail::Cpu>::add_to(library);
  library.impl("softmax_mean", TORCH_BOX(&longtail::softmax_mean));
  library.impl("sigmoid_mean", TORCH_BOX(&longtail::sigmoid_mean));
  library.impl("dense_targets_fit", TORCH_BOX(&longtail::dense_targets_fit));
}

// Read by ctypes: the name of the instruction set in use, or null when LONGTAIL_CPU_ISA cannot be honoured.
extern "C" __attribute__((visibility("default"))) const char* longtail_cpu_isa() {
  try {
    return longtail::kernels().isa;
  } catch (const std::exception&) {
    return nullptr;
  }
}
