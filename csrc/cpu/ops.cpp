// The CPU kernels of torch.ops.longtail: checks, allocation, rows in parallel on torch's threads.
// Python owns the schemas of the namespace longtail_cpu and calls these by way of torch.ops.longtail.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../checks.h"
#include "softmax_loss.h"

namespace longtail {
namespace {

using MaybeTensor = std::optional<Tensor>;

Storage storage_of(const Tensor& logits) {
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

ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// A gradient as large as the logits is mostly fresh memory: huge pages cut the cost of its page faults.
Tensor new_gradient(const Tensor& logits) {
  const int64_t shape[] = {logits.size(0), logits.size(1)};
  Tensor grad = new_tensor({shape, 2}, logits.scalar_type());
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

double sum_of_weights(const void* weight, int64_t num_classes, ScalarType dtype) {
  if (weight == nullptr) return static_cast<double>(num_classes);
  double total = 0.0;
  for (int64_t j = 0; j < num_classes; ++j) {
    total += dtype == ScalarType::Double ? static_cast<const double*>(weight)[j] : static_cast<const float*>(weight)[j];
  }
  return total;
}

struct Options {
  const MaybeTensor &weight, &class_bias, &class_margin, &sample_weight;
  int64_t ignore_index;
  double label_smoothing, focal_gamma, complement_coefficient, cross_entropy_coefficient, scale, softcap, z_loss;
};

SoftmaxLossArgs make_args(const Tensor& logits, const Tensor& target, const Options& o) {
  check_rows(logits, "logits");
  const int64_t n = logits.size(0), c = logits.size(1);
  const ScalarType dtype = accumulate_type(logits);
  check_vector(target, "target", n, ScalarType::Long);
  SoftmaxLossArgs args = {};
  args.storage = storage_of(logits);
  args.num_classes = c;
  args.logits = logits.const_data_ptr();
  args.logits_stride = logits.stride(0);
  args.target = static_cast<const int64_t*>(target.const_data_ptr());
  args.target_stride = target.stride(0);
  args.weight = vector_data(o.weight, "weight", c, dtype);
  args.class_bias = vector_data(o.class_bias, "class_bias", c, dtype);
  args.class_margin = vector_data(o.class_margin, "class_margin", c, dtype);
  args.sample_weight = vector_data(o.sample_weight, "sample_weight", n, dtype);
  args.ignore_index = o.ignore_index;
  args.label_smoothing = o.label_smoothing;
  args.focal_gamma = o.focal_gamma;
  args.complement_coefficient = o.complement_coefficient;
  args.cross_entropy_coefficient = o.cross_entropy_coefficient;
  args.scale = o.scale;
  args.softcap = o.softcap;
  args.z_loss = o.z_loss;
  if (o.label_smoothing != 0.0) args.weight_sum = sum_of_weights(args.weight, c, dtype);
  return args;
}

void set_grad_loss(SoftmaxLossArgs& args, const Tensor& grad_loss, const Tensor& logits) {
  check_vector(grad_loss, "grad_loss", logits.size(0), accumulate_type(logits));
  args.grad_loss = grad_loss.const_data_ptr();
  args.grad_loss_stride = grad_loss.stride(0);
}

void set_grad(SoftmaxLossArgs& args, const Tensor& grad) {
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = grad.stride(0);
}

// About 32k logits are worth waking a thread.
int64_t grain(int64_t num_classes) {
  constexpr int64_t kElements = 32768;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, num_classes));
}

void check_target(int64_t row, const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  if (row < 0) return;
  const int64_t value = static_cast<const int64_t*>(target.const_data_ptr())[row * target.stride(0)];
  check(false, "target ", value, " in row ", row, " is out of bounds: expected 0 <= target < ", num_classes,
        " or ignore_index ", ignore_index);
}

void run(const SoftmaxLossArgs& args, Pass pass, const Tensor& target) {
  const Kernels& kernel = kernels();
  const size_t scratch_bytes = pass == Pass::loss_and_grad && args.softcap != 0.0
                                   ? args.num_classes * (args.storage == Storage::float64 ? 8 : 4)
                                   : 0;
  std::atomic<int64_t> bad_row{-1};
  torch::stable::parallel_for(0, target.size(0), grain(args.num_classes), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(scratch_bytes ? new char[scratch_bytes] : nullptr);
    const int64_t bad = kernel.softmax_loss_rows(args, pass, begin, end, scratch.get());
    int64_t seen = bad_row.load();
    while (bad >= 0 && (seen < 0 || bad < seen) && !bad_row.compare_exchange_weak(seen, bad)) {
    }
  });
  check_target(bad_row.load(), target, args.num_classes, args.ignore_index);
}

struct Outputs {
  Tensor loss, stats;
};

Outputs make_outputs(SoftmaxLossArgs& args, const Tensor& logits) {
  const int64_t shape[] = {logits.size(0), 5};
  Outputs out = {new_tensor({shape, 1}, accumulate_type(logits)), new_tensor({shape, 2}, accumulate_type(logits))};
  args.loss = out.loss.mutable_data_ptr();
  args.stats = out.stats.mutable_data_ptr();
  return out;
}

#define LONGTAIL_OPTIONS                                                                                  \
  const MaybeTensor &weight, const MaybeTensor &class_bias, const MaybeTensor &class_margin,              \
      const MaybeTensor &sample_weight, int64_t ignore_index, double label_smoothing, double focal_gamma, \
      double complement_coefficient, double cross_entropy_coefficient, double scale, double softcap, double z_loss
#define LONGTAIL_OPTION_VALUES                                                                   \
  Options {                                                                                      \
    weight, class_bias, class_margin, sample_weight, ignore_index, label_smoothing, focal_gamma, \
        complement_coefficient, cross_entropy_coefficient, scale, softcap, z_loss                \
  }

std::tuple<Tensor, Tensor> softmax_loss(const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  const Outputs out = make_outputs(args, logits);
  run(args, Pass::loss, target);
  return {out.loss, out.stats};
}

Tensor softmax_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& stats,
                             LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  check(stats.dim() == 2 && stats.size(0) == logits.size(0) && stats.size(1) == 5, "stats have shape ", shape_of(stats),
        ", expected [", logits.size(0), ", 5]");
  check_dtype(stats, "stats", accumulate_type(logits));
  check(stats.is_contiguous(), "stats are not contiguous");
  set_grad_loss(args, grad_loss, logits);
  const Tensor grad = new_gradient(logits);
  args.stats = const_cast<void*>(stats.const_data_ptr());
  set_grad(args, grad);
  run(args, Pass::backward, target);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> softmax_loss_and_grad(const Tensor& grad_loss, const Tensor& logits,
                                                         const Tensor& target, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Outputs out = make_outputs(args, logits);
  const Tensor grad = new_gradient(logits);
  set_grad(args, grad);
  run(args, Pass::loss_and_grad, target);
  return {out.loss, out.stats, grad};
}

std::tuple<Tensor, Tensor> softmax_loss_and_grad_(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                                  LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Outputs out = make_outputs(args, logits);
  set_grad(args, logits);
  run(args, Pass::loss_and_grad, target);
  return {out.loss, out.stats};
}

void scale_grad_(const Tensor& grad, const Tensor& grad_loss) {
  check_rows(grad, "grad");
  check_vector(grad_loss, "grad_loss", grad.size(0), accumulate_type(grad));
  const ScaleGradArgs args = {storage_of(grad),           grad.size(1),       grad.mutable_data_ptr(), grad.stride(0),
                              grad_loss.const_data_ptr(), grad_loss.stride(0)};
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, grad.size(0), grain(grad.size(1)),
                              [&](int64_t begin, int64_t end) { kernel.scale_grad_rows(args, begin, end); });
}

Tensor mean_denominator(const Tensor& target, const MaybeTensor& weight, int64_t ignore_index, int64_t num_classes) {
  check_vector(target, "target", target.dim() == 1 ? target.size(0) : -1, ScalarType::Long);
  const ScalarType dtype = weight ? weight->scalar_type() : ScalarType::Long;
  check(!weight || dtype == ScalarType::Float || dtype == ScalarType::Double, "weight has dtype ",
        torch::headeronly::toString(dtype), ", expected float32 or float64");
  const void* weights = vector_data(weight, "weight", num_classes, dtype);
  const auto* targets = static_cast<const int64_t*>(target.const_data_ptr());
  int64_t count = 0;
  double total = 0.0;
  for (int64_t i = 0; i < target.size(0); ++i) {
    const int64_t g = targets[i * target.stride(0)];
    if (g == ignore_index) continue;
    if (g < 0 || g >= num_classes) check_target(i, target, num_classes, ignore_index);
    ++count;
    if (dtype == ScalarType::Float) total += static_cast<const float*>(weights)[g];
    if (dtype == ScalarType::Double) total += static_cast<const double*>(weights)[g];
  }
  const Tensor result = new_tensor(torch::headeronly::IntHeaderOnlyArrayRef(nullptr, size_t(0)), dtype);
  if (dtype == ScalarType::Long) *static_cast<int64_t*>(result.mutable_data_ptr()) = count;
  if (dtype == ScalarType::Float) *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(total);
  if (dtype == ScalarType::Double) *static_cast<double*>(result.mutable_data_ptr()) = total;
  return result;
}

}  // namespace
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cpu, CPU, m) {
  m.impl("softmax_loss", TORCH_BOX(&longtail::softmax_loss));
  m.impl("softmax_loss_backward", TORCH_BOX(&longtail::softmax_loss_backward));
  m.impl("softmax_loss_and_grad", TORCH_BOX(&longtail::softmax_loss_and_grad));
  m.impl("softmax_loss_and_grad_", TORCH_BOX(&longtail::softmax_loss_and_grad_));
  m.impl("scale_grad_", TORCH_BOX(&longtail::scale_grad_));
  m.impl("mean_denominator", TORCH_BOX(&longtail::mean_denominator));
}

// Read by ctypes: the name of the instruction set in use, or null when LONGTAIL_CPU_ISA cannot be honoured.
extern "C" __attribute__((visibility("default"))) const char* longtail_cpu_isa() {
  try {
    return longtail::kernels().isa;
  } catch (const std::exception&) {
    return nullptr;
  }
}
