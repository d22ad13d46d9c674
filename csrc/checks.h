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
using MaybeTensor = std::optional<Tensor>;

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

// How the elements of [N, C] or [N, C, P] lie in memory. A row is one softmax: N of them, or N * P.
struct Layout {
  int64_t rows, num_classes;
  int64_t pixels;  // P, or 0 for [N, C]
  int64_t stride, class_stride;
};

// [N, C] with contiguous classes, or [N, C, P] with contiguous pixels; nothing overlaps.
inline Layout check_layout(const Tensor& t, const char* name) {
  check(t.dim() == 2 || t.dim() == 3, name, " has shape ", shape_of(t), ", expected [N, C] or [N, C, P]");
  const int64_t n = t.size(0), c = t.size(1), last = t.dim() - 1;
  check(t.size(last) <= 1 || t.stride(last) == 1, name, " has last stride ", t.stride(last), ", expected 1");
  if (t.dim() == 2) {
    check(n <= 1 || t.stride(0) >= c, name, " has row stride ", t.stride(0), ", expected at least ", c);
    return {n, c, 0, t.stride(0), 1};
  }
  const int64_t pixels = t.size(2), image = (c - 1) * t.stride(1) + pixels;
  check(c <= 1 || t.stride(1) >= pixels, name, " has class stride ", t.stride(1), ", expected at least ", pixels);
  check(n <= 1 || t.stride(0) >= image, name, " has image stride ", t.stride(0), ", expected at least ", image);
  check(c < (int64_t(1) << 24), name, " has ", c, " classes, expected fewer than 2^24 over images");
  return {n * pixels, c, pixels, t.stride(0), t.stride(1)};
}

inline int64_t row_count(const Tensor& logits) { return logits.size(0) * (logits.dim() == 3 ? logits.size(2) : 1); }

// The data of an optional contiguous vector, null where it is absent.
inline const void* vector_data(const MaybeTensor& t, const char* name, int64_t length, ScalarType dtype) {
  if (!t) return nullptr;
  check_vector(*t, name, length, dtype);
  check(length <= 1 || t->stride(0) == 1, name, " has stride ", t->stride(0), ", expected 1");
  return t->const_data_ptr();
}

}  // namespace longtail
