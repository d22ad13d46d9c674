// The loops of the sigmoid family over rows of contiguous classes and over images of contiguous pixels, written once
// and compiled once per instruction set. Each logit is read once and each gradient written once, a block at a time.
#pragma once

#include "kernels.h"
#include "sigmoid_block.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class SigmoidRows {
 public:
  explicit SigmoidRows(const SigmoidLossArgs& args, Pass pass)
      : args_(args),
        pass_(pass),
        weight_(static_cast<const T*>(args.weight)),
        pos_weight_(static_cast<const T*>(args.pos_weight)),
        sample_weight_(static_cast<const T*>(args.sample_weight)),
        inverse_counts_(static_cast<const T*>(args.inverse_counts)),
        elementwise_loss_(args.elementwise_loss && pass != Pass::backward),
        elementwise_upstream_(args.elementwise_upstream && pass != Pass::loss) {}

  int64_t run(int64_t begin, int64_t end) {
    if (args_.pixels == 0) {
      for (int64_t i = begin; i < end; ++i) {
        if (!run_row(i)) return i;
      }
      return -1;
    }
    while (begin < end) {
      const int64_t p = begin % args_.pixels;
      const int64_t left = args_.pixels - p < end - begin ? args_.pixels - p : end - begin;
      const int64_t n = left < kStretch ? left : kStretch;
      const int64_t bad = run_pixels(begin / args_.pixels, p, n);
      if (bad >= 0) return begin + bad;
      begin += n;
    }
    return -1;
  }

 private:
  static constexpr int64_t kBlock = 2048;      // classes of a row at a time
  static constexpr int64_t kStretch = 1024;    // pixels of a class at a time
  static constexpr int64_t kSummedApart = 64;  // classes of a pixel in one running sum

  SigmoidBlock<T> new_block() const {
    SigmoidBlock<T> b = {};
    b.alpha_positive = static_cast<T>(args_.alpha_positive);
    b.alpha_negative = static_cast<T>(args_.alpha_negative);
    b.gamma = static_cast<T>(args_.gamma);
    b.factor = b.pos_weight = b.upstream = T(1);
    if (args_.plain) return b;
    b.general = general_options<T>(args_);
    b.gamma_positive = b.gamma;
    b.gamma_negative = static_cast<T>(args_.same_gamma ? args_.gamma : args_.gamma_negative);
    b.same_gamma = args_.same_gamma;
    b.rebalancing = inverse_counts_ != nullptr;
    b.dead_below = static_cast<T>(log(args_.clip) - log1p(-args_.clip) - 1e-3);  // -inf without a shift
    b.simple_negatives = b.general.whole && b.general.smoothing == T(0);
    return b;
  }

  // Of a row, classes from j on; of pixels, class j.
  void set_class_vectors(SigmoidBlock<T>& b, int64_t j, bool of_row) const {
    const auto set = [&](const void* vector, const T*& each, T& one) {
      if (vector == nullptr) return;
      const T* found = static_cast<const T*>(vector) + j;
      if (of_row) {
        each = found;
      } else {
        one = *found;
      }
    };
    set(args_.class_bias, b.biases, b.bias);
    set(args_.class_alpha, b.alphas, b.alpha_positive);
    if (args_.class_alpha && !of_row) b.alpha_negative = T(1) - b.alpha_positive;
    set(args_.class_gamma, b.gammas, b.gamma_positive);
    set(args_.inverse_counts, b.inverse_counts, b.inverse_count);
  }

  // What `rebalanced` multiplies the counts of a row's classes by, from the sum of those of its labels.
  T of_row(T sum) const { return static_cast<T>(args_.rebalance_beta) / sum; }

  // The sum of inverse_counts over the labels of row i.
  T label_sum(int64_t i, int64_t g) const {
    if (args_.target) return inverse_counts_[g];
    const char* at = dense_at(i, 0, 0);
    return args_.dense_is_wide ? label_sum_of(reinterpret_cast<const T*>(at))
                               : label_sum_of(reinterpret_cast<const Z*>(at));
  }

  // Most registers have no label: they are told by the targets alone.
  template <typename Y>
  T label_sum_of(const Y* y) const {
    const Vec<T> zero = T(0), ignored = static_cast<T>(args_.ignore_index);
    Vec<T> sum = zero;
    for (int64_t j = 0; j < args_.num_classes; j += Vec<T>::kLanes) {
      const int64_t left = args_.num_classes - j;
      Vec<T> found = load_some(y + j, left);
      if (all(found == zero)) continue;
      if (args_.ignoring) found = select(found == ignored, zero, found);
      sum = sum + found * load_some(inverse_counts_ + j, left);
    }
    return horizontal_sum(sum);
  }

  const T* grad_loss(int64_t i) const { return static_cast<const T*>(args_.grad_loss) + i * args_.grad_loss_stride; }

  // False when the target is out of bounds.
  bool run_row(int64_t i) {
    const int64_t c = args_.num_classes;
    SigmoidBlock<T> b = new_block();
    if (sample_weight_) b.factor = sample_weight_[i];
    int64_t g = -1;
    bool ignored = false;
    if (args_.target) {
      g = args_.target[i * args_.target_stride];
      ignored = args_.ignoring && g == args_.ignore_index;
      if (!ignored && (g < 0 || g >= c)) return false;
      if (!ignored && args_.class_weight_by_target) b.factor *= weight_[g];
    }
    if (inverse_counts_ && !ignored) b.row = of_row(label_sum(i, g));
    if (pass_ != Pass::loss && !elementwise_upstream_) b.upstream = *grad_loss(i);
    T total = T(0);
    for (int64_t j = 0; j < c; j += kBlock) {
      b.count = c - j < kBlock ? c - j : kBlock;
      if (ignored) {
        clear(i, j, b.count);
        continue;
      }
      if (weight_ && !args_.class_weight_by_target) b.factors = weight_ + j;
      if (pos_weight_) b.pos_weights = pos_weight_ + j;
      if (!args_.plain) set_class_vectors(b, j, true);
      if (elementwise_loss_) b.loss = static_cast<T*>(args_.loss) + i * c + j;
      if (elementwise_upstream_) b.upstreams = static_cast<const T*>(args_.grad_loss) + i * c + j;
      total += compute(b, i, 0, j, [&] { return OneHotClasses<T>{g - j}; });
    }
    if (pass_ != Pass::backward && !elementwise_loss_) static_cast<T*>(args_.loss)[i] = total;
    return true;
  }

  // Zeros for `count` classes of an ignored row.
  void clear(int64_t i, int64_t j, int64_t count) {
    if (elementwise_loss_) {
      memset(static_cast<T*>(args_.loss) + i * args_.num_classes + j, 0, count * sizeof(T));
    }
    if (pass_ != Pass::loss) memset(static_cast<Z*>(args_.grad) + i * args_.grad_stride + j, 0, count * sizeof(Z));
  }

  // What the pixels of one stretch have in common for all classes.
  struct Pixels {
    T target[kStretch], factor[kStretch], upstream[kStretch], sum[kStretch], total[kStretch];
    T rows[kStretch];  // see of_row
    bool any_ignored = false;
  };

  // Returns the first of `n` pixels whose target is out of bounds, or -1.
  int64_t read_pixels(int64_t row, int64_t n, Pixels& pixels) {
    for (int64_t k = 0; k < n; ++k) {
      pixels.factor[k] = sample_weight_ ? sample_weight_[row + k] : T(1);
      pixels.upstream[k] = pass_ != Pass::loss && !elementwise_upstream_ ? *grad_loss(row + k) : T(1);
      pixels.total[k] = T(0);
      if (args_.target == nullptr) continue;
      const int64_t g = args_.target[(row + k) * args_.target_stride];
      if (args_.ignoring && g == args_.ignore_index) {
        pixels.target[k] = T(-1);
        pixels.any_ignored = true;
        continue;
      }
      if (g < 0 || g >= args_.num_classes) return k;
      pixels.target[k] = static_cast<T>(g);
      if (args_.class_weight_by_target) pixels.factor[k] *= weight_[g];
      if (inverse_counts_) pixels.rows[k] = of_row(inverse_counts_[g]);
    }
    return -1;
  }

  // The same of `rows` where each pixel of image i from pixel p on has a target for each class.
  void read_label_sums(int64_t i, int64_t p, int64_t n, Pixels& pixels) const {
    T y[kBlock];
    for (int64_t k = 0; k < n; ++k) pixels.rows[k] = T(0);
    for (int64_t j = 0; j < args_.num_classes; ++j) {
      const Dense<T> target = dense(i, j, p, n, y);
      for (int64_t k = 0; k < n; ++k) {
        const bool counts = !target.ignoring() || target.y[k] != target.ignored;
        pixels.rows[k] += counts ? target.y[k] * inverse_counts_[j] : T(0);
      }
    }
    for (int64_t k = 0; k < n; ++k) pixels.rows[k] = of_row(pixels.rows[k]);
  }

  // `n` pixels of image i from pixel p on.
  int64_t run_pixels(int64_t i, int64_t p, int64_t n) {
    Pixels pixels;
    const int64_t row = i * args_.pixels + p, c = args_.num_classes;
    const int64_t bad = read_pixels(row, n, pixels);
    if (bad >= 0) return bad;
    const bool summing = pass_ != Pass::backward && !elementwise_loss_;
    SigmoidBlock<T> b = new_block();
    b.count = n;
    if (inverse_counts_) {
      if (args_.dense_target) read_label_sums(i, p, n, pixels);
      b.rows = pixels.rows;
    }
    if (sample_weight_ || args_.class_weight_by_target) b.factors = pixels.factor;
    if (pass_ != Pass::loss && !elementwise_upstream_) {
      if (args_.grad_loss_stride == 0) {
        b.upstream = *grad_loss(0);
      } else {
        b.upstreams = pixels.upstream;
      }
    }
    for (int64_t j = 0; j < c; ++j) {
      b.factor = weight_ && !args_.class_weight_by_target ? weight_[j] : T(1);
      if (pos_weight_) b.pos_weight = pos_weight_[j];
      if (!args_.plain) set_class_vectors(b, j, false);
      const int64_t element = (i * c + j) * args_.pixels + p;
      if (elementwise_loss_) b.loss = static_cast<T*>(args_.loss) + element;
      if (elementwise_upstream_) b.upstreams = static_cast<const T*>(args_.grad_loss) + element;
      if (summing) {
        b.loss = pixels.sum;
        b.add_loss = j % kSummedApart != 0;
      }
      compute(b, i, j, p, [&] { return OneHotPixels<T>{pixels.target, static_cast<T>(j), pixels.any_ignored}; });
      const bool sum_ends = j + 1 == c || (j + 1) % kSummedApart == 0;
      for (int64_t k = 0; summing && sum_ends && k < n; ++k) pixels.total[k] += pixels.sum[k];
    }
    if (summing) {
      memcpy(static_cast<T*>(args_.loss) + row, pixels.total, n * sizeof(T));
    }
    return -1;
  }

  // One block: the logits at (row or image i, class j, then `offset` contiguous elements further).
  template <typename OneHot>
  T compute(SigmoidBlock<T>& b, int64_t i, int64_t j, int64_t offset, const OneHot& one_hot) {
    T z[kBlock], y[kBlock], grad[kBlock];
    const Z* logits = static_cast<const Z*>(args_.logits) + i * args_.logits_stride + j * args_.logits_class_stride;
    const int64_t ahead = args_.pixels > 0 ? args_.logits_class_stride : kBlock;
    b.z = widened(logits + offset, b.count, z);
    b.next_z = reinterpret_cast<const char*>(logits + offset) + ahead * sizeof(Z);
    b.z_bytes = sizeof(Z);
    Z* out = nullptr;
    if (pass_ != Pass::loss) {
      out = static_cast<Z*>(args_.grad) + i * args_.grad_stride + j * args_.grad_class_stride + offset;
      b.grad = in_place(out, grad);
    }
    T total;
    if (args_.dense_target == nullptr) {
      total = run_block(one_hot(), b);
    } else {
      b.y_bytes = args_.dense_is_wide ? sizeof(T) : sizeof(Z);
      b.next_y = dense_at(i, j, offset) + (args_.pixels > 0 ? args_.dense_class_stride : kBlock) * b.y_bytes;
      total = run_block(dense(i, j, offset, b.count, y), b);
    }
    if constexpr (sizeof(Z) != sizeof(T)) {
      for (int64_t k = 0; out && k < b.count; k += Vec<T>::kLanes) {
        const int64_t left = b.count - k;
        store_some(out + k, load_some(grad + k, left), left);
      }
    }
    return total;
  }

  const char* dense_at(int64_t i, int64_t j, int64_t offset) const {
    return static_cast<const char*>(args_.dense_target) +
           (i * args_.dense_stride + j * args_.dense_class_stride + offset) *
               (args_.dense_is_wide ? sizeof(T) : sizeof(Z));
  }

  // The targets of `n` elements, for which `buffer` has room.
  Dense<T> dense(int64_t i, int64_t j, int64_t offset, int64_t n, T* buffer) const {
    const char* at = dense_at(i, j, offset);
    const T* target =
        args_.dense_is_wide ? reinterpret_cast<const T*>(at) : widened(reinterpret_cast<const Z*>(at), n, buffer);
    return {target, args_.ignoring, static_cast<T>(args_.ignore_index)};
  }

  static T* in_place(T* out, T*) { return out; }
  template <typename Narrow>
  static T* in_place(Narrow*, T* buffer) {
    return buffer;
  }

  static const T* widened(const T* p, int64_t, T*) { return p; }
  template <typename Narrow>
  static const T* widened(const Narrow* p, int64_t n, T* buffer) {
    for (int64_t k = 0; k < n; k += Vec<T>::kLanes) store_some(buffer + k, load_some(p + k, n - k), n - k);
    return buffer;
  }

  template <typename Target>
  T run_block(const Target& target, const SigmoidBlock<T>& b) {
    if (!args_.plain) return run_pass<Focus::general>(target, b);
    if (args_.gamma == 0.0) return run_pass<Focus::none>(target, b);
    return args_.gamma == 2.0 ? run_pass<Focus::square>(target, b) : run_pass<Focus::power>(target, b);
  }

  template <Focus kFocus, typename Target>
  T run_pass(const Target& target, const SigmoidBlock<T>& b) {
    if (pass_ == Pass::loss) return sigmoid_block<Pass::loss, kFocus>(target, b);
    if (pass_ == Pass::backward) return sigmoid_block<Pass::backward, kFocus>(target, b);
    return sigmoid_block<Pass::loss_and_grad, kFocus>(target, b);
  }

  const SigmoidLossArgs& args_;
  const Pass pass_;
  const T* const weight_;
  const T* const pos_weight_;
  const T* const sample_weight_;
  const T* const inverse_counts_;
  const bool elementwise_loss_;
  const bool elementwise_upstream_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
