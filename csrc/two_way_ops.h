// torch.ops.longtail.two_way_loss and its gradients, on any Device.
#pragma once

#include "ops.h"
#include "two_way_args.h"

namespace longtail {

// The trailing arguments, in schema order.
struct TwoWayOptions {
  LONGTAIL_TWO_WAY_VECTORS(LONGTAIL_VECTOR_FIELD)
  LONGTAIL_TWO_WAY_SCALARS(LONGTAIL_SCALAR_FIELD)
};

#define LONGTAIL_TWO_WAY_PARAMETERS \
  LONGTAIL_TWO_WAY_VECTORS(LONGTAIL_VECTOR_PARAMETER) LONGTAIL_TWO_WAY_SCALARS(LONGTAIL_SCALAR_PARAMETER)
#define LONGTAIL_TWO_WAY_VALUES \
  TwoWayOptions { LONGTAIL_TWO_WAY_VECTORS(LONGTAIL_VALUE) LONGTAIL_TWO_WAY_SCALARS(LONGTAIL_VALUE) }

template <typename Device>
struct TwoWayOps {
  using Args = typename Device::TwoWayLossArgs;
  using Pass = typename Device::Pass;
  using Element = typename Device::Element;
  using Number = typename Device::Number;

  static Args with_options(const Tensor& logits, const Tensor& target, const TwoWayOptions& o) {
    Args args = {};
    set_logits(args, logits, Device::check_layout(logits, "logits"));
    args.storage = storage_of<Device>(logits);
    Device::check_device(target, "target", logits);
    if (target.scalar_type() == ScalarType::Long) {
      set_target(args, target);
    } else {
      args.dense_class_stride = set_dense_target(args, target, logits).class_stride;
    }
    LONGTAIL_TWO_WAY_VECTORS(LONGTAIL_SET_VECTOR)
    args.ignoring = o.ignore_index.has_value();
    args.ignore_index = o.ignore_index.value_or(0);
    args.positive_temperature = static_cast<Number>(o.positive_temperature);
    args.negative_temperature = static_cast<Number>(o.negative_temperature);
    check(args.positive_temperature > 0 && args.negative_temperature > 0,
          "a temperature is not positive, expected positive numbers");
    args.joint = o.joint;
    return args;
  }

  static void set_stats(Args& args, const Tensor& stats) {
    args.stats = static_cast<Element*>(const_cast<void*>(stats.const_data_ptr()));
    args.stats_stride = stats.stride(0);
    args.stats_column_stride = stats.stride(1);
  }

  // Of images column by column: neighbours that are pixels write each column together.
  static std::tuple<Tensor, Tensor> new_outputs(Args& args, const Tensor& logits) {
    const ScalarType dtype = accumulate_type(logits);
    const Tensor loss = new_tensor(logits, {args.rows}, dtype);
    const Tensor stats = logits.dim() == 3 ? torch::stable::transpose(new_tensor(logits, {4, args.rows}, dtype), 0, 1)
                                           : new_tensor(logits, {args.rows, 4}, dtype);
    args.loss = static_cast<Element*>(loss.mutable_data_ptr());
    set_stats(args, stats);
    return {loss, stats};
  }

  static std::tuple<Tensor, Tensor> two_way_loss(const Tensor& logits,
                                                 const Tensor& target LONGTAIL_TWO_WAY_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_TWO_WAY_VALUES);
    const auto outputs = new_outputs(args, logits);
    Device::two_way_loss(args, Pass::loss, logits);
    return outputs;
  }

  static Tensor two_way_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                      const Tensor& stats LONGTAIL_TWO_WAY_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_TWO_WAY_VALUES);
    set_grad_loss<Device>(args, grad_loss, logits);
    check(stats.dim() == 2 && stats.size(0) == args.rows && stats.size(1) == 4, "stats has shape ", shape_of(stats),
          ", expected [", args.rows, ", 4]");
    check_dtype(stats, "stats", accumulate_type(logits));
    Device::check_device(stats, "stats", logits);
    set_stats(args, stats);
    const Tensor grad = Device::new_gradient(logits);
    set_grad(args, grad);
    Device::two_way_loss(args, Pass::backward, logits);
    return grad;
  }

  static std::tuple<Tensor, Tensor> loss_and_grad_into(const Tensor& grad, const Tensor& grad_loss,
                                                       const Tensor& logits, const Tensor& target,
                                                       const TwoWayOptions& options) {
    Args args = with_options(logits, target, options);
    set_grad_loss<Device>(args, grad_loss, logits);
    const auto outputs = new_outputs(args, logits);
    set_grad(args, grad);
    Device::two_way_loss(args, Pass::loss_and_grad, logits);
    return outputs;
  }

  static std::tuple<Tensor, Tensor, Tensor> two_way_loss_and_grad(const Tensor& grad_loss, const Tensor& logits,
                                                                  const Tensor& target LONGTAIL_TWO_WAY_PARAMETERS) {
    Device::check_layout(logits, "logits");
    const Tensor grad = Device::new_gradient(logits);
    const auto [loss, stats] = loss_and_grad_into(grad, grad_loss, logits, target, LONGTAIL_TWO_WAY_VALUES);
    return {loss, stats, grad};
  }

  static std::tuple<Tensor, Tensor> two_way_loss_and_grad_(const Tensor& grad_loss, const Tensor& logits,
                                                           const Tensor& target LONGTAIL_TWO_WAY_PARAMETERS) {
    return loss_and_grad_into(logits, grad_loss, logits, target, LONGTAIL_TWO_WAY_VALUES);
  }

  template <typename Library>
  static void add_to(Library& library) {
    LONGTAIL_OPERATOR(TwoWayOps, two_way_loss);
    LONGTAIL_OPERATOR(TwoWayOps, two_way_loss_backward);
    LONGTAIL_OPERATOR(TwoWayOps, two_way_loss_and_grad);
    LONGTAIL_OPERATOR(TwoWayOps, two_way_loss_and_grad_);
  }
};

}  // namespace longtail
