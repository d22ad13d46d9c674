// The handlers of -fsanitize=alignment,null without libubsan: a misaligned vector access ends a launch, as on a GPU.
#include "scheduler.h"

extern "C" {

struct TypeName {
  uint16_t kind, info;
  char text[1];
};

struct CheckedAccess {
  const char* file;
  uint32_t line, column;
  const TypeName* type;
  unsigned char log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(const CheckedAccess* access, uintptr_t address) {
  const std::string file = access->file;
  const std::string place = file.substr(file.rfind('/') + 1) + ":" + std::to_string(access->line);
  emulation::fail((address == 0 ? "null pointer at " : "misaligned address at ") + place + " for " +
                  access->type->text);
}

void __ubsan_handle_type_mismatch_v1_abort(const CheckedAccess* access, uintptr_t address) {
  __ubsan_handle_type_mismatch_v1(access, address);
}
}
