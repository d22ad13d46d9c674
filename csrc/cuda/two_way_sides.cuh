// What one thread does with neighbouring classes of ZLPR and the two-way loss, and how a row ends: two_way_math.h over
// vectors of logits.
#pragma once

#include "../two_way_math.h"
#include "reduce.cuh"
#include "two_way_loss.h"

namespace longtail {
namespace gpu {

using longtail::generic::finite_exponent;
using Side = longtail::generic::Side<float>;

// The exponent of a positive, at least: that there is one shows in m, whatever its logit.
constexpr float kLowestExponent = -0x1.fffffep127f;

struct Sides {
  Side n, p;
};

LONGTAIL_DEVICE Sides empty_sides() { return {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}}; }

// 1 / T of both sides.
struct Inverses {
  float n, p;
  LONGTAIL_DEVICE explicit Inverses(const TwoWayLossArgs& a)
      : n(1.0f / a.negative_temperature), p(1.0f / a.positive_temperature) {}
};

LONGTAIL_DEVICE void raise(Side& s, float m, float inverse) {
  if (m > s.m) longtail::generic::raise_side(s, m, inverse, HardwareExp());
}

// Which side a class with target y is on; of one that does not count, none.
LONGTAIL_DEVICE bool is_positive(float y) { return !(y <= 0.0f); }
LONGTAIL_DEVICE bool is_negative(float y) { return !(y >= 1.0f); }

// Bit i: whether the i-th target does not count.
template <int kCount>
LONGTAIL_DEVICE unsigned uncounted(const TwoWayLossArgs& a, const float (&y)[kCount]) {
  unsigned found = 0;
  if (!a.ignoring) return found;
  const float ignored = static_cast<float>(a.ignore_index);
#pragma unroll
  for (int i = 0; i < kCount; ++i) found |= y[i] == ignored ? 1u << i : 0u;
  return found;
}

// Adds classes that are all negatives.
template <int kCount>
LONGTAIL_DEVICE void add_negatives(Side& s, const float (&u)[kCount], float inverse) {
  float m = s.m;
#pragma unroll
  for (int i = 0; i < kCount; ++i) m = fmaxf(m, u[i]);
  raise(s, m, inverse);
  const float finite_m = finite_exponent(s.m);
  float d = 0.0f;  // summed apart: long rows would lose digits in one running sum
#pragma unroll
  for (int i = 0; i < kCount; ++i) d += exp_of((u[i] - finite_m) * inverse);
  s.d += d;
}

// Adds classes with logits u and targets y, but for those that bits of `ignored` say.
template <int kCount>
LONGTAIL_DEVICE void add_sides(Sides& s, const float (&u)[kCount], const float (&y)[kCount], unsigned ignored,
                               const Inverses& t) {
  float m_n = s.n.m, m_p = s.p.m;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool counts = (ignored >> i & 1u) == 0;
    m_n = counts && is_negative(y[i]) ? fmaxf(m_n, u[i]) : m_n;
    m_p = counts && is_positive(y[i]) ? fmaxf(fmaxf(m_p, -u[i]), kLowestExponent) : m_p;
  }
  raise(s.n, m_n, t.n);
  raise(s.p, m_p, t.p);
  m_n = finite_exponent(s.n.m);
  m_p = finite_exponent(s.p.m);
  float d_n = 0.0f, d_p = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool counts = (ignored >> i & 1u) == 0, positive = is_positive(y[i]), negative = is_negative(y[i]);
    const float far = positive ? (-u[i] - m_p) * t.p : (u[i] - m_n) * t.n;
    const float e = (positive ? y[i] : 1.0f - y[i]) * exp_of(far);
    d_p += counts && positive ? e : 0.0f;
    d_n += counts && !positive ? e : 0.0f;
    if (counts && positive && negative) d_n += (1.0f - y[i]) * exp_of((u[i] - m_n) * t.n);
  }
  s.n.d += d_n;
  s.p.d += d_p;
}

// What the gradient of a row is made of: m of both sides, 0 in the place of -inf, and what multiplies their terms.
struct SideTerms {
  float m_n, by_n, m_p, by_p;
  bool counted;
};

// dloss/du of neighbouring classes, from their logits, in place.
template <int kCount>
LONGTAIL_DEVICE void negative_gradient(float (&u)[kCount], const SideTerms& g, float inverse) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) u[i] = exp_of((u[i] - g.m_n) * inverse) * g.by_n;
}

LONGTAIL_DEVICE float side_gradient(float u, float y, const SideTerms& g, const Inverses& t) {
  const bool positive = is_positive(y), negative = is_negative(y);
  const float far = positive ? (-u - g.m_p) * t.p : (u - g.m_n) * t.n;
  const float du = (positive ? -y * g.by_p : (1.0f - y) * g.by_n) * exp_of(far);
  return positive && negative ? du + (1.0f - y) * exp_of((u - g.m_n) * t.n) * g.by_n : du;
}

LONGTAIL_DEVICE Sides join_lanes(Sides s, const Inverses& t, int lanes) {
  raise(s.n, max_lanes(s.n.m, lanes), t.n);
  raise(s.p, max_lanes(s.p.m, lanes), t.p);
  return {{s.n.m, sum_lanes(s.n.d, lanes)}, {s.p.m, sum_lanes(s.p.d, lanes)}};
}

// Adds a disjoint piece of the row: m and d of the negatives, then of the positives.
LONGTAIL_DEVICE void combine(Sides& s, const float4& piece, const Inverses& t) {
  Side n = {piece.x, piece.y}, p = {piece.z, piece.w};
  raise(s.n, n.m, t.n);
  raise(s.p, p.m, t.p);
  raise(n, s.n.m, t.n);
  raise(p, s.p.m, t.p);
  s.n.d += n.d;
  s.p.d += p.d;
}

// The sums of the whole row, in the warp that leads.
LONGTAIL_DEVICE Sides join_threads(Joint& joint, Sides s, const Inverses& t) {
  s = join_lanes(s, t, kWarpSize);
  const float4* slots = joint.exchange(float4{s.n.m, s.n.d, s.p.m, s.p.d});
  if (!joint.leads()) return s;
  Sides row = empty_sides();
#pragma unroll 1
  for (int i = joint.lane(); i < joint.slots(); i += kWarpSize) combine(row, slots[i], t);
  return join_lanes(row, t, kWarpSize);
}

// The end of row `index` by its sums, or of Pass::backward by its statistics. counted: by its class target, if it has
// one. store: whether this thread writes the loss and the statistics.
LONGTAIL_DEVICE SideTerms finish_sides_of(const TwoWayLossArgs& a, int64_t index, Sides s, bool counted, Pass pass,
                                          bool store) {
  float* const stats = a.stats + index * a.stats_stride;
  const int64_t column = a.stats_column_stride;
  if (pass == Pass::backward) {
    s = {{stats[0], stats[column]}, {stats[2 * column], stats[3 * column]}};
    counted = counted && (s.n.m != 0.0f || s.n.d != 0.0f || s.p.m != 0.0f || s.p.d != 0.0f);
  } else {
    counted = counted && a.num_classes > 0 && (!a.joint || s.p.m != -INFINITY);
    if (s.p.m == kLowestExponent) s.p.m = -INFINITY;
    longtail::generic::settle_side(s.n);
    longtail::generic::settle_side(s.p);
  }
  const float v = a.sample_weight != nullptr ? a.sample_weight[index] : 1.0f;
  const auto row =
      longtail::generic::finish_sides(s.n, s.p, a.negative_temperature, a.positive_temperature, a.joint, v);
  if (store && pass != Pass::backward) {
    a.loss[index] = counted ? row.loss : 0.0f;
    stats[0] = counted ? s.n.m : 0.0f;
    stats[column] = counted ? s.n.d : 0.0f;
    stats[2 * column] = counted ? s.p.m : 0.0f;
    stats[3 * column] = counted ? s.p.d : 0.0f;
  }
  const float upstream = pass == Pass::loss ? 0.0f : a.grad_loss[index * a.grad_loss_stride];
  return {finite_max(s.n.m), row.negative * upstream, finite_max(s.p.m), row.positive * upstream, counted};
}

// The class of row `index`, or -1 where it does not count.
LONGTAIL_DEVICE int class_target(const TwoWayLossArgs& a, int64_t index) {
  const int64_t g = a.target[index * a.target_stride];
  const bool ignored = a.ignoring && g == a.ignore_index, valid = g >= 0 && g < a.num_classes;
  LONGTAIL_DEVICE_ASSERT(ignored || valid, "target is out of bounds");
  return ignored || !valid ? -1 : static_cast<int>(g);
}

}  // namespace gpu
}  // namespace longtail
