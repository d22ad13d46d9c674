// The CPU loops of one instruction set, LONGTAIL_KERNELS, over odd numbers: under UndefinedBehaviorSanitizer, whose
// first report ends the program.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

using namespace longtail;

namespace {

constexpr int64_t kRows = 96, kPixels = 16;  // rows: images of kPixels, where there are pixels
constexpr double kHuge = std::numeric_limits<double>::max(), kTiny = std::numeric_limits<double>::denorm_min();
const double kOdd[] = {NAN,     INFINITY, -INFINITY, kHuge, -kHuge, kTiny, -kTiny, -0.0,   1e30,  -1e30, 1e-40,
                       65504.0, -65504.0, -1e4,      1e4,   88.0,   -88.0, -87.0,  -708.0, 709.0, -710.0};
constexpr int64_t kOdds = sizeof(kOdd) / sizeof(kOdd[0]);

// Rows with one odd number among moderate ones, then rows of random bits.
double number(int64_t row, int64_t j, int64_t classes) {
  if (j == row * 7 % classes) return kOdd[row % kOdds];
  return static_cast<double>((row * 31 + j * 17) % 101) / 25.0 - 2.0;
}

float to_float(double x) {
  if (std::fabs(x) > std::numeric_limits<float>::max()) return x > 0 ? INFINITY : -INFINITY;
  return static_cast<float>(x);
}

size_t size_of(Storage storage) {
  if (storage == Storage::float64) return 8;
  return storage == Storage::float32 ? 4 : 2;
}

void put(std::vector<char>& buffer, Storage storage, int64_t place, double x) {
  const float narrow = to_float(x);
  if (storage == Storage::float64) memcpy(&buffer[place * 8], &x, 8);
  if (storage == Storage::float32) memcpy(&buffer[place * 4], &narrow, 4);
  if (size_of(storage) == 2) {  // bfloat16, or as many bits of a float16
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    const auto top = static_cast<uint16_t>(bits >> 16);
    memcpy(&buffer[place * 2], &top, 2);
  }
}

std::vector<char> logits_of(Storage storage, bool images, int64_t classes) {
  std::vector<char> buffer(kRows * classes * size_of(storage));
  uint32_t state = 1;
  for (char& byte : buffer) byte = static_cast<char>((state = state * 1664525u + 1013904223u) >> 24);
  for (int64_t i = 0; i < kRows * 2 / 3; ++i) {
    for (int64_t j = 0; j < classes; ++j) {
      const int64_t image = i / kPixels, pixel = i % kPixels;
      put(buffer, storage, images ? (image * classes + j) * kPixels + pixel : i * classes + j, number(i, j, classes));
    }
  }
  return buffer;
}

std::vector<char> vector_of(Storage wide, int64_t length, bool odd) {
  std::vector<char> buffer(length * size_of(wide));
  for (int64_t k = 0; k < length; ++k)
    put(buffer, wide, k, odd ? kOdd[k % kOdds] : 0.5 + 0.01 * static_cast<double>(k));
  return buffer;
}

enum class Tail { none, scales, seesaw, all };

struct Problem {
  Storage storage, wide;
  bool images;
  int64_t classes;
  std::vector<char> logits, weight, odd, each, upstream;
  std::vector<char> loss, stats, grad, scratch, row_grad;
  std::vector<int64_t> target;

  Problem(Storage s, bool of_images, int64_t of_classes)
      : storage(s),
        wide(s == Storage::float64 ? s : Storage::float32),
        images(of_images),
        classes(of_classes),
        logits(logits_of(s, of_images, of_classes)),
        weight(vector_of(wide, classes, false)),
        odd(vector_of(wide, classes, true)),
        each(vector_of(wide, kRows, false)),
        upstream(vector_of(wide, kRows, true)),
        loss(kRows * classes * 8),
        stats(kRows * 5 * 8),
        grad(logits.size()),
        scratch(classes * kLongestStretch * 8),
        row_grad(vector_of(wide, kRows * 5, true)) {
    for (int64_t i = 0; i < kRows; ++i) target.push_back(i % 11 == 3 ? -100 : i * 5 % classes);
  }

  template <typename Args>
  Args shared() {
    Args a = {};
    a.storage = storage;
    a.num_classes = classes;
    a.pixels = images ? kPixels : 0;
    a.logits = logits.data();
    a.target = target.data();
    a.target_stride = 1;
    a.logits_stride = a.grad_stride = images ? classes * kPixels : classes;
    a.logits_class_stride = a.grad_class_stride = images ? kPixels : 1;
    a.grad_loss = upstream.data();
    a.grad_loss_stride = 1;
    a.ignore_index = -100;
    a.grad = grad.data();
    a.loss = loss.data();
    return a;
  }
};

// Options of classes and targets: one that has loops of its own, or all.
void set_tail(SoftmaxLossArgs& a, Problem& p, Tail tail) {
  if (tail == Tail::scales || tail == Tail::all) a.class_scale = a.target_scale = p.weight.data();
  if (tail == Tail::scales) a.class_bias = p.weight.data();
  if (tail == Tail::seesaw || tail == Tail::all) {
    a.class_mitigation = p.odd.data();
    a.options.compensation = 1.5;
  }
}

void run_softmax(const Kernels& kernels, Problem& p, bool options, Tail tail) {
  auto a = p.shared<SoftmaxLossArgs>();
  a.stretch = 32;
  a.stats = p.stats.data();
  a.stats_stride = p.images ? 1 : 5;
  a.stats_column_stride = p.images ? kRows : 1;
  a.row_grad = p.row_grad.data();
  a.options.scale = a.options.cross_entropy_coefficient = 1.0;
  if (options) {
    a.weight = a.class_bias = a.class_margin = p.weight.data();
    a.sample_weight = p.each.data();
    a.options.label_smoothing = 0.1;
    a.options.focal_gamma = 1.5;
    a.options.complement_coefficient = -0.02;
    a.options.scale = 1.3;
    a.options.softcap = 8.0;
    a.options.z_loss = 0.02;
    a.weight_sum = 40.0;
  }
  set_tail(a, p, tail);
  for (const Pass pass : {Pass::loss, Pass::backward, Pass::loss_and_grad}) {
    const bool scratch = pass == Pass::loss_and_grad && (p.images || options);
    kernels.softmax_loss_rows(a, pass, 0, kRows, scratch ? p.scratch.data() : nullptr);
  }
  SoftmaxLossArgs inplace = a;
  std::vector<char> overwritten = p.logits;
  inplace.logits = inplace.grad = overwritten.data();
  inplace.keeps = !p.images && !options && tail != Tail::none;
  const bool kept_apart = inplace.keeps && p.storage != p.wide;
  kernels.softmax_loss_rows(inplace, Pass::loss_and_grad, 0, kRows,
                            p.images || options || kept_apart ? p.scratch.data() : nullptr);
  if (p.images) return;
  SoftmaxLossArgs dense = a;
  dense.dense = true;
  dense.dense_target = p.logits.data();
  dense.dense_stride = p.classes;
  for (const bool scaled : {true, false}) {
    for (const Pass pass : {Pass::loss, Pass::backward}) kernels.softmax_loss_rows(dense, pass, 0, kRows, nullptr);
    if (scaled) dense.options.scale = 1.0, dense.options.softcap = 0.0;
  }
  a.loss = nullptr;
  for (const void* terms : {static_cast<const void*>(nullptr), static_cast<const void*>(p.row_grad.data())}) {
    a.target_terms = terms;
    for (const Pass pass : {Pass::accumulate, Pass::apply}) kernels.softmax_loss_rows(a, pass, 0, kRows, nullptr);
  }
}

void run_sigmoid(const Kernels& kernels, Problem& p, double gamma, bool dense) {
  auto a = p.shared<SigmoidLossArgs>();
  a.alpha_positive = 0.25;
  a.alpha_negative = 0.75;
  a.gamma = gamma;
  a.ignoring = true;
  a.weight = a.pos_weight = p.weight.data();
  if (dense) {
    a.target = nullptr;
    a.dense_target = p.logits.data();
    a.dense_stride = a.logits_stride;
    a.dense_class_stride = a.logits_class_stride;
  }
  for (const Pass pass : {Pass::loss, Pass::backward, Pass::loss_and_grad}) {
    kernels.sigmoid_loss_rows(a, pass, 0, kRows);
  }
}

void run_scaling(const Kernels& kernels, Problem& p) {
  const auto shared = p.shared<SoftmaxLossArgs>();
  ScaleGradArgs a = {};
  a.storage = p.storage;
  a.num_classes = p.classes;
  a.pixels = shared.pixels;
  a.grad = p.logits.data();
  a.grad_stride = shared.grad_stride;
  a.grad_class_stride = shared.grad_class_stride;
  a.grad_loss = p.upstream.data();
  a.grad_loss_stride = 1;
  a.target = p.target.data();
  a.target_stride = 1;
  a.ignore_index = -100;
  kernels.scale_grad_rows(a, 0, kRows);
}

}  // namespace

int main() {
  const Kernels& kernels = LONGTAIL_KERNELS;
  for (const Storage storage : {Storage::float64, Storage::float32, Storage::bfloat16, Storage::float16}) {
    for (const auto& [images, classes] : {std::pair{false, 37}, {true, 37}, {false, 67}, {true, 67}}) {
      Problem p(storage, images, classes);
      for (const bool options : {false, true}) {
        for (const Tail tail : {Tail::none, Tail::scales, Tail::seesaw, Tail::all}) {
          run_softmax(kernels, p, options, tail);
        }
      }
      for (const double gamma : {0.0, 1.5, 2.0}) {
        for (const bool dense : {false, true}) run_sigmoid(kernels, p, gamma, dense);
      }
      run_scaling(kernels, p);
    }
  }
  printf("%s is defined\n", kernels.isa);
}
