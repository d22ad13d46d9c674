// torch.ops.longtail.hierarchical_loss and its gradients, on any Device.
#pragma once

#include "hierarchical_args.h"
#include "ops.h"

namespace longtail {

// The trailing arguments, in schema order.
struct HierarchicalOptions {
  const Tensor &path, &node_begin, &node_end, &node_weight;
  const MaybeTensor &order, &position, &weight, &class_bias, &sample_weight;
  int64_t ignore_index;
};

#define LONGTAIL_HIERARCHICAL_PARAMETERS                                                                               \
  , const Tensor &path, const Tensor &node_begin, const Tensor &node_end, const Tensor &node_weight,                   \
      const MaybeTensor &order, const MaybeTensor &position, const MaybeTensor &weight, const MaybeTensor &class_bias, \
      const MaybeTensor &sample_weight, int64_t ignore_index
#define LONGTAIL_HIERARCHICAL_VALUES                                                                          \
  HierarchicalOptions {                                                                                       \
    path, node_begin, node_end, node_weight, order, position, weight, class_bias, sample_weight, ignore_index \
  }

template <typename Device>
struct HierarchicalOps {
  using Args = typename Device::HierarchicalLossArgs;
  using Pass = typename Device::Pass;
  using Element = typename Device::Element;

  // A contiguous table of the tree; its values are the kernels' to check.
  static const int32_t* table(const MaybeTensor& t, const char* name, int64_t length, const Tensor& logits) {
    if (t) Device::check_device(*t, name, logits);
    return static_cast<const int32_t*>(vector_data(t, name, length, ScalarType::Int));
  }

  static void set_path(Args& args, const Tensor& path, const Tensor& logits) {
    check(path.dim() == 2 && path.size(0) >= args.num_classes && path.size(1) > 0, "path has shape ", shape_of(path),
          ", expected [at least ", args.num_classes, ", L]");
    check(path.size(1) <= kDeepestTree, "path has ", path.size(1), " nodes, expected at most ", kDeepestTree);
    check_dtype(path, "path", ScalarType::Int);
    check(path.is_contiguous(), "path is not contiguous");
    Device::check_device(path, "path", logits);
    args.tree_classes = path.size(0);
    args.depth = static_cast<int>(path.size(1));
    args.path = static_cast<const int32_t*>(path.const_data_ptr());
  }

  static Args with_options(const Tensor& logits, const Tensor& target, const HierarchicalOptions& o) {
    Args args = {};
    check(logits.dim() == 2, "logits have shape ", shape_of(logits), ", expected [N, C]");
    set_logits(args, logits, Device::check_layout(logits, "logits"));
    args.storage = storage_of<Device>(logits);
    Device::check_device(target, "target", logits);
    set_target(args, target);
    set_path(args, o.path, logits);
    args.nodes = o.node_begin.numel();
    args.node_begin = table(o.node_begin, "node_begin", args.nodes, logits);
    args.node_end = table(o.node_end, "node_end", args.nodes, logits);
    args.node_weight = vector<Device>(o.node_weight, "node_weight", args.nodes, logits);
    args.order = table(o.order, "order", args.num_classes, logits);
    args.position = table(o.position, "position", args.num_classes, logits);
    check(o.order.has_value() == o.position.has_value(), "one of order and position is None, expected both or none");
    args.weight = vector<Device>(o.weight, "weight", args.tree_classes, logits);
    args.class_bias = vector<Device>(o.class_bias, "class_bias", args.num_classes, logits);
    args.sample_weight = vector<Device>(o.sample_weight, "sample_weight", args.rows, logits);
    args.ignore_index = o.ignore_index;
    return args;
  }

  static std::tuple<Tensor, Tensor> new_outputs(Args& args, const Tensor& logits) {
    const ScalarType dtype = accumulate_type(logits);
    const Tensor loss = new_tensor(logits, {args.rows}, dtype);
    const Tensor stats = new_tensor(logits, {args.rows, 2 * args.depth + 1}, dtype);
    args.loss = static_cast<Element*>(loss.mutable_data_ptr());
    args.stats = static_cast<Element*>(stats.mutable_data_ptr());
    return {loss, stats};
  }

  static std::tuple<Tensor, Tensor> hierarchical_loss(const Tensor& logits,
                                                      const Tensor& target LONGTAIL_HIERARCHICAL_PARAMETERS) {
    Args args = with_options(logits, target, LONGTAIL_HIERARCHICAL_VALUES);
    const auto outputs = new_outputs(args, logits);
    Device::hierarchical_loss(args, Pass::loss, logits);
    return outputs;
  }

  static void backward_into(const Tensor& grad, const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                            const Tensor& stats, const HierarchicalOptions& options) {
    Args args = with_options(logits, target, options);
    set_grad_loss<Device>(args, grad_loss, logits);
    check(stats.dim() == 2 && stats.size(0) == args.rows && stats.size(1) == 2 * args.depth + 1, "stats has shape ",
          shape_of(stats), ", expected [", args.rows, ", ", 2 * args.depth + 1, "]");
    check_dtype(stats, "stats", accumulate_type(logits));
    check(stats.is_contiguous(), "stats is not contiguous");
    Device::check_device(stats, "stats", logits);
    args.stats = static_cast<Element*>(const_cast<void*>(stats.const_data_ptr()));
    set_grad(args, grad);
    Device::hierarchical_loss(args, Pass::backward, logits);
  }

  static Tensor hierarchical_loss_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                           const Tensor& stats LONGTAIL_HIERARCHICAL_PARAMETERS) {
    check(logits.dim() == 2, "logits have shape ", shape_of(logits), ", expected [N, C]");
    const Tensor grad = Device::new_gradient(logits);
    backward_into(grad, grad_loss, logits, target, stats, LONGTAIL_HIERARCHICAL_VALUES);
    return grad;
  }

  static void hierarchical_loss_backward_(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                          const Tensor& stats LONGTAIL_HIERARCHICAL_PARAMETERS) {
    backward_into(logits, grad_loss, logits, target, stats, LONGTAIL_HIERARCHICAL_VALUES);
  }

  static std::tuple<Tensor, Tensor> loss_and_grad_into(const Tensor& grad, const Tensor& grad_loss,
                                                       const Tensor& logits, const Tensor& target,
                                                       const HierarchicalOptions& options) {
    Args args = with_options(logits, target, options);
    set_grad_loss<Device>(args, grad_loss, logits);
    const auto outputs = new_outputs(args, logits);
    set_grad(args, grad);
    Device::hierarchical_loss(args, Pass::loss_and_grad, logits);
    return outputs;
  }

  static std::tuple<Tensor, Tensor, Tensor> hierarchical_loss_and_grad(
      const Tensor& grad_loss, const Tensor& logits, const Tensor& target LONGTAIL_HIERARCHICAL_PARAMETERS) {
    check(logits.dim() == 2, "logits have shape ", shape_of(logits), ", expected [N, C]");
    const Tensor grad = Device::new_gradient(logits);
    const auto [loss, stats] = loss_and_grad_into(grad, grad_loss, logits, target, LONGTAIL_HIERARCHICAL_VALUES);
    return {loss, stats, grad};
  }

  static std::tuple<Tensor, Tensor> hierarchical_loss_and_grad_(const Tensor& grad_loss, const Tensor& logits,
                                                                const Tensor& target LONGTAIL_HIERARCHICAL_PARAMETERS) {
    return loss_and_grad_into(logits, grad_loss, logits, target, LONGTAIL_HIERARCHICAL_VALUES);
  }

  template <typename Library>
  static void add_to(Library& library) {
    LONGTAIL_OPERATOR(HierarchicalOps, hierarchical_loss);
    LONGTAIL_OPERATOR(HierarchicalOps, hierarchical_loss_backward);
    LONGTAIL_OPERATOR(HierarchicalOps, hierarchical_loss_backward_);
    LONGTAIL_OPERATOR(HierarchicalOps, hierarchical_loss_and_grad);
    LONGTAIL_OPERATOR(HierarchicalOps, hierarchical_loss_and_grad_);
  }
};

}  // namespace longtail
