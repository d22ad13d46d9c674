// The kernels of csrc/cuda on the host: a library for ctypes, and a program that runs launches from a file, for the
// sanitizers. harness.py mirrors the structures and writes the file.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <vector>

#include "hierarchical_loss.cuh"
#include "means.cuh"
#include "scale_grad.cuh"
#include "sigmoid_loss.cuh"
#include "softmax_loss.cuh"
#include "two_way_loss.cuh"

#ifdef EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#endif

using namespace longtail::gpu;
using longtail::MeanDenominatorArgs;
using longtail::MeanLossArgs;

enum class Kind { softmax, sigmoid, scaling, denominator, mean, hierarchical, two_way };

// In a file, addresses are numbers of buffers, from 1.
struct Request {
  SoftmaxLossArgs args;
  SigmoidLossArgs sigmoid;
  ScaleGradArgs scaling;
  MeanDenominatorArgs denominator;
  MeanLossArgs mean;
  HierarchicalLossArgs hierarchical;
  TwoWayLossArgs two_way;
  Kind kind;       // which of them
  int processors;  // for `scaling`
  Plan plan;
  Pass pass;
  emulation::Order order;
  int64_t most_blocks;
};

extern "C" {

// In the order of harness.STRUCTURES.
int64_t size_of(int which) {
  const size_t sizes[] = {sizeof(SoftmaxLossArgs), sizeof(SigmoidLossArgs),
                          sizeof(ScaleGradArgs),   sizeof(MeanDenominatorArgs),
                          sizeof(MeanLossArgs),    sizeof(HierarchicalLossArgs),
                          sizeof(TwoWayLossArgs),  sizeof(Plan),
                          sizeof(Problem),         sizeof(Device),
                          sizeof(Request)};
  return static_cast<int64_t>(sizes[which]);
}

void describe(const SoftmaxLossArgs* args, Pass pass, Problem* problem) { *problem = problem_of(*args, pass); }
void describe_sigmoid(const SigmoidLossArgs* args, Pass pass, Problem* problem) { *problem = problem_of(*args, pass); }
void describe_hierarchical(const HierarchicalLossArgs* args, Pass pass, Problem* problem) {
  *problem = problem_of(*args, pass);
}
void describe_two_way(const TwoWayLossArgs* args, Pass pass, Problem* problem) { *problem = problem_of(*args, pass); }
void choose_hierarchical_plan(const Problem* problem, const Device* device, Plan* plan) {
  *plan = hierarchical_plan_of(*problem, *device);
}
void choose_sigmoid_plan(const Problem* problem, const Device* device, Plan* plan) {
  *plan = sigmoid_plan_of(*problem, *device);
}
void choose_sigmoid_pixels_plan(const Problem* problem, const Device* device, Plan* plan) {
  *plan = sigmoid_pixels_plan_of(*problem, *device);
}
void choose_plan(const Problem* problem, const Device* device, Plan* plan) {
  *plan = softmax_plan_of(*problem, *device);
}
void choose_mean_plan(int64_t rows, const Device* device, Plan* plan) { *plan = mean_plan_of(rows, *device); }
int64_t bytes_of_plan(const Plan* plan, const Problem* problem) {
  return problem->images ? pixel_shared_bytes(*plan, *problem) : shared_bytes(*plan, *problem);
}

// "" or why it failed.
const char* run_request(const Request* request) {
  static std::string failure;
  failure.clear();
  emulation::control.order = request->order;
  emulation::control.most_blocks = request->most_blocks;
  try {
    switch (request->kind) {
      case Kind::softmax: {
        Plan plan = request->plan;  // one that the tests chose says nothing of shared memory
        const Problem problem = problem_of(request->args, request->pass);
        plan.shared = static_cast<int>(bytes_of_plan(&plan, &problem));
        softmax_loss_launch(request->args, request->pass, plan, nullptr);
        break;
      }
      case Kind::sigmoid:
        sigmoid_loss_launch(request->sigmoid, request->pass, request->plan, nullptr);
        break;
      case Kind::hierarchical:
        hierarchical_loss_launch(request->hierarchical, request->pass, request->plan, nullptr);
        break;
      case Kind::two_way:
        two_way_loss_launch(request->two_way, request->pass, request->plan, nullptr);
        break;
      case Kind::scaling:
        scale_grad_launch(request->scaling, request->processors, nullptr);
        break;
      case Kind::denominator:
        mean_denominator_launch(request->denominator, request->plan, nullptr);
        break;
      case Kind::mean:
        mean_loss_launch(request->mean, request->plan, nullptr);
        break;
    }
  } catch (const std::exception& e) {
    failure = e.what();
  }
  return failure.c_str();
}
}

namespace {

// As many bytes as the tensor has, as far past a 16-byte boundary: what lies around it is the sanitizer's.
struct Buffer {
  std::unique_ptr<char[]> memory;
  int64_t offset, bytes;
  char* data() const { return memory.get() + offset; }
};

template <typename T>
T read(std::istream& file) {
  T x;
  file.read(reinterpret_cast<char*>(&x), sizeof(x));
  return x;
}

Buffer read_buffer(std::istream& file) {
  Buffer b;
  b.offset = read<int64_t>(file);
  b.bytes = read<int64_t>(file);
  b.memory.reset(new char[b.offset + b.bytes]);
  file.read(b.data(), b.bytes);
#ifdef EMULATION_ASAN
  __asan_poison_memory_region(b.memory.get(), b.offset);
#endif
  return b;
}

template <typename T>
void resolve(T*& address, const std::vector<Buffer>& buffers) {
  const auto number = reinterpret_cast<uintptr_t>(address);
  address = number == 0 ? nullptr : reinterpret_cast<T*>(buffers.at(number - 1).data());
}

void resolve_all(Request& request, const std::vector<Buffer>& buffers) {
  resolve(request.scaling.grad, buffers);
  resolve(request.scaling.grad_loss, buffers);
  resolve(request.scaling.target, buffers);
  resolve(request.denominator.target, buffers);
  resolve(request.denominator.weight, buffers);
  resolve(request.denominator.result, buffers);
  resolve(request.mean.loss, buffers);
  resolve(request.mean.denominator, buffers);
  resolve(request.mean.mean, buffers);
  resolve(request.mean.divisor, buffers);
  SoftmaxLossArgs& a = request.args;
  resolve(a.logits, buffers);
  resolve(a.target, buffers);
  resolve(a.dense_target, buffers);
  resolve(a.weight, buffers);
  resolve(a.class_bias, buffers);
  resolve(a.class_margin, buffers);
  resolve(a.class_scale, buffers);
  resolve(a.target_scale, buffers);
  resolve(a.class_mitigation, buffers);
  resolve(a.target_terms, buffers);
  resolve(a.sample_weight, buffers);
  resolve(a.weight_sum, buffers);
  resolve(a.grad_loss, buffers);
  resolve(a.loss, buffers);
  resolve(a.stats, buffers);
  resolve(a.grad, buffers);
  resolve(a.row_grad, buffers);
  SigmoidLossArgs& b = request.sigmoid;
  resolve(b.logits, buffers);
  resolve(b.target, buffers);
  resolve(b.dense_target, buffers);
#define LONGTAIL_RESOLVED(name, length) resolve(b.name, buffers);
  LONGTAIL_SIGMOID_VECTORS(LONGTAIL_RESOLVED)
#undef LONGTAIL_RESOLVED
  resolve(b.grad_loss, buffers);
  resolve(b.loss, buffers);
  resolve(b.grad, buffers);
  HierarchicalLossArgs& c = request.hierarchical;
  resolve(c.logits, buffers);
  resolve(c.target, buffers);
  resolve(c.path, buffers);
  resolve(c.node_begin, buffers);
  resolve(c.node_end, buffers);
  resolve(c.node_weight, buffers);
  resolve(c.order, buffers);
  resolve(c.position, buffers);
  resolve(c.weight, buffers);
  resolve(c.class_bias, buffers);
  resolve(c.sample_weight, buffers);
  resolve(c.grad_loss, buffers);
  resolve(c.loss, buffers);
  resolve(c.stats, buffers);
  resolve(c.grad, buffers);
  TwoWayLossArgs& d = request.two_way;
  resolve(d.logits, buffers);
  resolve(d.target, buffers);
  resolve(d.dense_target, buffers);
  resolve(d.class_bias, buffers);
  resolve(d.sample_weight, buffers);
  resolve(d.grad_loss, buffers);
  resolve(d.loss, buffers);
  resolve(d.stats, buffers);
  resolve(d.grad, buffers);
}

}  // namespace

std::set<std::string> words_of(const char* variable) {
  const char* const text = getenv(variable);
  std::istringstream words(text ? text : "");
  return {std::istream_iterator<std::string>(words), {}};
}

// Under AddressSanitizer, nothing may read the logits of rows that are ignored, or have the target EMULATION_HIDDEN.
template <typename Args>
void hide_ignored([[maybe_unused]] const Args& a, [[maybe_unused]] bool hidden) {
#ifdef EMULATION_ASAN
  if constexpr (requires { a.pixels; }) {
    if (a.pixels > 0) return;  // they are read together with their neighbours
  }
  const char* const target = getenv("EMULATION_HIDDEN");
  const int64_t unseen = target ? atoll(target) : a.ignore_index;
  const int64_t size = element_size(a.storage);
  for (int64_t i = 0; i < a.rows && a.target != nullptr; ++i) {
    if (a.target[i * a.target_stride] != unseen || a.grad == a.logits) continue;
    const char* const row = static_cast<const char*>(a.logits) + i * a.logits_stride * size;
    const auto set = hidden ? __asan_poison_memory_region : __asan_unpoison_memory_region;
    set(row, a.num_classes * size);
  }
#endif
}

// harness REQUESTS RESULTS: the buffers after all requests go to RESULTS, the barriers met to standard output.
int main(int count, char** arguments) {
  if (count != 3) return 2;
  std::ifstream file(arguments[1], std::ios::binary);
  std::vector<Buffer> buffers(static_cast<size_t>(read<int64_t>(file)));
  for (Buffer& b : buffers) b = read_buffer(file);
  emulation::control.unordered = words_of("EMULATION_UNORDERED");
  emulation::control.skipped = words_of("EMULATION_SKIPPED");
  for (int64_t left = read<int64_t>(file); left > 0; --left) {
    auto request = read<Request>(file);
    resolve_all(request, buffers);
    hide_ignored(request.args, true);
    hide_ignored(request.hierarchical, true);
    hide_ignored(request.two_way, true);
    if (request.sigmoid.pixels == 0) hide_ignored(request.sigmoid, true);  // pixels share what is read at once
    const char* failure = run_request(&request);
    hide_ignored(request.args, false);
    hide_ignored(request.hierarchical, false);
    hide_ignored(request.two_way, false);
    if (request.sigmoid.pixels == 0) hide_ignored(request.sigmoid, false);
    if (*failure != '\0') {
      fprintf(stderr, "launch failed: %s\n", failure);
      return 1;
    }
  }
  for (const std::string& barrier : emulation::control.met) printf("%s\n", barrier.c_str());
  std::ofstream results(arguments[2], std::ios::binary);
  for (const Buffer& b : buffers) results.write(b.data(), b.bytes);
  return 0;
}
