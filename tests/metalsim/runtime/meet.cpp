// Where threads meet: barriers and simdgroup operations.
#include <cstring>
#include <map>

#include "runtime.h"

namespace sim {
std::string places() {
  std::map<std::string, std::vector<u32>> at;
  for (const Fiber& f : fibers)
    at[f.state == State::returned ? "returned from the kernel"
       : f.op ? format(f.state == State::ready ? "after %s at %s:%d" : "in %s at %s:%d", f.op,
                       f.file, f.line)
              : "before any barrier"]
        .push_back(f.index);
  std::string text;
  for (const auto& [place, threads] : at) {
    text += format("\n  %zu thread(s) %s:", threads.size(), place.c_str());
    for (size_t i = 0; i < threads.size() && i < 8; i++) text += format(" %u", threads[i]);
    if (threads.size() > 8) text += format(" ... %u", threads.back());
  }
  return text;
}

static void arrive(const char* op, const char* file, int line, unsigned flags) {
  fail_if_late();
  current->op = op;
  current->file = file;
  current->line = line;
  current->flags = flags;
}

static void wait(State state) {
  current->state = state;
  leave();
}

static bool same_place(const Fiber& a, const Fiber& b) {
  return a.line == b.line && a.flags == b.flags && !strcmp(a.op, b.op) && !strcmp(a.file, b.file);
}

void finish(Simdgroup& s) {
  const Fiber* one = nullptr;
  for (u32 i : s.turns)
    if (s.arrived >> i % 32 & 1) {
      if (one && !same_place(*one, fibers[i]))
        fail("lanes of one simdgroup are in different simdgroup operations; the last one is " +
             name(*current) + places());
      one = &fibers[i];
    }
  s.lanes[s.phase].active = s.arrived;
  s.arrived = 0;
  s.phase ^= 1;
  count_moves(s);
  for (u32 i : s.turns)
    if (fibers[i].state == State::in_simdgroup) wake(fibers[i]);
}

static msl_lanes& exchange(const void* value, unsigned size) {
  Simdgroup& s = simdgroups[current->simdgroup];
  msl_lanes& lanes = s.lanes[s.phase];
  memcpy(lanes.value[current->lane], value, size);
  s.arrived |= 1u << current->lane;
  if (s.arrived == s.alive)
    finish(s);
  else
    wait(State::in_simdgroup);
  return lanes;
}
}  // namespace sim

using namespace sim;

extern "C" {
void msl_threadgroup_barrier(unsigned flags, const char* file, int line) {
  arrive("threadgroup_barrier", file, line, flags);
  if (++arrived < fibers.size()) return wait(State::at_barrier);
  for (const Fiber& f : fibers)
    if (!same_place(f, *current))
      fail("threads of one threadgroup wait at different barriers; the last one is " +
           name(*current) + places());
  arrived = 0;
  epochs.pass(flags);
  for (Simdgroup& s : simdgroups) count_moves(s);
  for (u32 i : turns)
    if (fibers[i].state == State::at_barrier) wake(fibers[i]);
}

void msl_simdgroup_barrier(unsigned flags, const char* file, int line) {
  arrive("simdgroup_barrier", file, line, flags);
  Simdgroup& s = simdgroups[current->simdgroup];
  if ((s.arrived | 1u << current->lane) == s.alive) s.epochs.pass(flags);
  exchange(&flags, sizeof flags);
}

const msl_lanes* msl_exchange(const void* value, unsigned size, const char* op, const char* file,
                              int line) {
  arrive(op, file, line, 0);
  return &exchange(value, size);
}
}
