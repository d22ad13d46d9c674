// What the operators call: launches on the current device, on a cudaStream_t of it. Nothing is allocated or waited for.
#pragma once

#include "hierarchical_loss.h"
#include "scale_grad.h"
#include "sigmoid_loss.h"
#include "softmax_loss.h"
#include "two_way_loss.h"

namespace longtail {
namespace gpu {

void softmax_loss(const SoftmaxLossArgs& args, Pass pass, int device, void* stream);
void sigmoid_loss(const SigmoidLossArgs& args, Pass pass, int device, void* stream);
void hierarchical_loss(const HierarchicalLossArgs& args, Pass pass, int device, void* stream);
void two_way_loss(const TwoWayLossArgs& args, Pass pass, int device, void* stream);

// Multiplies the rows of grad by their factors; where they are 1, nothing is touched.
void scale_grad(const ScaleGradArgs& args, int device, void* stream);

void mean_denominator(const MeanDenominatorArgs& args, int device, void* stream);
void mean_loss(const MeanLossArgs& args, int device, void* stream);

}  // namespace gpu
}  // namespace longtail
