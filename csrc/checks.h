// Checks at the boundary of the operators: a wrong argument becomes an exception with a readable text, never a crash.
// Python's wrappers check what people pass; these protect callers of torch.ops.longtail.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace longtail {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  text << "longtail: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
  check(t.scalar_type() == expected, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", expected ",
        torch::headeronly::toString(expected));
}

inline void check_vector(const Tensor& t, const char* name, int64_t length, ScalarType dtype) {
  check(t.dim() == 1 && t.size(0) == length, name, " has shape ", shape_of(t), ", expected [", length, "]");
  check_dtype(t, name, dtype);
}

// [N, C] with the classes contiguous and rows that do not overlap.
inline void check_rows(const Tensor& t, const char* name) {
  check(t.dim() == 2, name, " has shape ", shape_of(t), ", expected [N, C]");
  check(t.size(1) <= 1 || t.stride(1) == 1, name, " has class stride ", t.stride(1), ", expected 1");
  check(t.size(0) <= 1 || t.stride(0) >= t.size(1), name, " has row stride ", t.stride(0), ", expected at least ",
        t.size(1));
}

// The data of an optional contiguous vector, null where it is absent.
inline const void* vector_data(const std::optional<Tensor>& t, const char* name, int64_t length, ScalarType dtype) {
  if (!t) return nullptr;
  check_vector(*t, name, length, dtype);
  check(length <= 1 || t->stride(0) == 1, name, " has stride ", t->stride(0), ", expected 1");
  return t->const_data_ptr();
}

}  // namespace longtail
