// The operators that serve every family, on any Device.
#pragma once

#include "ops.h"
#include "row_args.h"

namespace longtail {

template <typename Device>
struct RowOps {
  static void scale_grad_(const Tensor& grad, const Tensor& grad_loss, const MaybeTensor& target,
                          int64_t ignore_index) {
    const Layout layout = Device::check_layout(grad, "grad");
    typename Device::ScaleGradArgs args = {};
    args.rows = layout.rows;
    args.num_classes = layout.num_classes;
    args.pixels = layout.pixels;
    args.grad = grad.mutable_data_ptr();
    args.grad_stride = layout.stride;
    args.grad_class_stride = layout.class_stride;
    set_grad_loss<Device>(args, grad_loss, grad);
    if (target) set_target(args, *target);
    if (target) Device::check_device(*target, "target", grad);
    args.ignore_index = ignore_index;
    args.storage = storage_of<Device>(grad);
    Device::scale_grad(args, grad);
  }

  // int64 without weights, else of their dtype.
  static Tensor mean_denominator(const Tensor& target, const MaybeTensor& weight, int64_t ignore_index,
                                 int64_t num_classes) {
    MeanDenominatorArgs args = {};
    args.rows = target.dim() == 1 ? target.size(0) : -1;
    args.num_classes = num_classes;
    set_target(args, target);
    args.ignore_index = ignore_index;
    const ScalarType dtype = weight ? weight->scalar_type() : ScalarType::Long;
    check(!weight || dtype == ScalarType::Float || dtype == ScalarType::Double, "weight has dtype ",
          torch::headeronly::toString(dtype), ", expected float32 or float64");
    if (weight) Device::check_device(*weight, "weight", target);
    args.weight = vector_data(weight, "weight", num_classes, dtype);
    args.weight_size = weight ? static_cast<int>(weight->element_size()) : 0;
    const Tensor result = new_tensor(target, {}, dtype);
    args.result = result.mutable_data_ptr();
    Device::mean_denominator(args, target);
    return result;
  }

  static std::tuple<Tensor, Tensor> mean_loss(const Tensor& loss, const Tensor& denominator) {
    check(loss.dim() == 1 && denominator.dim() == 0, "loss of shape ", shape_of(loss), " and denominator of shape ",
          shape_of(denominator), ", expected [N] and []");
    const ScalarType dtype = loss.scalar_type(), counted = denominator.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, "loss has dtype ",
          torch::headeronly::toString(dtype), ", expected float32 or float64");
    check(counted == ScalarType::Long || counted == ScalarType::Float || counted == ScalarType::Double,
          "denominator has dtype ", torch::headeronly::toString(counted), ", expected int64, float32 or float64");
    Device::check_device(denominator, "denominator", loss);
    MeanLossArgs args = {};
    args.rows = loss.size(0);
    args.loss = loss.const_data_ptr();
    args.loss_stride = loss.stride(0);
    args.loss_size = static_cast<int>(loss.element_size());
    args.denominator_type = counted == ScalarType::Long    ? Counted::integers
                            : counted == ScalarType::Float ? Counted::float32
                                                           : Counted::float64;
    args.denominator = denominator.const_data_ptr();
    const Tensor mean = new_tensor(loss, {}, dtype), divisor = new_tensor(loss, {}, dtype);
    args.mean = mean.mutable_data_ptr();
    args.divisor = divisor.mutable_data_ptr();
    Device::mean_loss(args, loss);
    return {mean, divisor};
  }

  template <typename Library>
  static void add_to(Library& library) {
    LONGTAIL_OPERATOR(RowOps, scale_grad_);
    LONGTAIL_OPERATOR(RowOps, mean_denominator);
  }
};

}  // namespace longtail
