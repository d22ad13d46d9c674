// The trailing arguments of the softmax operators, in schema order: the same on every device.
#pragma once

#include "checks.h"
#include "loss_math.h"

namespace longtail {

struct SoftmaxOptions {
  const MaybeTensor &weight, &class_bias, &class_margin, &sample_weight;
  int64_t ignore_index;
  LossOptions<double> numbers;
};

#define LONGTAIL_NUMBER_PARAMETER(name) , double name
#define LONGTAIL_NUMBER_VALUE(name) name,
#define LONGTAIL_OPTIONS                                                                     \
  const MaybeTensor &weight, const MaybeTensor &class_bias, const MaybeTensor &class_margin, \
      const MaybeTensor &sample_weight, int64_t ignore_index LONGTAIL_LOSS_NUMBERS(LONGTAIL_NUMBER_PARAMETER)
#define LONGTAIL_OPTION_VALUES                                                                                      \
  SoftmaxOptions {                                                                                                  \
    weight, class_bias, class_margin, sample_weight, ignore_index, { LONGTAIL_LOSS_NUMBERS(LONGTAIL_NUMBER_VALUE) } \
  }

}  // namespace longtail
