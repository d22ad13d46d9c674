#include "fibre.h"

#include <sys/mman.h>

#include <new>

#ifdef EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// swapcontext makes a system call for the signal mask: some twenty times slower than this.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
#endif

namespace emulation {

namespace {
constexpr size_t kGuardBytes = 4096;  // at the far end of a stack
}

#ifdef EMULATION_TSAN
void happens_before(void* address) { __tsan_release(address); }
void happens_after(void* address) { __tsan_acquire(address); }
#else
void happens_before(void*) {}
void happens_after(void*) {}
#endif

Fibre::Fibre() {
#ifdef EMULATION_TSAN
  thread_ = __tsan_get_current_fiber();
#endif
}

Fibre::Fibre(size_t stack_bytes) : stack_bytes_(stack_bytes) {
  const size_t bytes = stack_bytes + kGuardBytes;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  memory_ = static_cast<char*>(memory);
  stack_ = memory_ + kGuardBytes;
#ifdef EMULATION_TSAN
  thread_ = __tsan_create_fiber(0);
#endif
}

Fibre::~Fibre() {
  if (memory_ == nullptr) return;
#ifdef EMULATION_TSAN
  __tsan_destroy_fiber(thread_);
#endif
  munmap(memory_, stack_bytes_ + kGuardBytes);
}

void Fibre::prepare(void (*function)()) {
  char* const stack = memory_ + kGuardBytes;
#ifdef EMULATION_ASAN
  __asan_unpoison_memory_region(stack, stack_bytes_);  // a launch that failed leaves its frames behind
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + stack_bytes_) - 2;
  *--top = nullptr;  // where `function` would return to
  *--top = reinterpret_cast<void*>(function);
  stack_pointer_ = top - 6;  // six registers
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, function, 0);
#endif
}

void Fibre::resume(Fibre& from) {
  resumed_by_ = &from;
#ifdef EMULATION_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, stack_, stack_bytes_);
#endif
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  emulation_switch(&from.stack_pointer_, stack_pointer_);
#else
  swapcontext(&from.context_, &context_);
#endif
  from.entered();
}

void Fibre::entered() {
#ifdef EMULATION_ASAN
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack_, &stack, &bytes);
  if (resumed_by_->memory_ == nullptr) {  // the host's own stack: nobody knew where it was
    resumed_by_->stack_ = stack;
    resumed_by_->stack_bytes_ = bytes;
  }
#endif
}

}  // namespace emulation
