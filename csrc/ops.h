// The operators of every device, as far as they are the same: those of the families stand in softmax_ops.h,
// sigmoid_ops.h, two_way_ops.h and hierarchical_ops.h, those that serve all in row_ops.h. A Device names the types of
// its arguments, and knows its limits, its memory and how its kernels start: csrc/cpu/ops.cpp, csrc/cuda/ops.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <tuple>

#include "checks.h"

namespace longtail {

inline ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype,
                              std::nullopt, like.device());
}

// Shape of the logits, contiguous.
inline Tensor new_like(const Tensor& logits, ScalarType dtype) {
  const int64_t n = logits.size(0), c = logits.size(1);
  return logits.dim() == 2 ? new_tensor(logits, {n, c}, dtype) : new_tensor(logits, {n, c, logits.size(2)}, dtype);
}

template <typename Device>
typename Device::Storage storage_of(const Tensor& logits) {
  for (const auto& [dtype, storage] : Device::kStorages) {
    if (logits.scalar_type() == dtype) return storage;
  }
  check(false, "logits have dtype ", torch::headeronly::toString(logits.scalar_type()), ", expected ",
        Device::kStorageNames);
  return {};
}

// The elements of an optional contiguous vector, null where it is absent.
template <typename Device>
const typename Device::Element* vector(const MaybeTensor& t, const char* name, int64_t length, const Tensor& logits) {
  if (t) Device::check_device(*t, name, logits);
  return static_cast<const typename Device::Element*>(vector_data(t, name, length, accumulate_type(logits)));
}

template <typename Args>
void set_logits(Args& args, const Tensor& logits, const Layout& layout) {
  args.rows = layout.rows;
  args.num_classes = layout.num_classes;
  args.pixels = layout.pixels;
  args.logits = logits.const_data_ptr();
  args.logits_stride = layout.stride;
  args.logits_class_stride = layout.class_stride;
}

// int64 [R]
template <typename Args>
void set_target(Args& args, const Tensor& target) {
  check_vector(target, "target", args.rows, ScalarType::Long);
  args.target = static_cast<const int64_t*>(target.const_data_ptr());
  args.target_stride = target.stride(0);
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& logits) {
  bool same = t.dim() == logits.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == logits.size(i);
  check(same, name, " has shape ", shape_of(t), ", expected ", shape_of(logits));
}

// A target for each element: of the logits' shape, and of their dtype or that of the arithmetic.
template <typename Args>
Layout set_dense_target(Args& args, const Tensor& target, const Tensor& logits) {
  check_same_shape(target, "target", logits);
  args.dense_is_wide = target.scalar_type() != logits.scalar_type();
  if (args.dense_is_wide) check_dtype(target, "target", accumulate_type(logits));
  const Layout layout = check_layout(target, "target");
  args.dense_target = target.const_data_ptr();
  args.dense_stride = layout.stride;
  return layout;
}

// [R]
template <typename Device, typename Args>
void set_grad_loss(Args& args, const Tensor& grad_loss, const Tensor& logits) {
  check_vector(grad_loss, "grad_loss", args.rows, accumulate_type(logits));
  Device::check_device(grad_loss, "grad_loss", logits);
  args.grad_loss = static_cast<const typename Device::Element*>(grad_loss.const_data_ptr());
  args.grad_loss_stride = grad_loss.stride(0);
}

template <typename Args>
void set_grad(Args& args, const Tensor& grad) {
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = grad.stride(0);
  args.grad_class_stride = grad.stride(1);
}

// What option lists, macros that are told the name of each option in turn, make of themselves.
#define LONGTAIL_VECTOR_FIELD(name, length) const MaybeTensor& name;
#define LONGTAIL_VECTOR_PARAMETER(name, length) , const MaybeTensor& name
#define LONGTAIL_SCALAR_FIELD(name, type) type name;
#define LONGTAIL_SCALAR_PARAMETER(name, type) , type name
#define LONGTAIL_NUMBER_PARAMETER(name) , double name
#define LONGTAIL_VALUE(name, ...) name,
#define LONGTAIL_SET_VECTOR(name, length) args.name = vector<Device>(o.name, #name, args.length, logits);

// A static function of a struct, as a kernel of the operator of that name.
#define LONGTAIL_OPERATOR(Ops, name) library.impl(#name, TORCH_BOX(&Ops<Device>::name))

}  // namespace longtail
