// What a row's target brings: its effective logit, its slope, and what the logits of the others become by it.
#pragma once

#include "capping.h"

namespace longtail {
namespace LONGTAIL_ISA {

// Z: storage type of the logits; T: type of the arithmetic. Rows [N, C]; target -1: the class is in another shard.
template <typename Z, typename T>
class RowTargets {
 public:
  explicit RowTargets(const SoftmaxLossArgs& args)
      : capping_(args),
        bias_(static_cast<const T*>(args.class_bias)),
        margin_(static_cast<const T*>(args.class_margin)),
        class_scale_(static_cast<const T*>(args.class_scale)),
        target_scale_(static_cast<const T*>(args.target_scale)),
        mitigation_(static_cast<const T*>(args.class_mitigation)),
        given_(static_cast<const T*>(args.target_terms)),
        compensation_(static_cast<T>(args.options.compensation)),
        num_classes_(args.num_classes) {}

  // Of row i, before its logits are overwritten; what is off stays out, whatever is given.
  TargetTerms<T> terms(const Z* z, int64_t i, int64_t g) const {
    TargetTerms<T> terms = no_terms<T>();
    if (given_ == nullptr && g < 0) return terms;
    const T* const given = given_ ? given_ + 3 * i : nullptr;
    if (target_scale_) terms.scale = given ? given[0] : target_scale_[g];
    if (mitigation_) terms.mitigation = given ? given[1] : mitigation_[g];
    if (compensation_ != T(0)) terms.reference = given ? given[2] : finite_max(shared_logit(z, g, terms.scale));
    return terms;
  }

  // Of target -1, what stands in for it: the effective logit of class 0.
  T logit(const Z* z, int64_t g, const TargetTerms<T>& terms) const {
    if (g >= 0) return margin_ ? shared_logit(z, g, terms.scale) - margin_[g] : shared_logit(z, g, terms.scale);
    if (num_classes_ == 0) return T(0);
    return beside(shared_logit(z, 0, terms.scale), mitigation_, 0, terms, compensation_);
  }

  // What softcap makes of logit j.
  T ratio(const Z* z, int64_t j) const { return capping_.ratio(load_some(z + j, 1)).v[0]; }

  // du/dz of the target, from its logit or what is kept of it.
  T slope(const Z* z, int64_t g, const TargetTerms<T>& terms, const T* kept) const {
    const T scale =
        g >= 0 && class_scale_ ? capping_.scale * terms.scale * class_scale_[g] : capping_.scale * terms.scale;
    if (g < 0 || capping_.softcap == T(0)) return scale;
    const T x = kept ? kept[g] : ratio(z, g);
    return scale * (T(1) - x * x);
  }

 private:
  // x_j
  T shared_logit(const Z* z, int64_t j, T target_scale) const {
    T x = capping_(load_some(z + j, 1)).v[0] * target_scale;
    if (class_scale_) x *= class_scale_[j];
    return bias_ ? x + bias_[j] : x;
  }

  const Capping<T> capping_;
  const T *const bias_, *const margin_, *const class_scale_, *const target_scale_, *const mitigation_, *const given_;
  const T compensation_;
  const int64_t num_classes_;
};

}  // namespace LONGTAIL_ISA
}  // namespace longtail
