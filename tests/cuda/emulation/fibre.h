// A stack of its own to run a function on, known to the sanitizers: a thread to ThreadSanitizer, a stack to
// AddressSanitizer. EMULATION_TSAN or EMULATION_ASAN say which of them the program is linked with.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace emulation {

class Fibre {
 public:
  Fibre();  // the thread that is running
  explicit Fibre(size_t stack_bytes);
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The next `resume` enters `function`, which must not return. What the stack held is lost.
  void prepare(void (*function)());
  // Leaves `from`, the fibre that runs, for this one: back when something resumes `from`. Orders no memory.
  void resume(Fibre& from);
  // The first call on a new stack.
  void entered();

 private:
  char* memory_ = nullptr;  // null: the stack is not this one's own
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* stack_pointer_ = nullptr;
  ucontext_t context_ = {};
  void* thread_ = nullptr;      // of ThreadSanitizer
  void* fake_stack_ = nullptr;  // of AddressSanitizer
  Fibre* resumed_by_ = nullptr;
};

// For ThreadSanitizer: all that this fibre did before the first happens before all that another does after the second.
void happens_before(void* address);
void happens_after(void* address);

}  // namespace emulation
