// The CPU kernels of torch.ops.longtail.sigmoid_loss and its gradients.
// Python owns the schemas of the namespace longtail_cpu and calls these by way of torch.ops.longtail.
#include "../sigmoid_options.h"
#include "ops.h"

namespace longtail {
namespace {

// int64 [R]: class indices; floating point of the logits' shape: a target for each element.
void set_target(SigmoidLossArgs& args, const Tensor& target, const Tensor& logits) {
  if (target.scalar_type() == ScalarType::Long) {
    check_vector(target, "target", row_count(logits), ScalarType::Long);
    args.target = static_cast<const int64_t*>(target.const_data_ptr());
    args.target_stride = target.stride(0);
    return;
  }
  check_same_shape(target, "target", logits);
  args.dense_is_wide = target.scalar_type() != logits.scalar_type();
  if (args.dense_is_wide) check_dtype(target, "target", accumulate_type(logits));
  const Layout layout = check_layout(target, "target");
  args.dense_target = target.const_data_ptr();
  args.dense_stride = layout.stride;
  args.dense_class_stride = layout.class_stride;
}

SigmoidLossArgs make_args(const Tensor& logits, const Tensor& target, const SigmoidOptions& o) {
  const Layout layout = check_layout(logits, "logits");
  const ScalarType dtype = accumulate_type(logits);
  SigmoidLossArgs args = {};
  args.storage = storage_of(logits);
  args.num_classes = layout.num_classes;
  args.pixels = layout.pixels;
  args.logits = logits.const_data_ptr();
  args.logits_stride = layout.stride;
  args.logits_class_stride = layout.class_stride;
  set_target(args, target, logits);
  args.weight = vector_data(o.weight, "weight", layout.num_classes, dtype);
  args.pos_weight = vector_data(o.pos_weight, "pos_weight", layout.num_classes, dtype);
  args.sample_weight = vector_data(o.sample_weight, "sample_weight", layout.rows, dtype);
  args.class_weight_by_target = o.class_weight_by_target;
  check(!o.class_weight_by_target || (target.scalar_type() == ScalarType::Long && o.weight.has_value()),
        "class_weight_by_target needs class indices and weight");
  args.ignoring = o.ignore_index.has_value();
  args.ignore_index = o.ignore_index.value_or(0);
  args.alpha_positive = o.alpha_positive();
  args.alpha_negative = o.alpha_negative();
  args.gamma = o.gamma;
  return args;
}

// [R], or of the logits' shape.
void set_grad_loss(SigmoidLossArgs& args, const Tensor& grad_loss, const Tensor& logits) {
  args.grad_loss = grad_loss.const_data_ptr();
  args.elementwise_upstream = grad_loss.dim() == logits.dim();
  if (args.elementwise_upstream) {
    check_same_shape(grad_loss, "grad_loss", logits);
    check_dtype(grad_loss, "grad_loss", accumulate_type(logits));
    check(grad_loss.is_contiguous(), "grad_loss is not contiguous");
    return;
  }
  check_vector(grad_loss, "grad_loss", row_count(logits), accumulate_type(logits));
  args.grad_loss_stride = grad_loss.stride(0);
}

void set_grad(SigmoidLossArgs& args, const Tensor& grad) {
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = grad.stride(0);
  args.grad_class_stride = grad.stride(1);
}

Tensor new_loss(SigmoidLossArgs& args, const Tensor& logits) {
  const ScalarType dtype = accumulate_type(logits);
  const Tensor loss = args.elementwise_loss ? new_like(logits, dtype) : new_tensor({row_count(logits)}, dtype);
  args.loss = loss.mutable_data_ptr();
  return loss;
}

void run(const SigmoidLossArgs& args, Pass pass, const Tensor& logits, const Tensor& target) {
  const Kernels& kernel = kernels();
  const auto ignore_index = args.ignoring ? std::optional(args.ignore_index) : std::nullopt;
  check_targets_first(args, target, ignore_index, 0);
  const int64_t bad = parallel_rows(check_layout(logits, "logits"), [&](int64_t begin, int64_t end) {
    return kernel.sigmoid_loss_rows(args, pass, begin, end);
  });
  check_target(bad, target, args.num_classes, ignore_index);
}

Tensor sigmoid_loss(const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS, bool elementwise) {
  SigmoidLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  args.elementwise_loss = elementwise;
  const Tensor loss = new_loss(args, logits);
  run(args, Pass::loss, logits, target);
  return loss;
}

Tensor sigmoid_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS) {
  SigmoidLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Tensor grad = new_gradient(logits);
  set_grad(args, grad);
  run(args, Pass::backward, logits, target);
  return grad;
}

Tensor loss_and_grad_into(const Tensor& grad, const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                          const SigmoidOptions& options, bool elementwise) {
  SigmoidLossArgs args = make_args(logits, target, options);
  args.elementwise_loss = elementwise;
  set_grad_loss(args, grad_loss, logits);
  const Tensor loss = new_loss(args, logits);
  set_grad(args, grad);
  run(args, Pass::loss_and_grad, logits, target);
  return loss;
}

std::tuple<Tensor, Tensor> sigmoid_loss_and_grad(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                                 LONGTAIL_OPTIONS, bool elementwise) {
  check_layout(logits, "logits");
  const Tensor grad = new_gradient(logits);
  return {loss_and_grad_into(grad, grad_loss, logits, target, LONGTAIL_OPTION_VALUES, elementwise), grad};
}

Tensor sigmoid_loss_and_grad_(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS,
                              bool elementwise) {
  return loss_and_grad_into(logits, grad_loss, logits, target, LONGTAIL_OPTION_VALUES, elementwise);
}

}  // namespace
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cpu, CPU, m) {
  m.impl("sigmoid_loss", TORCH_BOX(&longtail::sigmoid_loss));
  m.impl("sigmoid_loss_backward", TORCH_BOX(&longtail::sigmoid_loss_backward));
  m.impl("sigmoid_loss_and_grad", TORCH_BOX(&longtail::sigmoid_loss_and_grad));
  m.impl("sigmoid_loss_and_grad_", TORCH_BOX(&longtail::sigmoid_loss_and_grad_));
}
