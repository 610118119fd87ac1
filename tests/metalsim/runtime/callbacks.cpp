// What clang's thread and undefined-behaviour sanitizers call in an instrumented kernel.
#include <cstring>

#include "memory.h"

using namespace sim;
#define PC __builtin_return_address(0)

extern "C" {
void msl_atomic(const volatile void* p, unsigned size, bool read, bool write, const void* pc) {
  if (checking && read) access((char*)p, size, false, true, pc);
  if (checking && write) access((char*)p, size, true, true, pc);
}

#define ACCESS(kind, n)                                                             \
  void __tsan_##kind##read##n(void* p) { access((char*)p, n, false, false, PC); }   \
  void __tsan_##kind##write##n(void* p) { access((char*)p, n, true, false, PC); }   \
  void __tsan_##kind##read_write##n(void* p) {                                      \
    access((char*)p, n, false, false, PC);                                          \
    access((char*)p, n, true, false, PC);                                           \
  }
#define SIZES(kind) ACCESS(kind, 1) ACCESS(kind, 2) ACCESS(kind, 4) ACCESS(kind, 8) ACCESS(kind, 16)
SIZES()
SIZES(unaligned_)
SIZES(volatile_)
SIZES(unaligned_volatile_)

static void each(const void* p, size_t n, bool write, const void* pc) {
  const bool words = ((uintptr_t)p | n) % 4 == 0;
  for (size_t i = 0; i < n; i += words ? 4 : 1)
    access((char*)p + i, words ? 4 : 1, write, false, pc);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  each(from, n, false, PC);
  each(to, n, true, PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  each(from, n, false, PC);
  each(to, n, true, PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int byte, size_t n) {
  each(to, n, true, PC);
  return memset(to, byte, n);
}
void __tsan_init() {}

struct Site {
  const char* file;
  u32 line, column;
};
#define UNDEFINED(kind, what)                                                        \
  void __ubsan_handle_##kind(Site* site, ...) {                                      \
    fail(format(what " at %s:%u by ", site->file, site->line) + name(*current));     \
  }
UNDEFINED(out_of_bounds, "array index out of bounds")
UNDEFINED(type_mismatch_v1, "misaligned or null pointer")
UNDEFINED(shift_out_of_bounds, "shift by a negative or too large amount")
UNDEFINED(divrem_overflow, "integer division by zero or overflow")

// Where clang rounds a float to bfloat: to nearest, ties to even.
__bf16 __truncsfbf2(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint16_t top = nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 rounded;
  memcpy(&rounded, &top, 2);
  return rounded;
}
}
