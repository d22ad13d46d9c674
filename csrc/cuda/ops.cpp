// The CUDA kernels of torch.ops.longtail's softmax operators and of scale_grad_.
// Python owns the schemas of the namespace longtail_cuda and calls these by way of torch.ops.longtail.
#include "ops.h"

#include "../softmax_options.h"

namespace longtail {
namespace gpu {
namespace {

SoftmaxLossArgs make_args(const Tensor& logits, const Tensor& target, const SoftmaxOptions& o) {
  const Layout layout = check_logits(logits, "logits");
  const int64_t n = layout.rows, c = layout.num_classes;
  check_vector(target, "target", n, ScalarType::Long);
  check_device(target, "target", logits);
  SoftmaxLossArgs args = {};
  args.storage = storage_of(logits);
  args.rows = n;
  args.num_classes = c;
  args.logits = logits.const_data_ptr();
  args.logits_stride = layout.stride;
  args.pixels = layout.pixels;
  args.logits_class_stride = layout.class_stride;
  args.target = static_cast<const int64_t*>(target.const_data_ptr());
  args.target_stride = target.stride(0);
  args.weight = vector(o.weight, "weight", c, logits);
  args.class_bias = vector(o.class_bias, "class_bias", c, logits);
  args.class_margin = vector(o.class_margin, "class_margin", c, logits);
  args.sample_weight = vector(o.sample_weight, "sample_weight", n, logits);
  args.ignore_index = o.ignore_index;
  args.options = generic::convert<float>(o.numbers);
  args.entropy = true;
  return args;
}

void set_grad_loss(SoftmaxLossArgs& args, const Tensor& grad_loss, const Tensor& logits) {
  check_vector(grad_loss, "grad_loss", args.rows, ScalarType::Float);
  check_device(grad_loss, "grad_loss", logits);
  args.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  args.grad_loss_stride = grad_loss.stride(0);
}

void set_grad(SoftmaxLossArgs& args, const Tensor& grad) {
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = grad.stride(0);
  args.grad_class_stride = grad.stride(1);
}

void set_stats(SoftmaxLossArgs& args, const Tensor& stats) {
  args.stats = static_cast<float*>(const_cast<void*>(stats.const_data_ptr()));
  args.stats_stride = stats.stride(0);
  args.stats_column_stride = stats.stride(1);
}

struct Outputs {
  Tensor loss, stats;
};

Outputs make_outputs(SoftmaxLossArgs& args, const Tensor& logits) {
  const int64_t n = args.rows;
  // Threads are pixels in images, and write each column together.
  const Tensor stats = logits.dim() == 2
                           ? new_tensor(logits, {n, 5}, ScalarType::Float)
                           : torch::stable::transpose(new_tensor(logits, {5, n}, ScalarType::Float), 0, 1);
  const Outputs out = {new_tensor(logits, {n}, ScalarType::Float), stats};
  args.loss = static_cast<float*>(out.loss.mutable_data_ptr());
  set_stats(args, out.stats);
  return out;
}

void run(SoftmaxLossArgs& args, Pass pass, const Tensor& logits, const MaybeTensor& weight) {
  if (args.rows == 0) return;
  const Launch on(logits);
  Tensor weight_sum;
  if (weight && args.options.label_smoothing != 0.0f) {
    weight_sum = torch::stable::sum(*weight);
    args.weight_sum = static_cast<const float*>(weight_sum.const_data_ptr());
  }
  softmax_loss(args, pass, on.device, on.stream);
}

std::tuple<Tensor, Tensor> softmax_loss_op(const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  const Outputs out = make_outputs(args, logits);
  run(args, Pass::loss, logits, weight);
  return {out.loss, out.stats};
}

Tensor softmax_loss_backward_op(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const Tensor& stats, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  check(stats.dim() == 2 && stats.size(0) == args.rows && stats.size(1) == 5, "stats have shape ", shape_of(stats),
        ", expected [", args.rows, ", 5]");
  check_dtype(stats, "stats", ScalarType::Float);
  check(logits.dim() == 3 || stats.is_contiguous(), "stats are not contiguous");
  check_device(stats, "stats", logits);
  set_grad_loss(args, grad_loss, logits);
  const Tensor grad = new_like(logits, logits.scalar_type());
  set_stats(args, stats);
  set_grad(args, grad);
  run(args, Pass::backward, logits, weight);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> softmax_loss_and_grad_op(const Tensor& grad_loss, const Tensor& logits,
                                                            const Tensor& target, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Outputs out = make_outputs(args, logits);
  const Tensor grad = new_like(logits, logits.scalar_type());
  set_grad(args, grad);
  run(args, Pass::loss_and_grad, logits, weight);
  return {out.loss, out.stats, grad};
}

std::tuple<Tensor, Tensor> softmax_loss_and_grad_inplace_op(const Tensor& grad_loss, const Tensor& logits,
                                                            const Tensor& target, LONGTAIL_OPTIONS) {
  SoftmaxLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Outputs out = make_outputs(args, logits);
  set_grad(args, logits);
  run(args, Pass::loss_and_grad, logits, weight);
  return {out.loss, out.stats};
}

void scale_grad_op(const Tensor& grad, const Tensor& grad_loss, const MaybeTensor& target, int64_t ignore_index) {
  const Layout layout = check_logits(grad, "grad");
  check_vector(grad_loss, "grad_loss", layout.rows, ScalarType::Float);
  check_device(grad_loss, "grad_loss", grad);
  if (target) check_vector(*target, "target", layout.rows, ScalarType::Long);
  if (target) check_device(*target, "target", grad);
  ScaleGradArgs args = {};
  args.storage = storage_of(grad);
  args.rows = layout.rows;
  args.num_classes = layout.num_classes;
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = layout.stride;
  args.factor = static_cast<const float*>(grad_loss.const_data_ptr());
  args.factor_stride = grad_loss.stride(0);
  args.pixels = layout.pixels;
  args.class_stride = layout.class_stride;
  args.target = target ? static_cast<const int64_t*>(target->const_data_ptr()) : nullptr;
  args.target_stride = target ? target->stride(0) : 0;
  args.ignore_index = ignore_index;
  const Launch on(grad);
  scale_grad(args, on.device, on.stream);
}

}  // namespace
}  // namespace gpu
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cuda, CUDA, m) {
  m.impl("softmax_loss", TORCH_BOX(&longtail::gpu::softmax_loss_op));
  m.impl("softmax_loss_backward", TORCH_BOX(&longtail::gpu::softmax_loss_backward_op));
  m.impl("softmax_loss_and_grad", TORCH_BOX(&longtail::gpu::softmax_loss_and_grad_op));
  m.impl("softmax_loss_and_grad_", TORCH_BOX(&longtail::gpu::softmax_loss_and_grad_inplace_op));
  m.impl("scale_grad_", TORCH_BOX(&longtail::gpu::scale_grad_op));
}
