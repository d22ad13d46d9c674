// From the operators' arguments to launches, with what the device is like.
#include "hierarchical_loss.cuh"
#include "kernels.h"
#include "means.cuh"
#include "scale_grad.cuh"
#include "sigmoid_loss.cuh"
#include "softmax_loss.cuh"
#include "two_way_loss.cuh"

namespace longtail {
namespace gpu {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Asked once: each question takes about a microsecond.
const Device& device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = devices.find(index);
  if (known != devices.end()) return known->second;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  return devices[index] = {10 * major + minor, attribute(cudaDevAttrMultiProcessorCount, index),
                           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                           attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index)};
}

}  // namespace

void softmax_loss(const SoftmaxLossArgs& args, Pass pass, int device, void* stream) {
  softmax_loss_launch(args, pass, softmax_plan_of(problem_of(args, pass), device_of(device)), stream);
}

void sigmoid_loss(const SigmoidLossArgs& args, Pass pass, int device, void* stream) {
  sigmoid_loss_launch(args, pass, plan_of(args, pass, device_of(device)), stream);
}

void hierarchical_loss(const HierarchicalLossArgs& args, Pass pass, int device, void* stream) {
  hierarchical_loss_launch(args, pass, hierarchical_plan_of(problem_of(args, pass), device_of(device)), stream);
}

void two_way_loss(const TwoWayLossArgs& args, Pass pass, int device, void* stream) {
  two_way_loss_launch(args, pass, plan_of(args, pass, device_of(device)), stream);
}

void scale_grad(const ScaleGradArgs& args, int device, void* stream) {
  scale_grad_launch(args, device_of(device).processors, stream);
}

void mean_denominator(const MeanDenominatorArgs& args, int device, void* stream) {
  mean_denominator_launch(args, mean_plan_of(args.rows, device_of(device)), stream);
}

void mean_loss(const MeanLossArgs& args, int device, void* stream) {
  mean_loss_launch(args, mean_plan_of(args.rows, device_of(device)), stream);
}

}  // namespace gpu
}  // namespace longtail
