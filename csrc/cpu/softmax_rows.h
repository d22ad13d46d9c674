// The row loop of the softmax family, written once and compiled once per instruction set.
//
// Reads each logit once (loss, backward) or twice, the second time from cache (loss_and_grad); writes each gradient
// once. Effective logits that take more than a bias go through a block buffer that stays in the first-level cache.
#pragma once

#include <type_traits>

#include "row_sums.h"
#include "row_targets.h"
#include "softmax_any.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Z: storage type of the logits; T: type of the arithmetic.
template <typename Z, typename T>
class SoftmaxRows {
 public:
  SoftmaxRows(const SoftmaxLossArgs& args, Pass pass, T* scratch)
      : args_(args),
        pass_(pass),
        scratch_(scratch),
        weight_(static_cast<const T*>(args.weight)),
        bias_(static_cast<const T*>(args.class_bias)),
        omega_(weight_, kOnes<T>),
        capping_(args),
        targets_(args),
        class_scale_(static_cast<const T*>(args.class_scale), kOnes<T>),
        mitigation_(static_cast<const T*>(args.class_mitigation), kZeros<T>),
        rows_per_group_(scratch || args.num_classes > kGroupedClasses ? 1 : kLanes),
        options_(convert<T>(args.options)),
        smooth_(static_cast<T>(args.options.label_smoothing) / static_cast<T>(args.num_classes)),
        weight_sum_(static_cast<T>(args.weight_sum)),
        keeps_(pass == Pass::loss_and_grad && args.keeps),
        effect_(keeps_ && effect_of(args) == Effect::bias ? Effect::affine : effect_of(args)),
        tail_(tail_of(args)),
        has_class_scale_(args.class_scale != nullptr) {}

  int64_t run(int64_t begin, int64_t end) {
    if (pass_ == Pass::accumulate || pass_ == Pass::apply) return run_shard(begin, end);
    for (int64_t i = begin; i < end; i += rows_per_group_) {
      const int64_t bad = run_group(i, end - i < rows_per_group_ ? end : i + rows_per_group_);
      if (bad >= 0) return bad;
    }
    if (args_.stream) stream_end();
    return -1;
  }

 private:
  using V = Vec<T>;
  using Yes = std::true_type;
  using No = std::false_type;
  static constexpr int kLanes = V::kLanes;

  // One lane per row; lanes beyond `count` stay zero, which `finish` survives.
  struct Group {
    int count = 0;
    int64_t row[kLanes], target[kLanes];
    T m[kLanes] = {}, d[kLanes] = {}, t[kLanes] = {}, u_g[kLanes] = {}, U[kLanes] = {};
    T weight[kLanes] = {}, sample_weight[kLanes] = {};

    void add(int64_t i, int64_t g, const T* stats, T w_g, T v) {
      row[count] = i;
      target[count] = g;
      T* const columns[] = {m, d, t, u_g, U};
      for (int k = 0; k < 5; ++k) columns[k][count] = stats[k];
      weight[count] = w_g;
      sample_weight[count++] = v;
    }
  };

  int64_t run_group(int64_t begin, int64_t end) {
    Group group;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = args_.target[i * args_.target_stride];
      if (g == args_.ignore_index) {
        ignore_row(i);
        continue;
      }
      if (g < 0 || g >= args_.num_classes) return i;
      T* stats = static_cast<T*>(args_.stats) + 5 * i;
      if (pass_ != Pass::backward) write_stats(row_stats(i, g), stats);
      const T v = args_.sample_weight ? static_cast<const T*>(args_.sample_weight)[i] : T(1);
      group.add(i, g, stats, weight_ ? weight_[g] : T(1), v);
    }
    if (group.count > 0) finish_group(group);
    return -1;
  }

  // One step of a row whose classes are shared out; target -1: the class is in another shard.
  int64_t run_shard(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = args_.target[i * args_.target_stride];
      if (g == args_.ignore_index) {
        ignore_row(i);
        continue;
      }
      if (g < -1 || g >= args_.num_classes) return i;
      if (pass_ == Pass::accumulate) {
        write_stats(row_stats(i, g), static_cast<T*>(args_.stats) + 5 * i);
      } else {
        const T* r = static_cast<const T*>(args_.row_grad) + 5 * i;
        write_grad(i, g, {r[0], r[1], r[2], r[3], r[4]});
      }
    }
    return -1;
  }

  static void write_stats(const RowStats<T>& s, T* stats) {
    const T values[5] = {s.m, s.d, s.t, s.u_g, s.U};
    memcpy(stats, values, sizeof(values));
  }

  void finish_group(const Group& group) {
    const RowStats<V> stats = {load(group.m), load(group.d), load(group.t), load(group.u_g), load(group.U)};
    RowLoss<V> rows = finish(stats, options_, smooth_, weight_sum_, load(group.weight), load(group.sample_weight));
    if (pass_ != Pass::backward) {
      for (int k = 0; k < group.count; ++k) static_cast<T*>(args_.loss)[group.row[k]] = rows.loss.v[k];
    }
    if (pass_ == Pass::loss) return;
    const RowGrad<V>& grad = rows.grad;
    for (int k = 0; k < group.count; ++k) {
      const int64_t i = group.row[k];
      RowGrad<T> row = {grad.m.v[k], grad.a.v[k], grad.b.v[k], grad.S.v[k], grad.target.v[k]};
      scale_grad(row, static_cast<const T*>(args_.grad_loss)[i * args_.grad_loss_stride]);
      write_grad(i, group.target[k], row);
    }
  }

  void ignore_row(int64_t i) {
    if (args_.loss) static_cast<T*>(args_.loss)[i] = T(0);
    if (pass_ != Pass::backward && pass_ != Pass::apply) {
      memset(static_cast<T*>(args_.stats) + 5 * i, 0, 5 * sizeof(T));
    }
    if (pass_ != Pass::loss && pass_ != Pass::accumulate) {
      memset(static_cast<Z*>(args_.grad) + i * args_.grad_stride, 0, args_.num_classes * sizeof(Z));
    }
  }

  LONGTAIL_INLINE const Z* logits(int64_t i) const {
    return static_cast<const Z*>(args_.logits) + i * args_.logits_stride;
  }

  LONGTAIL_INLINE Z* grad(int64_t i) const { return static_cast<Z*>(args_.grad) + i * args_.grad_stride; }

  // Where effective logits are kept from the sums to the gradient.
  LONGTAIL_INLINE T* effective(int64_t i) const { return scratch_ ? scratch_ : reinterpret_cast<T*>(grad(i)); }

  RowStats<T> row_stats(int64_t i, int64_t g) {
    const bool entropy = args_.entropy || options_.complement_coefficient != T(0) || pass_ == Pass::accumulate;
    const TargetTerms<T> terms = targets_.terms(logits(i), i, g);
    return entropy ? stats_of<true>(i, g, terms) : stats_of<false>(i, g, terms);
  }

  template <bool kEntropy>
  RowStats<T> stats_of(int64_t i, int64_t g, const TargetTerms<T>& terms) {
    const Z* const z = logits(i);
    const T u_g = targets_.logit(z, g, terms);
    if (scratch_ && !keeps_ && g >= 0) scratch_[g] = targets_.ratio(z, g);  // which the blocks leave out
    RowSums<T> sums;
    T computed[kBlock];
    for (int64_t begin = 0; begin < args_.num_classes; begin += kBlock) {
      const int64_t left = args_.num_classes - begin, n = left < kBlock ? left : kBlock;
      const Others others(n, g - begin);
      T* const kept = keeps_ ? effective(i) + begin : computed;
      if (effect_ == Effect::any) {
        compute_block(z, begin, others, u_g, terms, kept, sums);
        sums.template add_computed<kEntropy>(kept, others);
      } else {
        with_source(z, begin, terms, [&](auto source) { sums.template add<kEntropy>(source, others, kept); });
      }
    }
    return sums.stats(u_g, options_.label_smoothing != T(0));
  }

  // `body` with the source of effective logits from the begin-th.
  template <typename Body>
  LONGTAIL_INLINE void with_source(const Z* z, int64_t begin, const TargetTerms<T>& terms, const Body& body) const {
    const Z* const from = z + begin;
    if (effect_ == Effect::none) return body(Logits<Z>{from});
    if (effect_ == Effect::bias) return body(BiasedLogits<Z>{from, bias_ + begin});
    if (effect_ == Effect::affine) {
      const T factor = capping_.scale * terms.scale;
      const T* const scale = has_class_scale_ ? class_scale_.values + begin : nullptr;
      const T* const bias = bias_ ? bias_ + begin : nullptr;
      if (scale && bias) return body(AffineLogits<Z, true, true>{from, scale, bias, factor});
      if (scale) return body(AffineLogits<Z, true, false>{from, scale, bias, factor});
      if (bias) return body(AffineLogits<Z, false, true>{from, scale, bias, factor});
      return body(AffineLogits<Z, false, false>{from, scale, bias, factor});
    }
    const T *const mitigation = mitigation_.values + begin, compensation = options_.compensation;
    compensation == T(0) ? body(SeesawLogits<Z, false>{from, mitigation, terms, compensation})
                         : body(SeesawLogits<Z, true>{from, mitigation, terms, compensation});
  }

  // Computes a block of effective logits from the begin-th.
  void compute_block(const Z* z, int64_t begin, const Others others, T u_g, const TargetTerms<T>& terms, T* u,
                     RowSums<T>& sums) const {
    const V reference = finite_max(u_g);
    choose(options_.label_smoothing != T(0), [&](auto capped, auto smoothing, auto tail) {
      const auto of = any_logits<capped.value, tail.value>(z, terms);
      const auto part = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
        return compute<smoothing.value>(of, omega_, begin + from, begin + to, reference, u + from);
      };
      const ComputedSums<T> left = part(0, others.before), right = part(others.after, others.count);
      sums.U = sums.U + (left.U + right.U);
      sums.raise(horizontal_max(maximum(left.largest, right.largest)));
    });
  }

  template <bool kCapped, Tail kTail>
  LONGTAIL_INLINE AnyLogits<Z, kCapped, kTail> any_logits(const Z* z, const TargetTerms<T>& terms) const {
    const RowTail<T> tail = {class_scale_, mitigation_, terms, options_.compensation};
    return {z, scratch_, PerClass<T>(bias_, kZeros<T>), capping_, tail};
  }

  // `body` with what is asked of each logit, as constants.
  template <typename Body>
  LONGTAIL_INLINE void choose(bool smoothing, const Body& body) const {
    tail_ == Tail::none ? choose<Tail::none>(smoothing, body) : choose<Tail::all>(smoothing, body);
  }

  template <Tail kTail, typename Body>
  LONGTAIL_INLINE void choose(bool smoothing, const Body& body) const {
    const std::integral_constant<Tail, kTail> tail;
    if (capping_.softcap != T(0)) {
      smoothing ? body(Yes(), Yes(), tail) : body(Yes(), No(), tail);
    } else {
      smoothing ? body(No(), Yes(), tail) : body(No(), No(), tail);
    }
  }

  void write_grad(int64_t i, int64_t g, const RowGrad<T>& row) {
    const Z* const z = logits(i);
    Z* const grad = this->grad(i);
    const TargetTerms<T> terms = targets_.terms(z, i, g);
    const T slope_g = targets_.slope(z, g, terms, scratch_);  // before its logit is overwritten
    const bool plain = effect_ == Effect::none || effect_ == Effect::bias;
    if (keeps_) {
      const T *const u = effective(i), *const scale = class_scale_.values;
      has_class_scale_ ? write_plain_grad(KeptLogits<T, true>{u, scale}, terms.scale * capping_.scale, row, grad)
                       : write_plain_grad(KeptLogits<T, false>{u, scale}, terms.scale * capping_.scale, row, grad);
    } else if (row.S != T(0) || effect_ == Effect::any || !(plain || row.b == T(0))) {
      const RowGrad<V> grads = {V(row.m), V(row.a), V(row.b), V(row.S), V(row.target)};
      choose(row.S != T(0), [&](auto capped, auto smoothing, auto tail) {
        const auto of = any_logits<capped.value, tail.value>(z, terms);
        if constexpr (kStreams<Z>) {
          if (args_.stream) {
            return write_any_gradient<smoothing.value, true>(of, omega_, args_.num_classes, grads, grad);
          }
        }
        write_any_gradient<smoothing.value, false>(of, omega_, args_.num_classes, grads, grad);
      });
    } else {
      with_source(z, 0, terms, [&](auto source) { write_plain_grad(source, terms.scale * capping_.scale, row, grad); });
    }
    if (g >= 0) store_raw(grad + g, narrow(grad, V(row.target * slope_g)), 1);
  }

  template <typename Source>
  __attribute__((noinline)) void write_plain_grad(const Source u, T scale, const RowGrad<T>& row, Z* grad) const {
    const RowGrad<V> grads = {V(row.m), V(row.a * scale), V(row.b * scale), V(row.S), V(row.target)};
    const bool complement = row.b != T(0);  // NaN too
    const auto write = [&](auto complements) {
      if constexpr (kStreams<Z>) {
        if (args_.stream) return write_gradient<complements.value, true>(u, args_.num_classes, grads, grad);
      }
      write_gradient<complements.value, false>(u, args_.num_classes, grads, grad);
    };
    if constexpr (Source::kComplements) {
      if (complement) return write(Yes());
    }
    write(No());
  }

  const SoftmaxLossArgs& args_;
  const Pass pass_;
  T* const scratch_;
  const T* const weight_;
  const T* const bias_;
  const PerClass<T> omega_;
  const Capping<T> capping_;
  const RowTargets<Z, T> targets_;
  const PerClass<T> class_scale_, mitigation_;
  const int64_t rows_per_group_;
  const LossOptions<T> options_;
  const T smooth_, weight_sum_;
  const bool keeps_;
  const Effect effect_;
  const Tail tail_;
  const bool has_class_scale_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
