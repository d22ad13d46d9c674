// The CPU kernels of the operators that serve every family.
#include "ops.h"

namespace longtail {
namespace {

void scale_grad_(const Tensor& grad, const Tensor& grad_loss, const MaybeTensor& target, int64_t ignore_index) {
  const Layout layout = check_layout(grad, "grad");
  check_vector(grad_loss, "grad_loss", layout.rows, accumulate_type(grad));
  if (target) check_vector(*target, "target", layout.rows, ScalarType::Long);
  ScaleGradArgs args = {};
  args.storage = storage_of(grad);
  args.num_classes = layout.num_classes;
  args.pixels = layout.pixels;
  args.grad = grad.mutable_data_ptr();
  args.grad_stride = layout.stride;
  args.grad_class_stride = layout.class_stride;
  args.grad_loss = grad_loss.const_data_ptr();
  args.grad_loss_stride = grad_loss.stride(0);
  args.target = target ? static_cast<const int64_t*>(target->const_data_ptr()) : nullptr;
  args.target_stride = target ? target->stride(0) : 0;
  args.ignore_index = ignore_index;
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, layout.rows, grain(layout),
                              [&](int64_t begin, int64_t end) { kernel.scale_grad_rows(args, begin, end); });
}

Tensor mean_denominator(const Tensor& target, const MaybeTensor& weight, int64_t ignore_index, int64_t num_classes) {
  check_vector(target, "target", target.dim() == 1 ? target.size(0) : -1, ScalarType::Long);
  const ScalarType dtype = weight ? weight->scalar_type() : ScalarType::Long;
  check(!weight || dtype == ScalarType::Float || dtype == ScalarType::Double, "weight has dtype ",
        torch::headeronly::toString(dtype), ", expected float32 or float64");
  const void* weights = vector_data(weight, "weight", num_classes, dtype);
  const auto* targets = static_cast<const int64_t*>(target.const_data_ptr());
  int64_t count = 0;
  double total = 0.0;
  for (int64_t i = 0; i < target.size(0); ++i) {
    const int64_t g = targets[i * target.stride(0)];
    if (g == ignore_index) continue;
    if (g < 0 || g >= num_classes) check_target(i, target, num_classes, ignore_index);
    ++count;
    if (dtype == ScalarType::Float) total += static_cast<const float*>(weights)[g];
    if (dtype == ScalarType::Double) total += static_cast<const double*>(weights)[g];
  }
  const Tensor result = new_tensor({}, dtype);
  if (dtype == ScalarType::Long) *static_cast<int64_t*>(result.mutable_data_ptr()) = count;
  if (dtype == ScalarType::Float) *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(total);
  if (dtype == ScalarType::Double) *static_cast<double*>(result.mutable_data_ptr()) = total;
  return result;
}

}  // namespace
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cpu, CPU, m) {
  m.impl("scale_grad_", TORCH_BOX(&longtail::scale_grad_));
  m.impl("mean_denominator", TORCH_BOX(&longtail::mean_denominator));
}

// Read by ctypes: the name of the instruction set in use, or null when LONGTAIL_CPU_ISA cannot be honoured.
extern "C" __attribute__((visibility("default"))) const char* longtail_cpu_isa() {
  try {
    return longtail::kernels().isa;
  } catch (const std::exception&) {
    return nullptr;
  }
}
