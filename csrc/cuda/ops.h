// What the operators of every family share: types, checks, allocation, and where a launch goes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace longtail {
namespace gpu {

inline Storage storage_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      check(false, "logits have dtype ", torch::headeronly::toString(logits.scalar_type()),
            ", expected float32, bfloat16 or float16");
      return Storage::float32;
  }
}

// [N, C] or [N, C, P].
inline Layout check_logits(const Tensor& t, const char* name) {
  const Layout layout = check_layout(t, name);
  check(layout.num_classes < (int64_t(1) << 30), name, " has ", layout.num_classes,
        " classes, expected fewer than 2^30");
  return layout;
}

inline void check_device(const Tensor& t, const char* name, const Tensor& logits) {
  check(t.is_cuda() && t.get_device_index() == logits.get_device_index(), name,
        " is on another device than the logits, CUDA device ", logits.get_device_index());
}

inline const float* vector(const MaybeTensor& t, const char* name, int64_t length, const Tensor& logits) {
  if (t) check_device(*t, name, logits);
  return static_cast<const float*>(vector_data(t, name, length, ScalarType::Float));
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype,
                              std::nullopt, like.device());
}

// Contiguous, of the logits' shape.
inline Tensor new_like(const Tensor& logits, ScalarType dtype) {
  const int64_t n = logits.size(0), c = logits.size(1);
  return logits.dim() == 2 ? new_tensor(logits, {n, c}, dtype) : new_tensor(logits, {n, c, logits.size(2)}, dtype);
}

// A device's current stream, with the device made current for as long as this lives.
struct Launch {
  explicit Launch(const Tensor& t) : device(t.get_device_index()), guard(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }
  int device;
  void* stream = nullptr;
  torch::stable::accelerator::DeviceGuard guard;
};

}  // namespace gpu
}  // namespace longtail
