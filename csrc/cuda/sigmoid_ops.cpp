// The CUDA kernels of torch.ops.longtail's sigmoid operators.
// Python owns the schemas of the namespace longtail_cuda and calls these by way of torch.ops.longtail.
#include "../sigmoid_options.h"
#include "ops.h"

namespace longtail {
namespace gpu {
namespace {

// int64 [R]: class indices; floating point of the logits' shape: a target for each element.
void set_target(SigmoidLossArgs& args, const Tensor& target, const Tensor& logits) {
  check_device(target, "target", logits);
  if (target.scalar_type() == ScalarType::Long) {
    check_vector(target, "target", args.rows, ScalarType::Long);
    args.target = static_cast<const int64_t*>(target.const_data_ptr());
    args.target_stride = target.stride(0);
    return;
  }
  check_same_shape(target, "target", logits);
  args.dense_is_wide = target.scalar_type() != logits.scalar_type();
  if (args.dense_is_wide) check_dtype(target, "target", ScalarType::Float);
  args.dense_target = target.const_data_ptr();
  const Layout layout = check_logits(target, "target");
  args.dense_stride = layout.stride;
  args.dense_class_stride = layout.class_stride;
}

SigmoidLossArgs make_args(const Tensor& logits, const Tensor& target, const SigmoidOptions& o) {
  const Layout layout = check_logits(logits, "logits");
  SigmoidLossArgs args = {};
  args.storage = storage_of(logits);
  args.rows = layout.rows;
  args.num_classes = layout.num_classes;
  args.pixels = layout.pixels;
  args.logits = logits.const_data_ptr();
  args.logits_stride = layout.stride;
  args.logits_class_stride = layout.class_stride;
  set_target(args, target, logits);
  args.weight = vector(o.weight, "weight", layout.num_classes, logits);
  args.pos_weight = vector(o.pos_weight, "pos_weight", layout.num_classes, logits);
  args.sample_weight = vector(o.sample_weight, "sample_weight", layout.rows, logits);
  args.class_weight_by_target = o.class_weight_by_target;
  check(!o.class_weight_by_target || (target.scalar_type() == ScalarType::Long && o.weight.has_value()),
        "class_weight_by_target needs class indices and weight");
  args.ignoring = o.ignore_index.has_value();
  args.ignore_index = o.ignore_index.value_or(0);
  args.alpha_positive = static_cast<float>(o.alpha_positive());
  args.alpha_negative = static_cast<float>(o.alpha_negative());
  args.gamma = static_cast<float>(o.gamma);
  return args;
}

// [R], or of the logits' shape.
void set_grad_loss(SigmoidLossArgs& args, const Tensor& grad_loss, const Tensor& logits) {
  check_device(grad_loss, "grad_loss", logits);
  args.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  args.elementwise_upstream = grad_loss.dim() == logits.dim();
  if (args.elementwise_upstream) {
    check_same_shape(grad_loss, "grad_loss", logits);
    check_dtype(grad_loss, "grad_loss", ScalarType::Float);
    check(grad_loss.is_contiguous(), "grad_loss is not contiguous");
    return;
  }
  check_vector(grad_loss, "grad_loss", args.rows, ScalarType::Float);
  args.grad_loss_stride = grad_loss.stride(0);
}

Tensor new_loss(SigmoidLossArgs& args, const Tensor& logits, bool elementwise) {
  args.elementwise_loss = elementwise;
  const Tensor loss =
      elementwise ? new_like(logits, ScalarType::Float) : new_tensor(logits, {args.rows}, ScalarType::Float);
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  return loss;
}

void run(const SigmoidLossArgs& args, Pass pass, const Tensor& logits) {
  if (args.rows == 0) return;
  const Launch on(logits);
  sigmoid_loss(args, pass, on.device, on.stream);
}

Tensor sigmoid_loss_op(const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS, bool elementwise) {
  SigmoidLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  const Tensor loss = new_loss(args, logits, elementwise);
  run(args, Pass::loss, logits);
  return loss;
}

void set_grad(SigmoidLossArgs& args, const Tensor& grad) {
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = grad.stride(0);
  args.grad_class_stride = grad.stride(1);
}

Tensor sigmoid_loss_backward_op(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, LONGTAIL_OPTIONS) {
  SigmoidLossArgs args = make_args(logits, target, LONGTAIL_OPTION_VALUES);
  set_grad_loss(args, grad_loss, logits);
  const Tensor grad = new_like(logits, logits.scalar_type());
  set_grad(args, grad);
  run(args, Pass::backward, logits);
  return grad;
}

Tensor loss_and_grad_into(const Tensor& grad, const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                          const SigmoidOptions& options, bool elementwise) {
  SigmoidLossArgs args = make_args(logits, target, options);
  set_grad_loss(args, grad_loss, logits);
  const Tensor loss = new_loss(args, logits, elementwise);
  set_grad(args, grad);
  run(args, Pass::loss_and_grad, logits);
  return loss;
}

std::tuple<Tensor, Tensor> sigmoid_loss_and_grad_op(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                                    LONGTAIL_OPTIONS, bool elementwise) {
  check_logits(logits, "logits");
  const Tensor grad = new_like(logits, logits.scalar_type());
  return {loss_and_grad_into(grad, grad_loss, logits, target, LONGTAIL_OPTION_VALUES, elementwise), grad};
}

Tensor sigmoid_loss_and_grad_inplace_op(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                        LONGTAIL_OPTIONS, bool elementwise) {
  return loss_and_grad_into(logits, grad_loss, logits, target, LONGTAIL_OPTION_VALUES, elementwise);
}

}  // namespace
}  // namespace gpu
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cuda, CUDA, m) {
  m.impl("sigmoid_loss", TORCH_BOX(&longtail::gpu::sigmoid_loss_op));
  m.impl("sigmoid_loss_backward", TORCH_BOX(&longtail::gpu::sigmoid_loss_backward_op));
  m.impl("sigmoid_loss_and_grad", TORCH_BOX(&longtail::gpu::sigmoid_loss_and_grad_op));
  m.impl("sigmoid_loss_and_grad_", TORCH_BOX(&longtail::gpu::sigmoid_loss_and_grad_inplace_op));
}
