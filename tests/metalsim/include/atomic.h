// Atomics: relaxed ones are all that Metal has.
namespace metal {
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

// One thread runs at a time, so only the runtime has to know that the access is atomic.
#define MSL_ATOMIC MSL_PLAIN __attribute__((noinline))
#define MSL_TELL(read, write) \
  msl_atomic((const volatile void*)p, sizeof(T), read, write, __builtin_return_address(0))
#define MSL_FETCH(SPACE, name, result)                                           \
  template <class T, class U>                                                    \
  MSL_ATOMIC T name(volatile SPACE atomic<T>* p, U operand, memory_order) {      \
    MSL_TELL(true, true);                                                        \
    const T old = p->value, x = (T)operand;                                      \
    p->value = (T)(result);                                                      \
    return old;                                                                  \
  }
#define MSL_ATOMICS(SPACE)                                                                    \
  template <class T>                                                                          \
  MSL_ATOMIC T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order) {        \
    MSL_TELL(true, false);                                                                    \
    return p->value;                                                                          \
  }                                                                                           \
  template <class T, class U>                                                                 \
  MSL_ATOMIC void atomic_store_explicit(volatile SPACE atomic<T>* p, U x, memory_order) {     \
    MSL_TELL(false, true);                                                                    \
    p->value = (T)x;                                                                          \
  }                                                                                           \
  template <class T>                                                                          \
  MSL_ATOMIC bool atomic_compare_exchange_weak_explicit(                                      \
      volatile SPACE atomic<T>* p, thread T* expected, T x, memory_order, memory_order) {     \
    MSL_TELL(true, true);                                                                     \
    const T old = p->value;                                                                   \
    const bool same = old == *expected;                                                       \
    if (same)                                                                                 \
      p->value = x;                                                                           \
    else                                                                                      \
      *expected = old;                                                                        \
    return same;                                                                              \
  }                                                                                           \
  MSL_FETCH(SPACE, atomic_exchange_explicit, x)                                               \
  MSL_FETCH(SPACE, atomic_fetch_add_explicit, old + x)                                        \
  MSL_FETCH(SPACE, atomic_fetch_sub_explicit, old - x)                                        \
  MSL_FETCH(SPACE, atomic_fetch_max_explicit, (old < x ? x : old))                            \
  MSL_FETCH(SPACE, atomic_fetch_min_explicit, (x < old ? x : old))                            \
  MSL_FETCH(SPACE, atomic_fetch_and_explicit, (old & x))                                      \
  MSL_FETCH(SPACE, atomic_fetch_or_explicit, (old | x))                                       \
  MSL_FETCH(SPACE, atomic_fetch_xor_explicit, (old ^ x))
MSL_ATOMICS(device)
#ifdef METALSIM_STRICT
MSL_ATOMICS(threadgroup)
#endif
}  // namespace metal
