// The CPU kernels of torch.ops.longtail.softmax_loss and its gradients.
// Python owns the schemas of the namespace longtail_cpu and calls these by way of torch.ops.longtail.
#include <memory>

#include "../softmax_options.h"
#include "ops.h"

namespace longtail {
namespace {

double sum_of_weights(const void* weight, int64_t num_classes, ScalarType dtype) {
  if (weight == nullptr) return static_cast<double>(num_classes);
  double total = 0.0;
  for (int64_t j = 0; j < num_classes; ++j) {
    total += dtype == ScalarType::Double ? static_cast<const double*>(weight)[j] : static_cast<const float*>(weight)[j];
  }
  return total;
}

SoftmaxLossArgs make_args(const Tensor& logits, const Tensor& target, const SoftmaxOptions& o) {
  const Layout layout = check_layout(logits, "logits");
  const int64_t n = layout.rows, c = layout.num_classes;
  const ScalarType dtype = accumulate_type(logits);
  check_vector(target, "target", n, ScalarType::Long);
  SoftmaxLossArgs args = {};
  args.storage = storage_of(logits);
  args.num_classes = c;
  args.logits = logits.const_data_ptr();
  args.pixels = layout.pixels;
  args.logits_stride = layout.stride;
  args.logits_class_stride = layout.class_stride;
  args.target = static_cast<const int64_t*>(target.const_data_ptr());
  args.target_stride = target.stride(0);
  args.weight = vector_data(o.weight, "weight", c, dtype);
  args.class_bias = vector_data(o.class_bias, "class_bias", c, dtype);
  args.class_margin = vector_data(o.class_margin, "class_margin", c, dtype);
  args.sample_weight = vector_data(o.sample_weight, "sample_weight", n, dtype);
  args.ignore_index = o.ignore_index;
  args.options = o.numbers;
  if (o.numbers.label_smoothing != 0.0) args.weight_sum = sum_of_weights(args.weight, c, dtype);
  return args;
}

void set_stats(SoftmaxLossArgs& args, const Tensor& stats) {
  args.stats = const_cast<void*>(stats.const_data_ptr());
  args.stats_stride = stats.stride(0);
  args.stats_column_stride = stats.stride(1);
}

// [rows, 5] in the arithmetic's dtype; contiguous rows, but for images.
void check_stats(const Tensor& stats, const char* name, const Tensor& logits) {
  const int64_t rows = row_count(logits);
  check(stats.dim() == 2 && stats.size(0) == rows && stats.size(1) == 5, name, " has shape ", shape_of(stats),
        ", expected [", rows, ", 5]");
  check_dtype(stats, name, accumulate_type(logits));
  check(logits.dim() == 3 || stats.is_contiguous(), name, " is not contiguous");
}

void set_grad_loss(SoftmaxLossArgs& args, const Tensor& grad_loss, const Tensor& logits) {
  check_vector(grad_loss, "grad_loss", row_count(logits), accumulate_type(logits));
  args.grad_loss = grad_loss.const_data_ptr();
  args.grad_loss_stride = grad_loss.stride(0);
}

void set_grad(SoftmaxLossArgs& args, const Tensor& grad) {
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = grad.stride(0);
  args.grad_class_stride = grad.stride(1);
}

// Pixels that go through all classes together: fewer where a stretch's logits are kept, to fit the second-level cache.
int64_t stretch_of(const SoftmaxLossArgs& args, Pass pass, int64_t bytes) {
  constexpr int64_t kKept = 1024 * 1024, kLanes = 16;
  if (pass != Pass::loss_and_grad) return kLongestStretch;
  const int64_t fitting = kKept / (bytes * std::max<int64_t>(1, args.num_classes)) / kLanes * kLanes;
  return std::min(kLongestStretch, std::max(kLanes, fitting));
}

void run(SoftmaxLossArgs& args, Pass pass, const Tensor& logits, const Tensor& target) {
  const Kernels& kernel = kernels();
  const int64_t bytes = args.storage == Storage::float64 ? 8 : 4;
  args.stretch = stretch_of(args, pass, bytes);
  size_t scratch_bytes = 0;
  if (pass == Pass::loss_and_grad && (args.pixels > 0 || args.options.softcap != 0.0)) {
    scratch_bytes = args.num_classes * bytes * (args.pixels > 0 ? args.stretch : 1);
  }
  check_targets_first(args, target, args.ignore_index, pass == Pass::apply ? -1 : 0);
  const int64_t bad = parallel_rows(check_layout(logits, "logits"), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(scratch_bytes ? new char[scratch_bytes] : nullptr);
    return kernel.softmax_loss_rows(args, pass, begin, end, scratch.get());
  });
  check_target(bad, target, args.num_classes, args.ignore_index);
}

struct Outputs {
  Tensor loss, stats;
};

Outputs make_outputs(SoftmaxLossArgs& args, const Tensor& logits) {
  const int64_t rows = row_count(logits);
  const ScalarType dtype = accumulate_type(logits);
  Outputs out = {new_tensor({rows}, dtype), new_tensor({rows, 5}, dtype)};
  // Lanes are pixels there, and write a register of each column.
  if (logits.dim() == 3) out.stats = torch::stable::transpose(new_tensor({5, rows}, dtype), 0, 1);
  args.loss = out.loss.mutable_data_ptr();
  set_stats(args, out.stats);
  return out;
}

SoftmaxLossArgs shard_args(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                           const MaybeTensor& class_bias, const MaybeTensor& class_margin, int64_t ignore_index,
                           double scale, double softcap) {
  check(logits.dim() == 2, "logits have shape ", shape_of(logits), ", expected [N, C]");
  const MaybeTensor none;
  LossOptions<double> numbers = {};
  numbers.scale = scale;
  numbers.softcap = softcap;
  return make_args(logits, target, {weight, class_bias, class_margin, none, ignore_index, numbers});
}

Tensor softmax_loss_accumulate(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                               const MaybeTensor& class_bias, const MaybeTensor& class_margin, int64_t ignore_index,
                               bool label_smoothing, double scale, double softcap) {
  SoftmaxLossArgs args = shard_args(logits, target, weight, class_bias, class_margin, ignore_index, scale, softcap);
  args.options.label_smoothing = label_smoothing ? 1.0 : 0.0;
  const Tensor stats = new_tensor({logits.size(0), 5}, accumulate_type(logits));
  set_stats(args, stats);
  run(args, Pass::accumulate, logits, target);
  return stats;
}

void apply_to(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& row_grad,
              const MaybeTensor& weight, const MaybeTensor& class_bias, int64_t ignore_index, double scale,
              double softcap) {
  SoftmaxLossArgs args = shard_args(logits, target, weight, class_bias, std::nullopt, ignore_index, scale, softcap);
  check_stats(row_grad, "row_grad", logits);
  args.row_grad = row_grad.const_data_ptr();
  set_grad(args, grad);
  run(args, Pass::apply, logits, target);
}

Tensor softmax_loss_apply(const Tensor& logits, const Tensor& target, const Tensor& row_grad, const MaybeTensor& weight,
                          const MaybeTensor& class_bias, int64_t ignore_index, double scale, double softcap) {
  check(logits.dim() == 2, "logits have shape ", shape_of(logits), ", expected [N, C]");
  const Tensor grad = new_gradient(logits);
  apply_to(grad, logits, target, row_grad, weight, class_bias, ignore_index, scale, softcap);
  return grad;
}

void softmax_loss_apply_(const Tensor& logits, const Tensor& target, const Tensor& row_grad, const MaybeTensor& weight,
                         const MaybeTensor& class_bias, int64_t ignore_index, double scale, double softcap) {
  apply_to(logits, logits, target, row_grad, weight, class_bias, ignore_index, scale, softcap);
}

std::tuple<Tensor, Tensor> softmax_loss(const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  const Outputs out = make_outputs(args, logits);
  run(args, Pass::loss, logits, target);
  return {out.loss, out.stats};
}

Tensor softmax_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& stats,
                             LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  check_stats(stats, "stats", logits);
  set_grad_loss(args, grad_loss, logits);
  const Tensor grad = new_gradient(logits);
  set_stats(args, stats);
  set_grad(args, grad);
  run(args, Pass::backward, logits, target);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> softmax_loss_and_grad(const Tensor& grad_loss, const Tensor& logits,
                                                         const Tensor& target, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Outputs out = make_outputs(args, logits);
  const Tensor grad = new_gradient(logits);
  set_grad(args, grad);
  run(args, Pass::loss_and_grad, logits, target);
  return {out.loss, out.stats, grad};
}

std::tuple<Tensor, Tensor> softmax_loss_and_grad_(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                                  LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Outputs out = make_outputs(args, logits);
  set_grad(args, logits);
  run(args, Pass::loss_and_grad, logits, target);
  return {out.loss, out.stats};
}

}  // namespace
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cpu, CPU, m) {
  m.impl("softmax_loss", TORCH_BOX(&longtail::softmax_loss));
  m.impl("softmax_loss_backward", TORCH_BOX(&longtail::softmax_loss_backward));
  m.impl("softmax_loss_and_grad", TORCH_BOX(&longtail::softmax_loss_and_grad));
  m.impl("softmax_loss_and_grad_", TORCH_BOX(&longtail::softmax_loss_and_grad_));
  m.impl("softmax_loss_accumulate", TORCH_BOX(&longtail::softmax_loss_accumulate));
  m.impl("softmax_loss_apply", TORCH_BOX(&longtail::softmax_loss_apply));
  m.impl("softmax_loss_apply_", TORCH_BOX(&longtail::softmax_loss_apply_));
}
