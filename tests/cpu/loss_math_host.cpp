// Scalar rows through csrc/loss_math.h as a GPU thread block would take them: pieces of a row, joined by `combine`.
#include "dense_math.h"
#include "sigmoid_math.h"

using namespace longtail::generic;

// One row in pieces that end at `ends`; stats and gradient in double.
extern "C" void row_in_pieces(const double* u, int64_t num_classes, int64_t g, const double* omega, const int64_t* ends,
                              int64_t pieces, const longtail::LossOptions<double>* options, double v, double* stats,
                              double* loss, double* grad) {
  constexpr double kLowest = ExpRange<double>::kLowest;
  const bool smoothing = options->label_smoothing != 0;
  double weight_sum = 0;
  for (int64_t j = 0; j < num_classes; ++j) weight_sum += omega[j];
  RowStats<double> row = empty_stats(u[g]);
  int64_t begin = 0;
  for (int64_t k = 0; k < pieces; ++k) {
    RowStats<double> piece = empty_stats(u[g]);
    for (int64_t j = begin; j < ends[k]; ++j) {
      if (smoothing) piece.U += omega[j] * (u[j] - u[g]);
      if (j == g) continue;
      raise_max(piece, maximum(piece.m, u[j]), kLowest);
      accumulate(piece, finite_max(piece.m), u[j], kLowest);
    }
    row = combine(row, piece, kLowest);
    begin = ends[k];
  }
  const double values[5] = {row.m, row.d, row.t, row.u_g, row.U};
  for (int k = 0; k < 5; ++k) stats[k] = values[k];
  const RowLoss<double> result = finish(row, *options, options->label_smoothing / num_classes, weight_sum, omega[g], v);
  *loss = result.loss;
  for (int64_t j = 0; j < num_classes; ++j) {
    grad[j] = j == g ? result.grad.target : apply(result.grad, u[j], kLowest) + result.grad.S * omega[j];
  }
}

// The same of class probabilities y, whose statistics are m, d, V and W.
extern "C" void dense_row_in_pieces(const double* u, const double* y, int64_t num_classes, const double* omega,
                                    const int64_t* ends, int64_t pieces, const longtail::LossOptions<double>* options,
                                    double v, double* stats, double* loss, double* grad) {
  constexpr double kLowest = ExpRange<double>::kLowest;
  const double kept = 1 - options->label_smoothing, share = options->label_smoothing / num_classes;
  const auto q = [&](int64_t j) { return weighted_probability(omega[j], kept * y[j] + share, u[j]); };
  DenseStats<double> row = empty_dense_stats<double>();
  int64_t begin = 0;
  for (int64_t k = 0; k < pieces; ++k) {
    DenseStats<double> piece = empty_dense_stats<double>();
    for (int64_t j = begin; j < ends[k]; ++j) {
      raise_max(piece, maximum(piece.m, u[j]), kLowest);
      accumulate(piece, finite_max(piece.m), u[j], q(j), kLowest);
    }
    row = combine(row, piece, kLowest);
    begin = ends[k];
  }
  const double values[4] = {row.m, row.d, row.V, row.W};
  for (int k = 0; k < 4; ++k) stats[k] = values[k];
  DenseLoss<double> result = finish(row, *options, v);
  *loss = result.loss;
  scale_grad(result.grad, -1.5);
  for (int64_t j = 0; j < num_classes; ++j) grad[j] = apply(result.grad, u[j], q(j), kLowest);
}

template <Focus kFocus>
void sigmoid_element(double z, double y, double gamma, double* loss, double* slope) {
  constexpr double kLowest = ExpRange<double>::kLowest;
  if (y == 0 || y == 1) {
    const Element<double> e = hard_element<kFocus>(logistic(y == 1 ? z : -z, kLowest), gamma, kLowest);
    *loss = e.loss;
    *slope = y == 1 ? -e.slope : e.slope;
  } else {
    const Element<double> e = soft_element<kFocus>(logistic(z, kLowest), y, 1.0, gamma, kLowest);
    *loss = e.loss;
    *slope = e.slope;
  }
}

// Losses of `count` elements and their derivatives by z.
extern "C" void sigmoid_elements(const double* z, const double* y, int64_t count, double gamma, double* loss,
                                 double* slope) {
  for (int64_t k = 0; k < count; ++k) {
    if (gamma == 0) sigmoid_element<Focus::none>(z[k], y[k], gamma, loss + k, slope + k);
    if (gamma == 2) sigmoid_element<Focus::square>(z[k], y[k], gamma, loss + k, slope + k);
    if (gamma != 0 && gamma != 2) sigmoid_element<Focus::power>(z[k], y[k], gamma, loss + k, slope + k);
  }
}
