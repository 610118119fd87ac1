// Buffers and threadgroup arrays: bounds, alignment, races and traffic of every access.
#include "memory.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace sim {
bool checking;
u32 launch;

// One reservation holds every region, with gaps between them, so that a pointer finds its region by
// its page. Pages that nobody touches cost nothing.
constexpr size_t kArena = 64ull << 30, kPage = 4096, kGap = 16 * kPage;
constexpr size_t kKeep = 256 << 20;  // bytes that stay from one launch to the next
static char* arena = (char*)mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
static size_t used;                  // bytes of the arena
static std::vector<u8> owner;        // the region of each used page; region 0 is nobody's
static std::vector<Region> regions;  // then the buffers, then the threadgroup arrays
static size_t threadgroup_bytes;

static Region& add(const char* name, Kind kind, size_t size, size_t phase) {
  const size_t span = (phase + size + kPage - 1) / kPage * kPage + 2 * kGap;
  if (used + span > kArena || regions.size() == 255) {
    fprintf(stderr, "metalsim: no room for %s of %zu bytes\n", name, size);
    abort();
  }
  owner.resize((used + span) / kPage, (u8)regions.size());
  Region& r = regions.emplace_back();
  r.name = name;
  r.kind = kind;
  r.begin = arena + used + kGap + phase;
  r.size = size;
  r.phase = phase;
  used += span;
  return r;
}

static size_t cells(const Region& r) { return (r.phase + r.size + (1u << r.shift) - 1) >> r.shift; }

template <class T>
static void twice(std::vector<T>& v, size_t n) {
  v.resize(n);
  for (size_t i = n; i-- > 0;) v[i] = v[i / 2];
}

static void halve_cells(Region& r) {
  r.shift--;
  if (!r.cells.empty()) twice(r.cells, cells(r));
  if (!r.moved.empty()) twice(r.moved, cells(r));
}

[[gnu::noinline, gnu::cold]] static void fault(const char* what, const Region& r, const char* p,
                                               u32 n, const void* pc, Stamp earlier = {}) {
  static const char* kinds[] = {"device buffer", "constant buffer", "threadgroup array", "memory"};
  const long at = p - r.begin;
  std::string text = format("%s: %u bytes at byte %ld of %s `%s` (%zu bytes)", what, n, at,
                            kinds[(int)r.kind], r.name.c_str(), r.size);
  if (r.element > 1 && at >= 0)
    text += format(", element %ld of %zu,", at / (long)r.element, r.size / r.element);
  text += " by " + name(*current) + " at " + code_place(pc);
  if (earlier)
    text += format("; the other is thread %u of threadgroup %u, counted in the grid",
                   earlier.thread(), (u32)earlier.group() - 1);
  fail(text);
}

static void outside(char* p, u32 n, bool write, const void* pc) {
  Dl_info info;
  if (dladdr(p, &info)) return;  // a constant of the program
  fail(format("wild %s of %u bytes at %p by ", write ? "write" : "read", n, p) + name(*current) +
       " at " + code_place(pc));
}

void access(char* p, u32 n, bool write, bool atomic, const void* pc) {
  if (!current || (p >= current->stack && p < current->stack + kStack)) return;
  const size_t page = (size_t)(p - arena) / kPage;
  if (page >= owner.size()) return outside(p, n, write, pc);
  Region& r = regions[owner[page]];
  const size_t at = (size_t)(p - r.begin);  // huge if p is before the region
  if (at > r.size || at + n > r.size)
    fault(write ? "out-of-bounds write" : "out-of-bounds read", r, p, n, pc);
  if ((uintptr_t)p & (n - 1)) fault(write ? "misaligned write" : "misaligned read", r, p, n, pc);
  if (write && r.read_only) fault("write to an input", r, p, n, pc);
  if (r.kind == Kind::constant) return;
  fail_if_late();
  while (1u << r.shift > n) halve_cells(r);
  if (r.kind == Kind::device) {
    const u64 move = (u64)(p - arena) << 4 | (u64)__builtin_ctz(n) << 1 | write;
    current->moves.push_back(move);
    r.requested += n;
  }
  if (r.cells.empty()) return;
  const size_t first = (r.phase + at) >> r.shift, last = (r.phase + at + n - 1) >> r.shift;
  const Stamp now = Stamp::now(r.kind, atomic);
  for (size_t i = first; i <= last; i++) {
    Cell& c = r.cells[i];
    if (r.kind == Kind::threadgroup && c.write.group() != now.group()) c = {};  // another's array
    Stamp earlier = {};
    if (const char* what = c.add(now, write, earlier)) fault(what, r, p, n, pc, earlier);
  }
}

// Lanes of a simdgroup run the same code from one meeting to the next, so their k-th accesses are
// one instruction of a GPU, which moves each byte once however many lanes ask for it.
void count_moves(Simdgroup& s) {
  static u64 instruction = 0;
  size_t most = 0;
  for (u32 i : s.turns) most = std::max(most, fibers[i].moves.size());
  for (size_t k = 0; k < most; k++) {
    instruction++;
    for (u32 i : s.turns) {
      if (k >= fibers[i].moves.size()) continue;
      const u64 move = fibers[i].moves[k], at = move >> 4, n = 1 << (move >> 1 & 7);
      Region& r = regions[owner[at / kPage]];
      const size_t first = (at - (size_t)(r.begin - r.phase - arena)) >> r.shift;
      for (size_t c = first; c < first + (n >> r.shift); c++)
        if (r.moved[c] != instruction) {
          r.moved[c] = instruction;
          (move & 1 ? r.stored : r.loaded) += 1u << r.shift;
        }
    }
  }
  for (u32 i : s.turns) fibers[i].moves.clear();
}

void forget_threadgroup_arrays() {
  if (checking) return;  // cells know whose they are
  for (Region& r : regions)
    if (r.kind == Kind::threadgroup) memset(r.begin, 0xff, r.size);
}
}  // namespace sim

using namespace sim;

extern "C" {
// A launch begins, without buffers.
void msl_begin(int check) {
  checking = check;
  launch++;
  if (used > kKeep) madvise(arena, used, MADV_DONTNEED);
  regions.assign(1, {});
  owner.assign(1, 0);
  used = kPage;
  threadgroup_bytes = 0;
}

// Adds a buffer and returns where it begins. Without data it is an output.
void* msl_buffer(const char* name, const void* data, size_t size, size_t phase, int constant,
                 int read_only, unsigned element) {
  Region& r = add(name, constant ? Kind::constant : Kind::device, size, phase);
  r.read_only = read_only;
  r.element = element;
  if (data)
    memcpy(r.begin, data, size);
  else
    memset(r.begin, 0xff, size);  // NaN, so that what is never written shows in the fast pass too
  if (checking && !constant) {
    r.moved.assign(cells(r), 0);
    if (!read_only) r.cells.assign(cells(r), {data ? kHost : Stamp{}, {}});
  }
  return r.begin;
}

void* msl_threadgroup_array(msl_array* array, unsigned long size, unsigned long align,
                            const char* name, const char* file, int line) {
  if (array->launch == launch) return array->memory;
  const size_t to = std::max(align, 16ul);
  threadgroup_bytes = (threadgroup_bytes + to - 1) / to * to + size;
  if (threadgroup_bytes > kThreadgroupMemory)
    fail(format("threadgroup memory: expected up to %zu bytes, got %zu with `%s` at %s:%d by ",
                kThreadgroupMemory, threadgroup_bytes, name, file, line) +
         sim::name(*current));
  Region& r = add(name, Kind::threadgroup, size, 0);
  if (checking)
    r.cells.assign(cells(r), {});
  else
    memset(r.begin, 0xff, size);
  *array = {launch, r.begin};
  return r.begin;
}

size_t msl_threadgroup_bytes() { return threadgroup_bytes; }

// Bytes of a buffer that were never written; `first` is one that was not.
size_t msl_unwritten(u32 index, size_t* first) {
  const Region& r = regions[index + 1];
  size_t bytes = 0;
  for (size_t i = r.cells.size(); i-- > 0;)
    if (!r.cells[i].write) {
      *first = i << r.shift;
      bytes += std::min(r.size - *first, (size_t)1 << r.shift);
    }
  return bytes;
}

void msl_traffic(u32 index, u64* counts) {
  const Region& r = regions[index + 1];
  counts[0] = r.loaded;
  counts[1] = r.stored;
  counts[2] = r.requested;
}
}
