// The threads of a threadgroup as fibers, and the scheduler that runs them in a chosen order.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>

#include "runtime.h"

extern "C" {
msl_thread* msl_current = nullptr;
void msl_switch(void** save, void* to);
}
// Callee-saved registers go onto the old stack and come from the new one.
asm(R"(
.globl msl_switch
msl_switch:
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
)");

namespace sim {
u32 group, alive, arrived;
std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
std::vector<u32> turns;
Epochs epochs;
Fiber* current = nullptr;

enum class Order { forward, reverse, shuffled, random };
static Order order;
static u32 seed;
static void* host;             // stack pointer of the scheduler
static std::deque<u32> ready;  // fibers that can run, next one first
static std::vector<char*> stacks;
static void (*entry)(void**);
static void** arguments;

static u32 draw(u32 n) {  // xorshift: the same numbers from the same seed, everywhere
  seed ^= seed << 13;
  seed ^= seed >> 17;
  seed ^= seed << 5;
  return seed % n;
}

static std::vector<u32> permutation(u32 n) {
  std::vector<u32> p(n);
  for (u32 i = 0; i < n; i++) p[i] = order == Order::reverse ? n - 1 - i : i;
  if (order >= Order::shuffled)
    for (u32 i = n; i > 1; i--) std::swap(p[i - 1], p[draw(i)]);
  return p;
}

void leave() { msl_switch(&current->stack_pointer, host); }

void wake(Fiber& f) {
  f.state = State::ready;
  ready.push_back(f.index);
}

static void start() {  // the first and only frame of a fiber
  entry(arguments);
  current->state = State::returned;
  alive--;
  Simdgroup& s = simdgroups[current->simdgroup];
  s.alive &= ~(1u << current->lane);
  if (s.alive && s.arrived == s.alive) finish(s);  // the others all wait in one operation
  leave();
  abort();
}

static void prepare(Fiber& f) {
  while (stacks.size() <= f.index) {
    const size_t guard = 4096;  // a full stack is a memory fault
    char* p = (char*)mmap(nullptr, kStack + guard, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(p, guard, PROT_NONE);
    stacks.push_back(p + guard);
  }
  f.stack = stacks[f.index];
  f.state = State::ready;
  void** top = (void**)(f.stack + kStack - 64);
  *--top = nullptr;  // start() finds the stack aligned as after a call
  *--top = (void*)start;
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers that msl_switch pops
  f.stack_pointer = top;
}

static u32 ceil_div(u32 n, u32 d) { return (n + d - 1) / d; }

// Makes the fibers of threadgroup `index`. The last one of an axis may be smaller than `size`.
static void set_up(u32 index, const u32* grid, const u32* size) {
  msl_thread t = {};
  for (int i = 0, before = 1; i < 3; i++) {
    t.threadgroups[i] = ceil_div(grid[i], size[i]);
    t.threadgroup_position[i] = index / before % t.threadgroups[i];
    t.size[i] = std::min(size[i], grid[i] - t.threadgroup_position[i] * size[i]);
    t.dispatch_size[i] = size[i];
    t.grid[i] = grid[i];
    before *= t.threadgroups[i];
  }
  const u32 n = t.size[0] * t.size[1] * t.size[2];
  t.simdgroups = ceil_div(n, 32);
  t.dispatch_simdgroups = ceil_div(size[0] * size[1] * size[2], 32);

  group = index;
  epochs = {};
  alive = n;
  arrived = 0;
  simdgroups.resize(t.simdgroups);
  for (u32 i = 0; i < t.simdgroups; i++) {
    Simdgroup& s = simdgroups[i];
    s.first = 32 * i;
    s.alive = s.arrived = s.phase = 0;
    s.epochs = {};
    s.turns.clear();
  }
  fibers.resize(n);
  for (u32 i = 0; i < n; i++) {
    Fiber& f = fibers[i];
    static_cast<msl_thread&>(f) = t;
    f.op = nullptr;
    f.moves.clear();
    const u32 position[] = {i % t.size[0], i / t.size[0] % t.size[1], i / t.size[0] / t.size[1]};
    for (int k = 0; k < 3; k++) {
      f.position_in_threadgroup[k] = position[k];
      f.position_in_grid[k] = t.threadgroup_position[k] * size[k] + position[k];
    }
    f.index = i;
    f.simdgroup = i / 32;
    f.lane = i % 32;
    simdgroups[i / 32].alive |= 1u << i % 32;
    prepare(f);
  }
  turns = permutation(n);
  for (u32 i : turns) simdgroups[i / 32].turns.push_back(i);
  ready.assign(turns.begin(), turns.end());
}

static void run_group() {
  while (!ready.empty()) {
    if (order == Order::random) std::swap(ready.front(), ready[draw(ready.size())]);
    current = &fibers[ready.front()];
    ready.pop_front();
    msl_current = current;
    msl_switch(&host, current->stack_pointer);
    current = nullptr;
    if (failed) return;
  }
  if (alive)
    give_up((arrived ? "threadgroup_barrier is not reached by every thread of the threadgroup"
                     : "a simdgroup operation is not reached by every live lane of its simdgroup") +
            places());
  for (Simdgroup& s : simdgroups) count_moves(s);
}
}  // namespace sim

using namespace sim;

// Runs every thread of the grid; 1 if something failed, and msl_error says what.
extern "C" int msl_run(void (*kernel)(void**), void** buffers, const u32* grid, const u32* size,
                       int how, u32 from, double seconds) {
  entry = kernel;
  arguments = buffers;
  order = (Order)how;
  seed = (from + 1) * 2654435761u;
  if (!seed) seed = 1;  // xorshift would stay at 0
  failed = false;
  const Watch watch((const void*)kernel, seconds);
  u32 groups = 1;
  for (int i = 0; i < 3; i++) groups *= ceil_div(grid[i], size[i]);
  for (u32 index : permutation(groups)) {
    forget_threadgroup_arrays();
    set_up(index, grid, size);
    run_group();
    if (failed) return 1;
  }
  return 0;
}
