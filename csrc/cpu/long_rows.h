// A few long rows on many threads: the classes of each are shared out in pieces of fixed length, as over ranks.
//
//   every piece: accumulate -> RowStats; every row: combine in order, finish; every piece: apply
//
// What is shared out depends on the shape alone, so that the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace longtail {

// Classes of a piece.
constexpr int64_t kPiece = 65536;

// Rows of more than a piece, and fewer than keep the threads of a large machine busy.
inline bool shares_out_classes(const SoftmaxLossArgs& args, Pass pass) {
  return args.pixels == 0 && args.rows < 64 && args.num_classes > kPiece && pass != Pass::accumulate &&
         pass != Pass::apply;
}

template <typename T>
class LongRows {
 public:
  // Targets are known to be classes or ignored. `in_parallel(count, body)` calls body(i) for all i < count.
  template <typename InParallel>
  static void run(const SoftmaxLossArgs& args, Pass pass, const Kernels& kernel, const InParallel& in_parallel) {
    LongRows rows(args, kernel);
    rows.look_up_targets();
    if (pass != Pass::backward) {
      in_parallel(rows.count(), [&](int64_t i) { rows.piece(Pass::accumulate, i); });
      for (int64_t i = 0; i < args.rows; ++i) rows.combine_row(i);
    }
    for (int64_t i = 0; i < args.rows; ++i) rows.finish_row(i, pass);
    if (pass != Pass::loss) in_parallel(rows.count(), [&](int64_t i) { rows.piece(Pass::apply, i); });
  }

 private:
  static constexpr int64_t kIgnored = -100, kElsewhere = -1;

  LongRows(const SoftmaxLossArgs& args, const Kernels& kernel)
      : args_(args),
        kernel_(kernel),
        pieces_((args.num_classes + kPiece - 1) / kPiece),
        size_(args.storage == Storage::float64   ? 8
              : args.storage == Storage::float32 ? 4
                                                 : 2),
        target_(pieces_ * args.rows, kElsewhere),
        terms_(args.rows * 3),
        stats_(pieces_ * args.rows * 5),
        row_grad_(args.rows * 5) {
    for (int64_t i = 0; i < args.rows; ++i) {
      const int64_t g = args.target[i * args.target_stride];
      for (int64_t p = 0; g == args.ignore_index && p < pieces_; ++p) target_[p * args.rows + i] = kIgnored;
      if (g != args.ignore_index) target_[g / kPiece * args.rows + i] = g % kPiece;
    }
  }

  int64_t count() const { return pieces_ * args_.rows; }
  int64_t classes(int64_t p) const { return std::min(kPiece, args_.num_classes - p * kPiece); }
  bool ignored(int64_t i) const { return target_[i] == kIgnored; }
  T* stats(int64_t p, int64_t i) { return stats_.data() + (p * args_.rows + i) * 5; }
  int64_t target(int64_t i) const { return args_.target[i * args_.target_stride]; }

  static const void* at(const void* vector, int64_t j) {
    return vector == nullptr ? nullptr : static_cast<const T*>(vector) + j;
  }

  // One step of the i-th piece, counted along the rows.
  void piece(Pass pass, int64_t i) {
    const int64_t row = i / pieces_, p = i % pieces_, first = p * kPiece;
    SoftmaxLossArgs part = args_;
    part.num_classes = classes(p);
    part.logits = static_cast<const char*>(args_.logits) + first * size_;
    part.target = target_.data() + p * args_.rows;
    part.target_stride = 1;
    part.ignore_index = kIgnored;
    part.weight = at(args_.weight, first);
    part.class_bias = at(args_.class_bias, first);
    part.class_margin = at(args_.class_margin, first);
    part.class_scale = at(args_.class_scale, first);
    part.class_mitigation = at(args_.class_mitigation, first);
    part.target_terms = terms_.data();
    part.loss = nullptr;
    part.stats = stats(p, 0);
    part.stats_stride = 5;
    part.row_grad = row_grad_.data();
    if (args_.grad) part.grad = static_cast<char*>(args_.grad) + first * size_;
    kernel_.softmax_loss_rows(part, pass, row, row + 1, nullptr);
  }

  // What the targets' classes bring to the others, while their logits are there.
  void look_up_targets() {
    const T* const scale = static_cast<const T*>(args_.target_scale);
    const T* const mitigation = static_cast<const T*>(args_.class_mitigation);
    for (int64_t i = 0; i < args_.rows; ++i) {
      const int64_t g = target(i);
      if (ignored(i)) continue;
      generic::TargetTerms<T> terms = generic::no_terms<T>();
      if (scale) terms.scale = scale[g];
      if (mitigation) terms.mitigation = mitigation[g];
      if (args_.options.compensation != 0.0) terms.reference = generic::finite_max(shared_logit(i, g));
      const T values[] = {terms.scale, terms.mitigation, terms.reference};
      std::copy(values, values + 3, terms_.data() + 3 * i);
    }
  }

  // x_g of row i: the u_g of its class alone.
  T shared_logit(int64_t i, int64_t g) {
    const int64_t only = 0;
    T stats[5];
    SoftmaxLossArgs one = args_;
    one.rows = one.num_classes = 1;
    one.logits = static_cast<const char*>(args_.logits) + (i * args_.logits_stride + g) * size_;
    one.target = &only;
    one.ignore_index = kIgnored;
    one.class_bias = at(args_.class_bias, g);
    one.class_scale = at(args_.class_scale, g);
    one.target_scale = at(args_.target_scale, g);
    one.weight = one.class_margin = one.class_mitigation = nullptr;
    one.options.compensation = 0.0;
    one.stats = stats;
    kernel_.softmax_loss_rows(one, Pass::accumulate, 0, 1, nullptr);
    return stats[3];
  }

  T weight(int64_t g) const { return args_.weight ? static_cast<const T*>(args_.weight)[g] : T(1); }

  void combine_row(int64_t i) {
    generic::RowStats<T> row = generic::empty_stats(T(0));
    if (!ignored(i)) {
      const int64_t owner = target(i) / kPiece;
      row.u_g = stats(owner, i)[3];
      for (int64_t p = 0; p < pieces_; ++p) {
        const T* s = stats(p, i);
        // Each piece's sum is relative to a logit of its own, unless it holds the target.
        const T moved = p == owner ? T(0) : generic::finite_max(s[3]) - generic::finite_max(row.u_g);
        const T U = args_.options.label_smoothing == 0.0 ? T(0) : s[4] + (moved == T(0) ? T(0) : omega(p) * moved);
        row = generic::combine(row, {s[0], s[1], s[2], row.u_g, U}, generic::ExpRange<T>::kLowest);
      }
    } else {
      row.m = T(0);
    }
    const T values[] = {row.m, row.d, row.t, row.u_g, row.U};
    std::copy(values, values + 5, static_cast<T*>(args_.stats) + 5 * i);
  }

  // The sum of a piece's weights.
  T omega(int64_t p) const {
    if (args_.weight == nullptr) return static_cast<T>(classes(p));
    double total = 0.0;
    for (int64_t j = 0; j < classes(p); ++j) total += static_cast<double>(weight(p * kPiece + j));
    return static_cast<T>(total);
  }

  void finish_row(int64_t i, Pass pass) {
    if (ignored(i)) {
      if (pass != Pass::backward) static_cast<T*>(args_.loss)[i] = T(0);
      return;
    }
    const T* s = static_cast<const T*>(args_.stats) + 5 * i;
    const LossOptions<T> options = generic::convert<T>(args_.options);
    const T smooth = options.label_smoothing / static_cast<T>(args_.num_classes);
    const T v = args_.sample_weight ? static_cast<const T*>(args_.sample_weight)[i] : T(1);
    generic::RowLoss<T> row = generic::finish(generic::RowStats<T>{s[0], s[1], s[2], s[3], s[4]}, options, smooth,
                                              static_cast<T>(args_.weight_sum), weight(target(i)), v);
    if (pass != Pass::backward) static_cast<T*>(args_.loss)[i] = row.loss;
    if (pass == Pass::loss) return;
    generic::scale_grad(row.grad, static_cast<const T*>(args_.grad_loss)[i * args_.grad_loss_stride]);
    const T values[] = {row.grad.m, row.grad.a, row.grad.b, row.grad.S, row.grad.target};
    std::copy(values, values + 5, row_grad_.data() + 5 * i);
  }

  const SoftmaxLossArgs& args_;
  const Kernels& kernel_;
  const int64_t pieces_, size_;
  std::vector<int64_t> target_;  // [pieces, rows]: as one shard of the classes takes them
  std::vector<T> terms_;         // [rows, 3]: TargetTerms
  std::vector<T> stats_;         // [pieces, rows, 5]
  std::vector<T> row_grad_;      // [rows, 5]
};

}  // namespace longtail
