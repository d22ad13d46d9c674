// torch.ops.longtail.sigmoid_loss and its gradients, on any Device.
#pragma once

#include "ops.h"
#include "sigmoid_args.h"

namespace longtail {

// The trailing arguments, in schema order.
struct SigmoidOptions {
  LONGTAIL_SIGMOID_VECTORS(LONGTAIL_VECTOR_FIELD)
  LONGTAIL_SIGMOID_SCALARS(LONGTAIL_SCALAR_FIELD)
};

#define LONGTAIL_SIGMOID_PARAMETERS \
  LONGTAIL_SIGMOID_VECTORS(LONGTAIL_VECTOR_PARAMETER) LONGTAIL_SIGMOID_SCALARS(LONGTAIL_SCALAR_PARAMETER)
#define LONGTAIL_SIGMOID_VALUES \
  SigmoidOptions { LONGTAIL_SIGMOID_VECTORS(LONGTAIL_VALUE) LONGTAIL_SIGMOID_SCALARS(LONGTAIL_VALUE) }

template <typename Device>
struct SigmoidOps {
  using Args = typename Device::SigmoidLossArgs;
  using Pass = typename Device::Pass;
  using Element = typename Device::Element;
  using Number = typename Device::Number;

  // int64 [R]: class indices; floating point of the logits' shape: a target for each element.
  static void set_targets(Args& args, const Tensor& target, const Tensor& logits) {
    Device::check_device(target, "target", logits);
    if (target.scalar_type() == ScalarType::Long) return set_target(args, target);
    args.dense_class_stride = set_dense_target(args, target, logits).class_stride;
  }

  static Args with_options(const Tensor& logits, const Tensor& target, const SigmoidOptions& o) {
    Args args = {};
    set_logits(args, logits, Device::check_layout(logits, "logits"));
    args.storage = storage_of<Device>(logits);
    set_targets(args, target, logits);
    LONGTAIL_SIGMOID_VECTORS(LONGTAIL_SET_VECTOR)
    args.class_weight_by_target = o.class_weight_by_target;
    check(!o.class_weight_by_target || (target.scalar_type() == ScalarType::Long && o.weight.has_value()),
          "class_weight_by_target needs class indices and weight");
    args.ignoring = o.ignore_index.has_value();
    args.ignore_index = o.ignore_index.value_or(0);
    args.alpha_positive = static_cast<Number>(o.alpha.value_or(1.0));
    args.alpha_negative = static_cast<Number>(o.alpha ? 1.0 - *o.alpha : 1.0);
    args.gamma = static_cast<Number>(o.gamma);
    set_general(args, o);
    return args;
  }

  static void set_general(Args& args, const SigmoidOptions& o) {
    const double gamma_negative = o.gamma_negative.value_or(o.gamma);
    args.same_gamma = !o.gamma_negative.has_value();
    args.gamma_negative = static_cast<Number>(gamma_negative);
    args.clip = static_cast<Number>(o.clip);
    args.detach = o.detach;
    args.negative_scale = static_cast<Number>(o.negative_scale);
    args.label_smoothing = static_cast<Number>(o.label_smoothing);
    args.rebalance_alpha = static_cast<Number>(o.rebalance_alpha);
    args.rebalance_beta = static_cast<Number>(o.rebalance_beta);
    args.rebalance_mu = static_cast<Number>(o.rebalance_mu);
    const bool vectors = o.class_bias || o.class_alpha || o.class_gamma || o.inverse_counts;
    args.plain = !vectors && gamma_negative == o.gamma && o.clip == 0 && (!o.detach || o.gamma == 0) &&
                 o.negative_scale == 1 && o.label_smoothing == 0;
  }

  // [R], or of the logits' shape.
  static void set_upstream(Args& args, const Tensor& grad_loss, const Tensor& logits) {
    Device::check_device(grad_loss, "grad_loss", logits);
    args.elementwise_upstream = grad_loss.dim() == logits.dim();
    if (!args.elementwise_upstream) return set_grad_loss<Device>(args, grad_loss, logits);
    check_same_shape(grad_loss, "grad_loss", logits);
    check_dtype(grad_loss, "grad_loss", accumulate_type(logits));
    check(grad_loss.is_contiguous(), "grad_loss is not contiguous");
    args.grad_loss = static_cast<const Element*>(grad_loss.const_data_ptr());
  }

  static Tensor new_loss(Args& args, const Tensor& logits, bool elementwise) {
    args.elementwise_loss = elementwise;
    const ScalarType dtype = accumulate_type(logits);
    const Tensor loss = elementwise ? new_like(logits, dtype) : new_tensor(logits, {args.rows}, dtype);
    args.loss = static_cast<Element*>(loss.mutable_data_ptr());
    return loss;
  }

  static Tensor sigmoid_loss(const Tensor& logits, const Tensor& target LONGTAIL_SIGMOID_PARAMETERS, bool elementwise) {
    Args args = with_options(logits, target, LONGTAIL_SIGMOID_VALUES);
    const Tensor loss = new_loss(args, logits, elementwise);
    Device::sigmoid_loss(args, Pass::loss, logits);
    return loss;
  }

  static Tensor sigmoid_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                                      const Tensor& target LONGTAIL_SIGMOID_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_SIGMOID_VALUES);
    set_upstream(args, grad_loss, logits);
    const Tensor grad = Device::new_gradient(logits);
    set_grad(args, grad);
    Device::sigmoid_loss(args, Pass::backward, logits);
    return grad;
  }

  static Tensor loss_and_grad_into(const Tensor& grad, const Tensor& grad_loss, const Tensor& logits,
                                   const Tensor& target, const SigmoidOptions& options, bool elementwise) {
    Args args = with_options(logits, target, options);
    set_upstream(args, grad_loss, logits);
    const Tensor loss = new_loss(args, logits, elementwise);
    set_grad(args, grad);
    Device::sigmoid_loss(args, Pass::loss_and_grad, logits);
    return loss;
  }

  static std::tuple<Tensor, Tensor> sigmoid_loss_and_grad(const Tensor& grad_loss, const Tensor& logits,
                                                          const Tensor& target LONGTAIL_SIGMOID_PARAMETERS,
                                                          bool elementwise) {
    Device::check_layout(logits, "logits");
    const Tensor grad = Device::new_gradient(logits);
    return {loss_and_grad_into(grad, grad_loss, logits, target, LONGTAIL_SIGMOID_VALUES, elementwise), grad};
  }

  static Tensor sigmoid_loss_and_grad_(const Tensor& grad_loss, const Tensor& logits,
                                       const Tensor& target LONGTAIL_SIGMOID_PARAMETERS, bool elementwise) {
    return loss_and_grad_into(logits, grad_loss, logits, target, LONGTAIL_SIGMOID_VALUES, elementwise);
  }

  template <typename Library>
  static void add_to(Library& library) {
    LONGTAIL_OPERATOR(SigmoidOps, sigmoid_loss);
    LONGTAIL_OPERATOR(SigmoidOps, sigmoid_loss_backward);
    LONGTAIL_OPERATOR(SigmoidOps, sigmoid_loss_and_grad);
    LONGTAIL_OPERATOR(SigmoidOps, sigmoid_loss_and_grad_);
  }
};

}  // namespace longtail
