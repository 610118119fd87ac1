// Faults: their messages, and the signals and the time limit that are faults too.
#include <dlfcn.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <ctime>

#include "runtime.h"

namespace sim {
bool failed;
static std::string message;
static volatile bool late;
static void* library;  // base address of the kernel's library

std::string format(const char* form, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, form);
  vsnprintf(text, sizeof text, form, arguments);
  va_end(arguments);
  return text;
}

std::string name(const Fiber& f) {
  const unsigned *t = f.position_in_threadgroup, *g = f.threadgroup_position;
  return format("thread (%u, %u, %u) of threadgroup (%u, %u, %u), lane %u of simdgroup %u", t[0],
                t[1], t[2], g[0], g[1], g[2], f.lane, f.simdgroup);
}

std::string code_place(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info)) return "an unknown place";
  const long offset = (const char*)pc - (const char*)info.dli_fbase - 1;  // of the call
  return format("@%s+0x%lx@", info.dli_fname, offset);
}

void give_up(const std::string& what) {
  failed = true;
  message = what;
}

void fail(const std::string& what) {
  give_up(what);
  leave();
}

static const char kLate[] = "the launch takes too long; it was stopped in ";

void fail_if_late() {
  if (late) fail(kLate + name(*current));
}

static void on_signal(int number, siginfo_t*, void* context) {
  const char* pc = (const char*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
  if (number == SIGALRM) {
    late = true;
    // elsewhere the heap may be in use: then the next meeting or access fails
    Dl_info info;
    if (current && dladdr(pc, &info) && info.dli_fbase == library)
      fail(kLate + name(*current) + " at " + code_place(pc + 1));
    return;
  }
  if (!current) {  // not the kernel's: as if nobody watched
    signal(number, SIG_DFL);
    return;
  }
  fail((number == SIGFPE ? "integer division by zero by "
                         : "memory fault (a wild pointer, or a stack that is full) by ") +
       name(*current) + " at " + code_place(pc + 1));
}

static const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGALRM};
static struct sigaction before[4];
static stack_t stack_before;
static timer_t timer;

Watch::Watch(const void* kernel, double seconds) {
  static char own[64 << 10];  // a full stack has no room for a handler
  const stack_t stack = {own, 0, sizeof own};
  sigaltstack(&stack, &stack_before);
  struct sigaction act = {};
  act.sa_sigaction = on_signal;
  act.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
  for (int i = 0; i < 4; i++) sigaction(kSignals[i], &act, &before[i]);
  Dl_info info;
  library = dladdr(kernel, &info) ? info.dli_fbase : nullptr;
  late = false;
  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;  // no other thread of the process may be interrupted
  event.sigev_signo = SIGALRM;
  event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
  timer_create(CLOCK_MONOTONIC, &event, &timer);
  const time_t whole = (time_t)seconds;
  itimerspec when = {{0, 50'000'000}, {whole, (long)((seconds - (double)whole) * 1e9)}};
  timer_settime(timer, 0, &when, nullptr);
}

Watch::~Watch() {
  timer_delete(timer);
  for (int i = 0; i < 4; i++) sigaction(kSignals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
}
}  // namespace sim

using namespace sim;

extern "C" {
void msl_fail(const char* what, const char* file, int line) {
  fail(format("%s at %s:%d by ", what, file, line) + name(*current));
}

const char* msl_error() { return message.c_str(); }
}
