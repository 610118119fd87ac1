// The regions of memory that a kernel may touch.
#pragma once
#include "shadow.h"

namespace sim {
struct Region {
  std::string name;
  Kind kind = Kind::nothing;
  bool read_only = false;
  unsigned element = 0;  // bytes of an element, for messages
  char* begin = nullptr;
  size_t size = 0;
  size_t phase = 0;         // bytes of the first cell that lie before `begin`
  u8 shift = 4;             // cells are of 2^shift bytes: as many as the smallest access so far
  std::vector<Cell> cells;  // of memory that may be written
  std::vector<u64> moved;   // of device memory: the last instruction that moved a cell
  u64 loaded = 0, stored = 0, requested = 0;
};

// Before a kernel reads or writes n bytes at p, n a power of two.
void access(char* p, u32 n, bool write, bool atomic, const void* pc);
}  // namespace sim
