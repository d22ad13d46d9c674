// The operators of the CPU.
// Python owns the schemas of the namespace longtail_cpu and calls these by way of torch.ops.longtail.
#include "device.h"

namespace longtail {
namespace {

// Whether the targets of all elements, [N, C] or [N, C, P], are in [0, 1], NaN or ignore_index.
bool dense_targets_fit(const Tensor& target, std::optional<int64_t> ignore_index) {
  constexpr int64_t kPiece = 16384;
  const Layout layout = check_layout(target, "target");
  const bool images = layout.pixels > 0, whole = target.is_contiguous();
  const int64_t length = whole ? target.numel() : images ? layout.pixels : layout.num_classes;
  const int64_t classes = images ? layout.num_classes : 1, pieces = (length + kPiece - 1) / kPiece;
  const int64_t runs = length == 0 ? 0 : target.numel() / length;
  const char* data = static_cast<const char*>(target.const_data_ptr());
  const Storage storage = storage_of<Cpu>(target);
  const auto piece = [&](int64_t i) {
    const int64_t run = i / pieces, first = i % pieces * kPiece;
    const int64_t offset = run / classes * layout.stride + run % classes * layout.class_stride + first;
    const int64_t count = std::min(kPiece, length - first);
    return DenseTargets{storage, data + offset * bytes_of(storage), count, ignore_index.has_value(),
                        ignore_index.value_or(0)};
  };
  const int64_t grain = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, length));
  const int64_t bad = parallel_rows(runs * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!kernels().dense_targets_fit(piece(i))) return i;
    }
    return int64_t(-1);
  });
  return bad < 0;
}

// softmax_loss, and what mean_loss makes of it, in one call: of few logits it is calls that take the time. `count`:
// divides by the counted rows, at least 1, whatever they weigh. The statistics are for softmax_loss_backward alone. Of
// class probabilities every row counts, and weights do not divide.
std::tuple<Tensor, Tensor, Tensor> softmax_mean(const Tensor& logits, const Tensor& target LONGTAIL_SOFTMAX_PARAMETERS,
                                                bool count) {
  SoftmaxLossArgs args = SoftmaxOps<Cpu>::with_options(logits, target, LONGTAIL_SOFTMAX_VALUES, true);
  const auto [loss, stats] = SoftmaxOps<Cpu>::loss_of(args, logits, weight, true);
  const Tensor denominator =
      args.dense ? new_tensor(logits, {}, ScalarType::Long)
                 : RowOps<Cpu>::mean_denominator(target, count ? std::nullopt : weight, ignore_index, logits.size(1));
  if (args.dense) *static_cast<int64_t*>(denominator.mutable_data_ptr()) = args.rows;
  if (count) {
    int64_t& rows = *static_cast<int64_t*>(denominator.mutable_data_ptr());
    rows = std::max<int64_t>(rows, 1);
  }
  const auto [mean, divisor] = RowOps<Cpu>::mean_loss(loss, denominator);
  return {mean, stats, divisor};
}

// The same of sigmoid_loss. rows: divides by the counted rows, at least 1, not by their elements.
std::tuple<Tensor, Tensor> sigmoid_mean(const Tensor& logits, const Tensor& target LONGTAIL_SIGMOID_PARAMETERS,
                                        bool rows) {
  using Ops = SigmoidOps<Cpu>;
  SigmoidLossArgs args = Ops::with_options(logits, target, LONGTAIL_SIGMOID_VALUES);
  const bool dense = target.scalar_type() != ScalarType::Long;
  check(!dense || !ignore_index, "ignore_index is ", ignore_index.value_or(0), ", expected none of dense targets");
  check(!dense || dense_targets_fit(target, std::nullopt), "a target is out of bounds: expected 0 <= target <= 1");
  const Tensor loss = Ops::new_loss(args, logits, false);
  Cpu::sigmoid_loss(args, Pass::loss, logits);
  const Tensor denominator =
      dense ? new_tensor(logits, {}, ScalarType::Long)
            : RowOps<Cpu>::mean_denominator(target, std::nullopt, ignore_index.value_or(-100), args.num_classes);
  int64_t& counted = *static_cast<int64_t*>(denominator.mutable_data_ptr());
  if (dense) counted = args.rows;
  counted = rows ? std::max<int64_t>(counted, 1) : counted * args.num_classes;
  return RowOps<Cpu>::mean_loss(loss, denominator);
}

// How many rows have statistics: those of others are all 0.
int64_t counted_rows(const TwoWayLossArgs& args) {
  int64_t found = 0;
  for (int64_t i = 0; i < args.rows; ++i) {
    bool any = false;
    for (int64_t k = 0; k < 4; ++k) {
      any |= number_at(args.stats, args.storage == Storage::float64,
                       i * args.stats_stride + k * args.stats_column_stride) != 0.0;
    }
    found += any;
  }
  return found;
}

// The same of two_way_loss. count: divides by at least 1.
std::tuple<Tensor, Tensor, Tensor> two_way_mean(const Tensor& logits, const Tensor& target LONGTAIL_TWO_WAY_PARAMETERS,
                                                bool count) {
  using Ops = TwoWayOps<Cpu>;
  TwoWayLossArgs args = Ops::with_options(logits, target, LONGTAIL_TWO_WAY_VALUES);
  const bool dense = target.scalar_type() != ScalarType::Long;
  check(!dense || !ignore_index, "ignore_index is ", ignore_index.value_or(0), ", expected none of dense targets");
  check(!dense || dense_targets_fit(target, std::nullopt), "a target is out of bounds: expected 0 <= target <= 1");
  const auto [loss, stats] = Ops::new_outputs(args, logits);
  Cpu::two_way_loss(args, Pass::loss, logits);
  const Tensor denominator =
      dense ? new_tensor(logits, {}, ScalarType::Long)
            : RowOps<Cpu>::mean_denominator(target, std::nullopt, ignore_index.value_or(-100), args.num_classes);
  int64_t& counted = *static_cast<int64_t*>(denominator.mutable_data_ptr());
  if (dense) counted = joint ? counted_rows(args) : args.rows;
  if (count) counted = std::max<int64_t>(counted, 1);
  const auto [mean, divisor] = RowOps<Cpu>::mean_loss(loss, denominator);
  return {mean, stats, divisor};
}

}  // namespace
}  // namespace longtail

STABLE_TORCH_LIBRARY_IMPL(longtail_cpu, CPU, library) {
  longtail::SoftmaxOps<longtail::Cpu>::add_to(library);
  longtail::SigmoidOps<longtail::Cpu>::add_to(library);
  longtail::HierarchicalOps<longtail::Cpu>::add_to(library);
  longtail::TwoWayOps<longtail::Cpu>::add_to(library);
  longtail::RowOps<longtail::Cpu>::add_to(library);
  library.impl("softmax_mean", TORCH_BOX(&longtail::softmax_mean));
  library.impl("sigmoid_mean", TORCH_BOX(&longtail::sigmoid_mean));
  library.impl("two_way_mean", TORCH_BOX(&longtail::two_way_mean));
  library.impl("dense_targets_fit", TORCH_BOX(&longtail::dense_targets_fit));
}

// Read by ctypes: the name of the instruction set in use, or null when LONGTAIL_CPU_ISA cannot be honoured.
extern "C" __attribute__((visibility("default"))) const char* longtail_cpu_isa() {
  try {
    return longtail::kernels().isa;
  } catch (const std::exception&) {
    return nullptr;
  }
}
