// Who touched a piece of memory last: initialisation and races.
#pragma once
#include "runtime.h"

namespace sim {
enum class Kind : u8 { device, constant, threadgroup, nothing };

// An access: group + 1 in 24 bits | thread 10 | epoch 14 | epoch of the simdgroup 15 | atomic 1.
struct Stamp {
  u64 bits;
  u64 group() const { return bits >> 40; }
  u32 thread() const { return bits >> 30 & 1023; }
  u32 simdgroup() const { return thread() / 32; }
  u32 epoch() const { return bits >> 16 & 0x3fff; }
  u32 simdgroup_epoch() const { return bits >> 1 & 0x7fff; }
  bool atomic() const { return bits & 1; }
  explicit operator bool() const { return bits; }

  static Stamp now(Kind kind, bool atomic) {
    const Epochs& own = simdgroups[current->simdgroup].epochs;
    const bool device = kind == Kind::device;
    const u64 epoch = device ? epochs.device : epochs.threadgroup;
    const u64 simdgroup_epoch = device ? own.device : own.threadgroup;
    return {(u64)(sim::group + 1) << 40 | (u64)current->index << 30 | (epoch & 0x3fff) << 16 |
            (simdgroup_epoch & 0x7fff) << 1 | atomic};
  }
};
constexpr Stamp kHost = {2};  // written before the launch: of no threadgroup

// Whether nothing orders an earlier access before this one.
inline bool unordered(Stamp before, Stamp now) {
  if (!before.group() || (before.atomic() && now.atomic())) return false;
  if (before.group() != now.group()) return true;
  if (before.thread() == now.thread() || before.epoch() != now.epoch()) return false;
  return before.simdgroup() != now.simdgroup() ||
         before.simdgroup_epoch() == now.simdgroup_epoch();
}

struct Cell {  // of 1 to 16 bytes
  Stamp write;
  // The last reader; the last one that is another thread; the last one in another simdgroup. A
  // write that conflicts with any reader since the last write conflicts with one of these.
  Stamp reads[3];

  // What is wrong with an access now, or null; `earlier` is the one it conflicts with.
  const char* add(Stamp now, bool is_write, Stamp& earlier) {
    if (!is_write && !write) return "read of uninitialised memory";
    if (unordered(write, now)) {
      earlier = write;
      return is_write ? "data race (write after write, no barrier between them)"
                      : "data race (read after write, no barrier between them)";
    }
    if (!is_write) {
      add_reader(now);
      return nullptr;
    }
    for (Stamp read : reads)
      if (unordered(read, now)) {
        earlier = read;
        return "data race (write after read, no barrier between them)";
      }
    write = now;
    if (!now.atomic()) reads[0] = reads[1] = reads[2] = {};
    return nullptr;
  }

 private:
  void add_reader(Stamp now) {
    const Stamp last = reads[0];
    if (last && last.group() != now.group()) {
      reads[1] = reads[2] = last;
    } else if (last) {
      if (last.thread() != now.thread()) reads[1] = last;
      if (last.simdgroup() != now.simdgroup()) reads[2] = last;
    }
    reads[0] = now;
  }
};
}  // namespace sim
