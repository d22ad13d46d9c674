// torch.ops.longtail.softmax_loss, its gradients and the steps of one shard of the classes, on any Device.
#pragma once

#include "ops.h"
#include "softmax_args.h"

namespace longtail {

// The trailing arguments, in schema order.
struct SoftmaxOptions {
  LONGTAIL_SOFTMAX_VECTORS(LONGTAIL_VECTOR_FIELD)
  int64_t ignore_index;
  LossOptions<double> numbers;
  bool entropy;
};

#define LONGTAIL_SOFTMAX_PARAMETERS                    \
  LONGTAIL_SOFTMAX_VECTORS(LONGTAIL_VECTOR_PARAMETER), \
      int64_t ignore_index LONGTAIL_LOSS_NUMBERS(LONGTAIL_NUMBER_PARAMETER), bool entropy
#define LONGTAIL_SOFTMAX_VALUES                                                                             \
  SoftmaxOptions {                                                                                          \
    LONGTAIL_SOFTMAX_VECTORS(LONGTAIL_VALUE) ignore_index, {LONGTAIL_LOSS_NUMBERS(LONGTAIL_VALUE)}, entropy \
  }

template <typename Device>
struct SoftmaxOps {
  using Args = typename Device::SoftmaxLossArgs;
  using Pass = typename Device::Pass;
  using Element = typename Device::Element;

  static bool is_dense(const Tensor& target) { return target.scalar_type() != ScalarType::Long; }

  // `dense`: whether a target for each class will do, too.
  static Args args_of(const Tensor& logits, const Tensor& target, bool dense = false) {
    Args args = {};
    set_logits(args, logits, Device::check_layout(logits, "logits"));
    Device::check_device(target, "target", logits);
    args.storage = storage_of<Device>(logits);
    args.dense = dense && target.dim() == logits.dim() && is_dense(target);
    if (!args.dense) {
      set_target(args, target);
      return args;
    }
    check_rows(logits);
    set_dense_target(args, target, logits);
    return args;
  }

  static void check_no_class(const SoftmaxOptions& o) {
    check(!o.class_margin, "class_margin needs class indices as targets");
    check(!o.target_scale, "target_scale needs class indices as targets");
    check(!o.class_mitigation, "class_mitigation needs class indices as targets");
    check(o.numbers.compensation == 0.0, "compensation needs class indices as targets");
    check(o.numbers.focal_gamma == 0.0, "focal_gamma needs class indices as targets");
    check(o.numbers.complement_coefficient == 0.0, "complement_coefficient needs class indices as targets");
    check(o.numbers.cross_entropy_coefficient == 1.0, "cross_entropy_coefficient needs class indices as targets");
  }

  static Args with_options(const Tensor& logits, const Tensor& target, const SoftmaxOptions& o, bool dense = false) {
    Args args = args_of(logits, target, dense);
    if (args.dense) check_no_class(o);
    LONGTAIL_SOFTMAX_VECTORS(LONGTAIL_SET_VECTOR)
    args.ignore_index = o.ignore_index;
    args.options = generic::convert<typename Device::Number>(o.numbers);
    args.entropy = o.entropy;
    return args;
  }

  // [R, columns] in the arithmetic's dtype; contiguous, unless `strided` will do.
  static const Element* check_columns(const Args& args, const Tensor& t, const char* name, int64_t columns,
                                      const Tensor& logits, bool strided) {
    check(t.dim() == 2 && t.size(0) == args.rows && t.size(1) == columns, name, " has shape ", shape_of(t),
          ", expected [", args.rows, ", ", columns, "]");
    check_dtype(t, name, accumulate_type(logits));
    check(strided || t.is_contiguous(), name, " is not contiguous");
    Device::check_device(t, name, logits);
    return static_cast<const Element*>(t.const_data_ptr());
  }

  static const Element* check_stats(const Args& args, const Tensor& stats, const char* name, const Tensor& logits,
                                    bool strided) {
    return check_columns(args, stats, name, 5, logits, strided);
  }

  static void set_stats(Args& args, const Tensor& stats) {
    args.stats = static_cast<Element*>(const_cast<void*>(stats.const_data_ptr()));
    args.stats_stride = stats.stride(0);
    args.stats_column_stride = stats.stride(1);
  }

  // Where backward finds the statistics anew and needs none.
  static bool has_few_classes(const Tensor& logits) {
    return 0 < logits.size(1) && logits.size(1) <= Device::kFewClasses;
  }

  // Of images column by column: neighbours that are pixels write each column together. `absent`: [0, 5], null in args.
  static std::tuple<Tensor, Tensor> new_outputs(Args& args, const Tensor& logits, bool absent = false) {
    const ScalarType dtype = accumulate_type(logits);
    const int64_t rows = absent ? 0 : args.rows;
    const Tensor loss = new_tensor(logits, {args.rows}, dtype);
    const Tensor stats = logits.dim() == 3 ? torch::stable::transpose(new_tensor(logits, {5, rows}, dtype), 0, 1)
                                           : new_tensor(logits, {rows, 5}, dtype);
    args.loss = static_cast<Element*>(loss.mutable_data_ptr());
    set_stats(args, stats);
    if (absent) args.stats = nullptr;
    return {loss, stats};
  }

  static std::tuple<Tensor, Tensor> loss_of(Args& args, const Tensor& logits, const MaybeTensor& weight,
                                            bool for_backward) {
    const auto outputs = new_outputs(args, logits, for_backward && !args.dense && has_few_classes(logits));
    Device::softmax_loss(args, Pass::loss, logits, weight);
    return outputs;
  }

  static std::tuple<Tensor, Tensor> softmax_loss(const Tensor& logits,
                                                 const Tensor& target LONGTAIL_SOFTMAX_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_SOFTMAX_VALUES, true);
    return loss_of(args, logits, weight, false);
  }

  static Tensor softmax_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                      const Tensor& stats LONGTAIL_SOFTMAX_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_SOFTMAX_VALUES, true);
    const bool absent = !args.dense && stats.dim() == 2 && stats.size(0) == 0 && has_few_classes(logits);
    if (!absent) check_stats(args, stats, "stats", logits, logits.dim() == 3);
    set_grad_loss<Device>(args, grad_loss, logits);
    const Tensor grad = Device::new_gradient(logits);
    set_stats(args, stats);
    set_grad(args, grad);
    Device::softmax_loss(args, Pass::backward, logits, weight);
    return grad;
  }

  static std::tuple<Tensor, Tensor, Tensor> softmax_loss_and_grad(const Tensor& grad_loss, const Tensor& logits,
                                                                  const Tensor& target LONGTAIL_SOFTMAX_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_SOFTMAX_VALUES);
    set_grad_loss<Device>(args, grad_loss, logits);
    const auto outputs = new_outputs(args, logits);
    const Tensor grad = Device::new_gradient(logits);
    set_grad(args, grad);
    Device::softmax_loss(args, Pass::loss_and_grad, logits, weight);
    return std::tuple_cat(outputs, std::tuple(grad));
  }

  static std::tuple<Tensor, Tensor> softmax_loss_and_grad_(const Tensor& grad_loss, const Tensor& logits,
                                                           const Tensor& target LONGTAIL_SOFTMAX_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_SOFTMAX_VALUES);
    set_grad_loss<Device>(args, grad_loss, logits);
    const auto outputs = new_outputs(args, logits);
    set_grad(args, logits);
    Device::softmax_loss(args, Pass::loss_and_grad, logits, weight);
    return outputs;
  }

  // ---- One shard of the classes: [N, C] alone ----

  static void check_rows(const Tensor& logits) {
    check(logits.dim() == 2, "logits have shape ", shape_of(logits), ", expected [N, C]");
  }

  // What of the options the steps of a shard take after `weight`, `class_bias` and, to accumulate, `class_margin`.
  struct OfLogits {
    const MaybeTensor &class_scale, &target_scale, &class_mitigation, &target_terms;
    int64_t ignore_index;
    double scale, softcap, compensation;
  };

  static Args shard_args(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                         const MaybeTensor& class_bias, const OfLogits& o) {
    check_rows(logits);
    Args args = args_of(logits, target);
    args.weight = vector<Device>(weight, "weight", args.num_classes, logits);
    args.class_bias = vector<Device>(class_bias, "class_bias", args.num_classes, logits);
    args.class_scale = vector<Device>(o.class_scale, "class_scale", args.num_classes, logits);
    args.target_scale = vector<Device>(o.target_scale, "target_scale", args.num_classes, logits);
    args.class_mitigation = vector<Device>(o.class_mitigation, "class_mitigation", args.num_classes, logits);
    if (o.target_terms) args.target_terms = check_columns(args, *o.target_terms, "target_terms", 3, logits, false);
    args.ignore_index = o.ignore_index;
    args.options.scale = static_cast<typename Device::Number>(o.scale);
    args.options.softcap = static_cast<typename Device::Number>(o.softcap);
    args.options.compensation = static_cast<typename Device::Number>(o.compensation);
    return args;
  }

  static Tensor softmax_loss_accumulate(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                        const MaybeTensor& class_bias, const MaybeTensor& class_margin,
                                        const MaybeTensor& class_scale, const MaybeTensor& target_scale,
                                        const MaybeTensor& class_mitigation, const MaybeTensor& target_terms,
                                        int64_t ignore_index, bool label_smoothing, double scale, double softcap,
                                        double compensation) {
    const OfLogits of_logits = {class_scale,  target_scale, class_mitigation, target_terms,
                                ignore_index, scale,        softcap,          compensation};
    Args args = shard_args(logits, target, weight, class_bias, of_logits);
    args.class_margin = vector<Device>(class_margin, "class_margin", args.num_classes, logits);
    args.options.label_smoothing = label_smoothing;
    const Tensor stats = new_tensor(logits, {args.rows, 5}, accumulate_type(logits));
    set_stats(args, stats);
    Device::softmax_loss(args, Pass::accumulate, logits, std::nullopt);
    return stats;
  }

  static void apply_to(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& row_grad,
                       const MaybeTensor& weight, const MaybeTensor& class_bias, const OfLogits& of_logits) {
    Args args = shard_args(logits, target, weight, class_bias, of_logits);
    args.row_grad = check_stats(args, row_grad, "row_grad", logits, false);
    set_grad(args, grad);
    Device::softmax_loss(args, Pass::apply, logits, std::nullopt);
  }

  static Tensor softmax_loss_apply(const Tensor& logits, const Tensor& target, const Tensor& row_grad,
                                   const MaybeTensor& weight, const MaybeTensor& class_bias,
                                   const MaybeTensor& class_scale, const MaybeTensor& target_scale,
                                   const MaybeTensor& class_mitigation, const MaybeTensor& target_terms,
                                   int64_t ignore_index, double scale, double softcap, double compensation) {
    check_rows(logits);
    const Tensor grad = Device::new_gradient(logits);
    apply_to(grad, logits, target, row_grad, weight, class_bias,
             {class_scale, target_scale, class_mitigation, target_terms, ignore_index, scale, softcap, compensation});
    return grad;
  }

  static void softmax_loss_apply_(const Tensor& logits, const Tensor& target, const Tensor& row_grad,
                                  const MaybeTensor& weight, const MaybeTensor& class_bias,
                                  const MaybeTensor& class_scale, const MaybeTensor& target_scale,
                                  const MaybeTensor& class_mitigation, const MaybeTensor& target_terms,
                                  int64_t ignore_index, double scale, double softcap, double compensation) {
    apply_to(logits, logits, target, row_grad, weight, class_bias,
             {class_scale, target_scale, class_mitigation, target_terms, ignore_index, scale, softcap, compensation});
  }

  template <typename Library>
  static void add_to(Library& library) {
    LONGTAIL_OPERATOR(SoftmaxOps, softmax_loss);
    LONGTAIL_OPERATOR(SoftmaxOps, softmax_loss_backward);
    LONGTAIL_OPERATOR(SoftmaxOps, softmax_loss_and_grad);
    LONGTAIL_OPERATOR(SoftmaxOps, softmax_loss_and_grad_);
    LONGTAIL_OPERATOR(SoftmaxOps, softmax_loss_accumulate);
    LONGTAIL_OPERATOR(SoftmaxOps, softmax_loss_apply);
    LONGTAIL_OPERATOR(SoftmaxOps, softmax_loss_apply_);
  }
};

}  // namespace longtail
