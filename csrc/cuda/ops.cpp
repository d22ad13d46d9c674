// The operators of CUDA: launches on the current stream of the tensors' device.
// Python owns the schemas of the namespace longtail_cuda and calls these by way of torch.ops.longtail.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "../hierarchical_ops.h"
#include "../row_ops.h"
#include "../sigmoid_ops.h"
#include "../softmax_ops.h"
#include "../two_way_ops.h"
#include "kernels.h"

namespace longtail {
namespace gpu {
namespace {

// A device's current stream, with the device made current for as long as this lives.
struct Launch {
  explicit Launch(const Tensor& t) : device(t.get_device_index()), guard(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }
  int device;
  void* stream = nullptr;
  torch::stable::accelerator::DeviceGuard guard;
};

struct Cuda {
  using Storage = gpu::Storage;
  using Pass = gpu::Pass;
  using SoftmaxLossArgs = gpu::SoftmaxLossArgs;
  using SigmoidLossArgs = gpu::SigmoidLossArgs;
  using HierarchicalLossArgs = gpu::HierarchicalLossArgs;
  using TwoWayLossArgs = gpu::TwoWayLossArgs;
  using ScaleGradArgs = gpu::ScaleGradArgs;
  using Element = float;
  using Number = float;
  static constexpr std::pair<ScalarType, Storage> kStorages[] = {{ScalarType::Float, Storage::float32},
                                                                 {ScalarType::BFloat16, Storage::bfloat16},
                                                                 {ScalarType::Half, Storage::float16}};
  static constexpr const char* kStorageNames = "float32, bfloat16 or float16";
  static constexpr int64_t kFewClasses = 0;

  static Layout check_layout(const Tensor& t, const char* name) {
    const Layout layout = longtail::check_layout(t, name);
    check(layout.num_classes < (int64_t(1) << 30), name, " has ", layout.num_classes,
          " classes, expected fewer than 2^30");
    return layout;
  }

  static void check_device(const Tensor& t, const char* name, const Tensor& logits) {
    check(t.is_cuda() && t.get_device_index() == logits.get_device_index(), name,
          " is on another device than the logits, CUDA device ", logits.get_device_index());
  }

  static Tensor new_gradient(const Tensor& logits) { return new_like(logits, logits.scalar_type()); }

  static void softmax_loss(SoftmaxLossArgs& args, Pass pass, const Tensor& logits, const MaybeTensor& weight) {
    if (args.rows == 0) return;
    const Launch on(logits);
    Tensor weight_sum;
    if (weight && args.options.label_smoothing != 0.0f) {
      weight_sum = torch::stable::sum(*weight);
      args.weight_sum = static_cast<const float*>(weight_sum.const_data_ptr());
    }
    if (pass == Pass::apply) args.options.label_smoothing = 1.0f;  // row_grad says of which rows
    gpu::softmax_loss(args, pass, on.device, on.stream);
  }

  static void sigmoid_loss(const SigmoidLossArgs& args, Pass pass, const Tensor& logits) {
    if (args.rows == 0) return;
    const Launch on(logits);
    gpu::sigmoid_loss(args, pass, on.device, on.stream);
  }

  static void hierarchical_loss(const HierarchicalLossArgs& args, Pass pass, const Tensor& logits) {
    if (args.rows == 0) return;
    const Launch on(logits);
    gpu::hierarchical_loss(args, pass, on.device, on.stream);
  }

  static void two_way_loss(const TwoWayLossArgs& args, Pass pass, const Tensor& logits) {
    if (args.rows == 0) return;
    const Launch on(logits);
    gpu::two_way_loss(args, pass, on.device, on.stream);
  }

  static void scale_grad(const ScaleGradArgs& args, const Tensor& grad) {
    const Launch on(grad);
    gpu::scale_grad(args, on.device, on.stream);
  }

  static void mean_denominator(const MeanDenominatorArgs& args, const Tensor& target) {
    const Launch on(target);
    gpu::mean_denominator(args, on.device, on.stream);
  }

  static void mean_loss(const MeanLossArgs& args, const Tensor& loss) {
    const Launch on(loss);
    gpu::mean_loss(args, on.device, on.stream);
  }
};

}  // namespace
}  // namespace gpu
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cuda, CUDA, library) {
  longtail::SoftmaxOps<longtail::gpu::Cuda>::add_to(library);
  longtail::SigmoidOps<longtail::gpu::Cuda>::add_to(library);
  longtail::HierarchicalOps<longtail::gpu::Cuda>::add_to(library);
  longtail::TwoWayOps<longtail::gpu::Cuda>::add_to(library);
  longtail::RowOps<longtail::gpu::Cuda>::add_to(library);
  // The CPU is quicker without.
  library.impl("mean_loss", TORCH_BOX(&longtail::RowOps<longtail::gpu::Cuda>::mean_loss));
}
