// The trailing arguments of the sigmoid operators, in schema order: the same on every device.
#pragma once

#include "checks.h"

namespace longtail {

struct SigmoidOptions {
  const MaybeTensor &weight, &pos_weight, &sample_weight;
  bool class_weight_by_target;
  std::optional<int64_t> ignore_index;
  std::optional<double> alpha;
  double gamma;

  // What multiplies the terms of y = 1 and y = 0.
  double alpha_positive() const { return alpha.value_or(1.0); }
  double alpha_negative() const { return alpha ? 1.0 - *alpha : 1.0; }
};

#define LONGTAIL_OPTIONS                                                                      \
  const MaybeTensor &weight, const MaybeTensor &pos_weight, const MaybeTensor &sample_weight, \
      bool class_weight_by_target, std::optional<int64_t> ignore_index, std::optional<double> alpha, double gamma
#define LONGTAIL_OPTION_VALUES \
  SigmoidOptions { weight, pos_weight, sample_weight, class_weight_by_target, ignore_index, alpha, gamma }

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& logits) {
  bool same = t.dim() == logits.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == logits.size(i);
  check(same, name, " has shape ", shape_of(t), ", expected ", shape_of(logits));
}

}  // namespace longtail
