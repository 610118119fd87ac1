// A GPU on one CPU thread: what the scheduler, the memory and the sanitizers' callbacks share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../include/abi.h"

namespace sim {
using u8 = uint8_t;
using u32 = uint32_t;
using u64 = uint64_t;

enum class State : u8 { ready, at_barrier, in_simdgroup, returned };

struct Fiber : msl_thread {  // one GPU thread
  void* stack_pointer;
  char* stack;  // lowest byte
  State state;
  const char *op, *file;  // where it met others last, or waits for them
  int line;
  unsigned flags;  // of the barrier it waits at
  std::vector<u64> moves;  // accesses of device memory since its simdgroup met last
};

// Barriers order memory in epochs: accesses of two threads in one epoch are unordered.
struct Epochs {
  u32 device = 0, threadgroup = 0;
  void pass(unsigned flags) {
    device += flags & 1;
    threadgroup += flags >> 1 & 1;
  }
};

struct Simdgroup {
  u32 first;           // index of its lane 0
  u32 alive, arrived;  // a bit for each lane
  u32 phase;      // which of `lanes` the next operation fills; lanes may still read the other one
  Epochs epochs;  // passed by simdgroup_barrier
  std::vector<u32> turns;  // its fibers, in the order in which they wake
  msl_lanes lanes[2];
};

// ---- of the launch
extern bool checking;  // the check pass: shadow memory, traffic
extern u32 launch;     // its number

// ---- of the threadgroup that runs; they run one after the other
extern u32 group;  // its index
extern std::vector<Fiber> fibers;
extern std::vector<Simdgroup> simdgroups;
extern std::vector<u32> turns;  // fibers in the order in which they start and wake
extern u32 alive, arrived;      // fibers that have not returned; of them, those at the barrier
extern Epochs epochs;           // passed by threadgroup_barrier
extern Fiber* current;          // the one that runs; null while the scheduler does

constexpr size_t kStack = 128 << 10;
constexpr size_t kThreadgroupMemory = 32 << 10;

// fibers.cpp
void leave();         // back to the scheduler; returns when the fiber is scheduled again
void wake(Fiber& f);  // it may run again

// meet.cpp
void finish(Simdgroup& s);  // every live lane has arrived at one operation
std::string places();  // where every thread of the threadgroup is

// faults.cpp
extern bool failed;
std::string format(const char* form, ...) __attribute__((format(printf, 1, 2)));
std::string name(const Fiber& fiber);     // "thread (0, 0, 0) of threadgroup ..."
std::string code_place(const void* pc);   // a mark that the host replaces by file and line
void give_up(const std::string& what);    // the launch fails
void fail(const std::string& what);       // the same, from within a fiber: never runs on
void fail_if_late();                      // if the launch's time is over
struct Watch {  // while it lives, signals of the kernel and a time limit are faults
  explicit Watch(const void* kernel, double seconds);
  ~Watch();
};

// memory.cpp
void forget_threadgroup_arrays();  // they hold nothing at the start of a threadgroup
void count_moves(Simdgroup& s);    // what its lanes did since they met last
}  // namespace sim
