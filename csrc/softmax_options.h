// The trailing arguments of the softmax operators, in schema order: the same on every device.
#pragma once

#include "checks.h"

namespace longtail {

struct SoftmaxOptions {
  const MaybeTensor &weight, &class_bias, &class_margin, &sample_weight;
  int64_t ignore_index;
  double label_smoothing, focal_gamma, complement_coefficient, cross_entropy_coefficient, scale, softcap, z_loss;
};

#define LONGTAIL_OPTIONS                                                                                  \
  const MaybeTensor &weight, const MaybeTensor &class_bias, const MaybeTensor &class_margin,              \
      const MaybeTensor &sample_weight, int64_t ignore_index, double label_smoothing, double focal_gamma, \
      double complement_coefficient, double cross_entropy_coefficient, double scale, double softcap, double z_loss
#define LONGTAIL_OPTION_VALUES                                                                   \
  SoftmaxOptions {                                                                               \
    weight, class_bias, class_margin, sample_weight, ignore_index, label_smoothing, focal_gamma, \
        complement_coefficient, cross_entropy_coefficient, scale, softcap, z_loss                \
  }

}  // namespace longtail
