// What a block does with its pixels of images [N, C, P]. A pixel is a row of row.cuh.
#pragma once

#include "pixel_plan.h"
#include "row_ends.cuh"

namespace longtail {
namespace gpu {

// Classes of a thread in one running sum: longer ones would lose digits.
constexpr int kSummedApart = 1024;

// The work of one thread of a block that has `lanes` neighbouring vectors of kCount pixels. Of each of them, `parts`
// threads take every parts-th group of kGroup classes; for what is a pixel's alone, a thread takes pixels as they come.
template <typename Z, int kCount, bool kExtras>
struct PixelBlock {
  static constexpr int kGroup = classes_of(kCount);
  static constexpr int kPerWord = Vector<Z, kCount>::kPerWord;
  using Held = Vector<Z, kCount>[kGroup];
  using Options = Elements<kExtras>;
  const SoftmaxLossArgs& a;
  const Pass pass;
  const Elements<kExtras> elements;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lanes, parts, lane, part, pixels, groups;
  // Shared memory, indexed by slot_of(pixel); `slots` for each part.
  float4* const slots;  // m, d, t, U of a thread's classes; then of the first part: coefficients m, a, b, S
  float4* const terms;  // of the target; only where Elements::by_target
  Z* const kept;        // [C, lanes] vectors, null if none are kept
  float* const given;   // the target's logit, or where it is wanted early its u_g; then coefficient `target`
  int* const target;    // -1 where a pixel does not count or does not exist
  int64_t first_row = 0;
  bool exists = false;  // whether this thread's vector does, of which the addresses are, of class 0
  const Z* logits = static_cast<const Z*>(a.logits);
  Z* grad = static_cast<Z*>(a.grad);

  LONGTAIL_DEVICE PixelBlock(const SoftmaxLossArgs& args, Pass pass_, int lanes_, bool keeps)
      : a(args),
        pass(pass_),
        elements(args, 0),
        lanes(lanes_),
        parts(threads >> log2_of(lanes_)),
        lane(thread & (lanes_ - 1)),
        part(thread >> log2_of(lanes_)),
        pixels(lanes_ * kCount),
        groups(static_cast<int>((args.num_classes + kGroup - 1) / kGroup)),
        slots(dynamic_shared<float4>()),
        terms(slots + parts * slot_of(pixels)),
        kept(keeps ? reinterpret_cast<Z*>(behind_terms()) : nullptr),
        given(reinterpret_cast<float*>(behind_terms()) + kept_floats(keeps)),
        target(reinterpret_cast<int*>(given + slot_of(pixels))) {}

  LONGTAIL_DEVICE float4* behind_terms() const {
    return slots + (kExtras && elements.by_target ? parts + 1 : parts) * slot_of(pixels);
  }

  LONGTAIL_DEVICE int kept_floats(bool keeps) const {
    return keeps ? static_cast<int>(a.num_classes) * pixels * static_cast<int>(sizeof(Z)) / 4 : 0;
  }

  LONGTAIL_DEVICE void go_to(int64_t unit) {
    first_row = unit * pixels;
    const int64_t row = first_row + lane * kCount;
    exists = row < a.rows;
    if (!exists) return;
    const int64_t image = row / a.pixels, pixel = row - image * a.pixels;
    logits = static_cast<const Z*>(a.logits) + image * a.logits_stride + pixel;
    grad = static_cast<Z*>(a.grad) + (image * a.grad_stride + pixel);
  }

  LONGTAIL_DEVICE StatsPlace stats_of(int64_t row) const {
    return {a.stats + row * a.stats_stride, a.stats_column_stride};
  }

  // Whether the sweep for the stats needs what the target's logit becomes.
  LONGTAIL_DEVICE bool early() const { return kExtras && (elements.smoothing || elements.by_target); }

  LONGTAIL_DEVICE float logit_of(int64_t row, int g) const {
    const int64_t image = row / a.pixels;
    const Z* z = static_cast<const Z*>(a.logits) + image * a.logits_stride + (row - image * a.pixels);
    return to_float(z[g * a.logits_class_stride]);
  }

  // Of pixel i of this thread's vector. Neighbours, which saves registers; without extras loops are shorter otherwise.
  LONGTAIL_DEVICE int own_slot(int i) const {
    return kExtras ? slot_of(lane * kCount) + i : slot_of(lane * kCount + i);
  }

  LONGTAIL_DEVICE void put_terms(int slot, const Terms& t) const {
    if (kExtras && elements.by_target) terms[slot] = float4{t.scale, t.mitigation, t.reference, 0.0f};
  }

  LONGTAIL_DEVICE Terms terms_of(int i, const Options& options) const {
    if (!kExtras || !options.by_target) return no_terms();
    const float4 t = terms[own_slot(i)];
    return {t.x, t.y, t.z};
  }

  // The group's logits; 0 for classes that do not exist.
  LONGTAIL_DEVICE void load(Held& held, int group) const {
    const Z* z = logits + static_cast<int64_t>(group) * kGroup * a.logits_class_stride;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      held[k] = {};
      if (exists && group * kGroup + k < a.num_classes) held[k].load(z);
      z += a.logits_class_stride;
    }
  }

  LONGTAIL_DEVICE Z* kept_at(int cls) const { return kept + (cls * lanes + lane) * kCount; }

  LONGTAIL_DEVICE void keep(const Held& held, int group) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int cls = group * kGroup + k;
      if (cls < a.num_classes) held[k].keep(kept_at(cls));
    }
  }

  LONGTAIL_DEVICE void look_up(Held& held, int group) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int cls = group * kGroup + k;
      held[k] = {};
      if (cls < a.num_classes) held[k].load(kept_at(cls));
    }
  }

  // Classes beyond the last whole group come one by one, always at the front.
  static LONGTAIL_DEVICE void advance(Held& held) {
#pragma unroll
    for (int k = 0; k + 1 < kGroup; ++k) held[k] = held[k + 1];
  }

  // Before the sweep for the stats: the targets, and what of them it needs early.
  LONGTAIL_DEVICE void load_targets() const {
    for (int pixel = thread; pixel < pixels; pixel += threads) {
      const int64_t row = first_row + pixel;
      Row found = {};
      found.target = -1;
      if (row < a.rows) found = load_target(a, row, pass);
      const int g = target[slot_of(pixel)] = found.target;
      if (!early()) continue;
      if (g >= 0) add_scalars<kExtras>(a, found, logit_of(row, g), Pass::loss);
      given[slot_of(pixel)] = found.u_g;
      put_terms(slot_of(pixel), found.terms);
    }
  }

  // kClasses classes of one pixel from class `cls` on; whoever meets the target takes its logit down.
  template <int kClasses>
  LONGTAIL_DEVICE void add_classes(Stats& s, float (&u)[kClasses], int cls, int g, int i,
                                   const Options& options) const {
    if (!early() && static_cast<unsigned>(g - cls) < static_cast<unsigned>(kClasses)) {
      float logit = u[0];
#pragma unroll
      for (int k = 1; k < kClasses; ++k) logit = select(g - cls == k, u[k], logit);
      given[own_slot(i)] = logit;
    }
    options.effective(u, cls, g, terms_of(i, options), s);
    options.replace(u, g - cls, -INFINITY);
    add(s, u);
  }

  // The first kClasses of `held`, of all its pixels.
  template <int kClasses>
  LONGTAIL_DEVICE void add_vectors(Stats (&s)[kCount], const int (&g)[kCount], const Held& held, int cls,
                                   const Options& options) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kPerWord) {
      float x[kClasses][kPerWord];
#pragma unroll
      for (int k = 0; k < kClasses; ++k) held[k].get_word(i, x[k]);
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        float u[kClasses];
#pragma unroll
        for (int k = 0; k < kClasses; ++k) u[k] = x[k][j];
        add_classes(s[i + j], u, cls, g[i + j], i + j, options);
      }
    }
  }

  LONGTAIL_DEVICE void add_group(Stats (&s)[kCount], const int (&g)[kCount], Held& held, int group,
                                 const Options& options) const {
    const int cls = group * kGroup, left = static_cast<int>(a.num_classes) - cls;
    if (left >= kGroup) return add_vectors<kGroup>(s, g, held, cls, options);
    for (int k = 0; k < left; ++k) {
      add_vectors<1>(s, g, held, cls + k, options);
      advance(held);
    }
  }

  // Moves the sums so far into this thread's slots, where there may be some already.
  LONGTAIL_DEVICE void put_down(Stats (&s)[kCount], bool more) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float4& slot = slots[part * slot_of(pixels) + own_slot(i)];
      if (more) s[i] = combine({slot.x, slot.y, slot.z, s[i].u_g, slot.w}, s[i]);
      slot = float4{s[i].m, s[i].d, s[i].t, s[i].U};
      s[i] = empty_stats(s[i].u_g);
    }
  }

  // The stats of this thread's classes; the next group is on its way while one is added. `held`: its first group.
  LONGTAIL_DEVICE void sweep_stats(Held& held) const {
    elements.shaped() ? sweep_stats(held, elements) : sweep_stats(held, elements.unshaped());
  }

  LONGTAIL_DEVICE void sweep_stats(Held& held, const Options& options) const {
    Stats s[kCount];
    int g[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int slot = own_slot(i);
      g[i] = target[slot];
      s[i] = empty_stats(early() ? given[slot] : 0.0f);
    }
    bool more = false;
    int summed = 0;
    for (int group = part; group < groups; group += parts) {
      Held next;
      load(next, group + parts);
      if (kept != nullptr) keep(held, group);
      add_group(s, g, held, group, options);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) held[k] = next[k];
      if (++summed == kSummedApart / kGroup) {
        put_down(s, more);
        more = true;
        summed = 0;
      }
    }
    put_down(s, more);
  }

  LONGTAIL_DEVICE Stats joined(int slot, float u_g) const {
    Stats s = empty_stats(u_g);
    for (int i = 0; i < parts; ++i) {
      const float4 x = slots[i * slot_of(pixels) + slot];
      s = combine(s, {x.x, x.y, x.z, u_g, x.w});
    }
    return s;
  }

  // Losses and stats of the block's pixels, and the coefficients of their gradients.
  LONGTAIL_DEVICE void finish() const {
    for (int pixel = thread; pixel < pixels; pixel += threads) {
      const int64_t index = first_row + pixel;
      if (index >= a.rows) break;
      const int slot = slot_of(pixel);
      if (pass == Pass::backward) target[slot] = load_target(a, index, pass).target;
      const int g = target[slot];
      const StatsPlace place = stats_of(index);
      Grad c = {};
      if (g >= 0) {
        const bool again = kExtras && pass == Pass::backward && elements.by_target;
        const float found = again ? logit_of(index, g) : pass == Pass::backward ? 0.0f : given[slot];
        Row row = {index, true, g, 0.0f, 0.0f, 0.0f, 0.0f};
        add_scalars<kExtras>(a, row, found, pass);
        if (again) put_terms(slot, row.terms);
        if (early()) row.u_g = found;
        const Stats s = pass == Pass::backward ? Stats{} : joined(slot, row.u_g);
        c = finish_at(a, row, s, pass, true, place);
      } else {
        ignore_at(a, index, pass, place);
      }
      slots[slot] = float4{c.m, c.a, c.b, c.S};
      given[slot] = c.target;
    }
  }

  // The gradient of the first kClasses of `held`, in place.
  template <int kClasses>
  LONGTAIL_DEVICE void gradient(Held& held, const Grad (&c)[kCount], const int (&g)[kCount], int cls,
                                const Options& options) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kPerWord) {
      float x[kClasses][kPerWord];
#pragma unroll
      for (int k = 0; k < kClasses; ++k) held[k].get_word(i, x[k]);
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        float u[kClasses];
#pragma unroll
        for (int k = 0; k < kClasses; ++k) u[k] = x[k][j];
        options.gradient(u, cls, g[i + j], terms_of(i + j, options), c[i + j]);
#pragma unroll
        for (int k = 0; k < kClasses; ++k) x[k][j] = g[i + j] < 0 ? 0.0f : u[k];
      }
#pragma unroll
      for (int k = 0; k < kClasses; ++k) held[k].set_word(i, x[k]);
    }
  }

  LONGTAIL_DEVICE void store_group(Held& held, const Grad (&c)[kCount], const int (&g)[kCount], int group,
                                   const Options& options) const {
    const int cls = group * kGroup, left = static_cast<int>(a.num_classes) - cls;
    Z* to = grad + cls * a.grad_class_stride;
    if (left >= kGroup) {
      gradient<kGroup>(held, c, g, cls, options);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) held[k].store(to + k * a.grad_class_stride);
      return;
    }
    for (int k = 0; k < left; ++k) {
      gradient<1>(held, c, g, cls + k, options);
      held[0].store(to + k * a.grad_class_stride);
      advance(held);
    }
  }

  // The gradient of this thread's classes, last group first: what a sweep for the stats read last is still in cache.
  LONGTAIL_DEVICE void sweep_grad() const {
    elements.shaped() ? sweep_grad(elements) : sweep_grad(elements.unshaped());
  }

  LONGTAIL_DEVICE void sweep_grad(const Options& options) const {
    if (!exists) return;
    Grad c[kCount];
    int g[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int slot = own_slot(i);
      const float4 first = slots[slot];
      c[i] = Grad{first.x, first.y, first.z, first.w, given[slot]};
      g[i] = target[slot];
    }
    for (int group = part + ((groups - 1 - part) & ~(parts - 1)); group >= 0; group -= parts) {
      Held held;
      if (kept != nullptr) {
        look_up(held, group);
      } else {
        load(held, group);
      }
      store_group(held, c, g, group, options);
    }
  }
};

}  // namespace gpu
}  // namespace longtail
