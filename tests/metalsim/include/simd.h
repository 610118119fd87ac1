// Barriers and the operations of a simdgroup: 32 threads that exchange values.
namespace metal {
#define MSL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class mem_flags : unsigned {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(unsigned(a) | unsigned(b));
}
MSL_PLAIN inline void threadgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_threadgroup_barrier((unsigned)flags, file, line);
}
MSL_PLAIN inline void simdgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_simdgroup_barrier((unsigned)flags, file, line);
}

namespace impl {
// Scalars that Metal's simdgroup functions take; 64-bit integers and bools are not among them.
template <class T>
constexpr bool exchangeable = sizeof(typename msl::shape<T>::scalar) <= 4 &&
                              !is_same_v<typename msl::shape<T>::scalar, bool>;

template <class T>
MSL_PLAIN inline const msl_lanes* exchange(T x, const char* op, const char* file, int line) {
  return msl_exchange(&x, sizeof(T), op, file, line);
}
template <class T>
MSL_PLAIN inline T lane(const msl_lanes* lanes, unsigned i) {
  T x;
  __builtin_memcpy(&x, lanes->value[i], sizeof(T));
  return x;
}
MSL_PLAIN inline bool takes_part(const msl_lanes* lanes, unsigned i) {
  return lanes->active >> i & 1;
}
MSL_PLAIN inline unsigned me() { return msl_current->lane; }
}  // namespace impl

// `sum = f(sum, x)` over the active lanes from `first` on, `count` of them.
#define MSL_REDUCE(name, first, count, result)                                              \
  template <class T>                                                                        \
  MSL_PLAIN inline T name(T value, MSL_SITE) {                                              \
    static_assert(impl::exchangeable<T>, #name " does not take this type in Metal");        \
    const msl_lanes* lanes = impl::exchange(value, #name, file, line);                      \
    T a = value;                                                                            \
    bool empty = true;                                                                      \
    for (unsigned i = first; i < first + count; i++)                                        \
      if (impl::takes_part(lanes, i)) {                                                     \
        const T b = impl::lane<T>(lanes, i);                                                \
        a = empty ? b : (T)(result);                                                        \
        empty = false;                                                                      \
      }                                                                                     \
    return a;                                                                               \
  }
#define MSL_REDUCTION(name, result)            \
  MSL_REDUCE(simd_##name, 0u, 32u, result)     \
  MSL_REDUCE(quad_##name, (impl::me() & ~3u), 4u, result)
MSL_REDUCTION(sum, a + b)
MSL_REDUCTION(product, a* b)
MSL_REDUCTION(max, max(a, b))
MSL_REDUCTION(min, min(a, b))
MSL_REDUCTION(and, a & b)
MSL_REDUCTION(or, a | b)
MSL_REDUCTION(xor, a ^ b)

// Over the lanes before this one, and with it if `inclusive`.
#define MSL_SCAN(name, inclusive, identity, result)                                         \
  template <class T>                                                                        \
  MSL_PLAIN inline T name(T value, MSL_SITE) {                                              \
    static_assert(impl::exchangeable<T>, #name " does not take this type in Metal");        \
    const msl_lanes* lanes = impl::exchange(value, #name, file, line);                      \
    T a = (T)identity;                                                                      \
    for (unsigned i = 0; i < impl::me() + inclusive; i++)                                   \
      if (impl::takes_part(lanes, i)) {                                                     \
        const T b = impl::lane<T>(lanes, i);                                                \
        a = (T)(result);                                                                    \
      }                                                                                     \
    return a;                                                                               \
  }
MSL_SCAN(simd_prefix_inclusive_sum, 1, 0, a + b)
MSL_SCAN(simd_prefix_exclusive_sum, 0, 0, a + b)
MSL_SCAN(simd_prefix_inclusive_product, 1, 1, a* b)
MSL_SCAN(simd_prefix_exclusive_product, 0, 1, a* b)

// The value of another lane. What an inactive lane holds is undefined in Metal: an error here.
#define MSL_SHUFFLE(name, source)                                                           \
  template <class T>                                                                        \
  MSL_PLAIN inline T name(T value, ushort n, MSL_SITE) {                                    \
    static_assert(impl::exchangeable<T>, #name " does not take this type in Metal");        \
    const msl_lanes* lanes = impl::exchange(value, #name, file, line);                      \
    const int me = (int)impl::me(), from = source;                                          \
    if (from < 0 || from > 31 || !impl::takes_part(lanes, from))                            \
      msl_fail(#name " reads a lane that is not active or not there", file, line);          \
    return impl::lane<T>(lanes, from);                                                      \
  }
MSL_SHUFFLE(simd_shuffle, n)
MSL_SHUFFLE(simd_broadcast, n)
MSL_SHUFFLE(simd_shuffle_xor, me ^ n)
MSL_SHUFFLE(simd_shuffle_down, me + n > 31 ? me : me + n)  // lanes past the end keep their own
MSL_SHUFFLE(simd_shuffle_up, me < n ? me : me - n)
MSL_SHUFFLE(simd_shuffle_rotate_down, (me + n) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, (me - n) & 31)
MSL_SHUFFLE(quad_shuffle, (me & ~3) + n)
MSL_SHUFFLE(quad_broadcast, (me & ~3) + n)
MSL_SHUFFLE(quad_shuffle_xor, me ^ n)
MSL_SHUFFLE(quad_shuffle_down, (me & 3) + n > 3 ? me : me + n)
MSL_SHUFFLE(quad_shuffle_up, (me & 3) < n ? me : me - n)

// Lanes past the end take from the other end of `fill`.
#define MSL_FILL(name, from, past)                                                          \
  template <class T>                                                                        \
  MSL_PLAIN inline T name(T value, T fill, ushort n, MSL_SITE) {                            \
    static_assert(impl::exchangeable<T>, #name " does not take this type in Metal");        \
    const unsigned me = impl::me();                                                         \
    const T inside = impl::lane<T>(impl::exchange(value, #name, file, line), (from) & 31);  \
    const T beyond = impl::lane<T>(impl::exchange(fill, #name, file, line), (from) & 31);   \
    return past ? beyond : inside;                                                          \
  }
MSL_FILL(simd_shuffle_and_fill_down, me + n, me + n > 31)
MSL_FILL(simd_shuffle_and_fill_up, me - n, me < n)

template <class T>
MSL_PLAIN inline T simd_broadcast_first(T value, MSL_SITE) {
  static_assert(impl::exchangeable<T>, "simd_broadcast_first does not take this type in Metal");
  const msl_lanes* lanes = impl::exchange(value, "simd_broadcast_first", file, line);
  return impl::lane<T>(lanes, __builtin_ctz(lanes->active));
}

struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
  bool all() const { return bits == 0xffffffff; }
  bool any() const { return bits != 0; }
};
namespace impl {
MSL_PLAIN inline unsigned votes(const msl_lanes* lanes) {
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; i++)
    if (takes_part(lanes, i) && lane<bool>(lanes, i)) bits |= 1u << i;
  return bits;
}
}  // namespace impl
MSL_PLAIN inline simd_vote simd_ballot(bool x, MSL_SITE) {
  return {impl::votes(impl::exchange(x, "simd_ballot", file, line))};
}
MSL_PLAIN inline bool simd_any(bool x, MSL_SITE) {
  return impl::votes(impl::exchange(x, "simd_any", file, line)) != 0;
}
MSL_PLAIN inline bool simd_all(bool x, MSL_SITE) {
  const msl_lanes* lanes = impl::exchange(x, "simd_all", file, line);
  return impl::votes(lanes) == lanes->active;
}
MSL_PLAIN inline bool simd_is_first(MSL_SITE) {
  const msl_lanes* lanes = impl::exchange(true, "simd_is_first", file, line);
  return (unsigned)__builtin_ctz(lanes->active) == impl::me();
}
MSL_PLAIN inline simd_vote simd_active_threads_mask(MSL_SITE) {
  return {impl::exchange(true, "simd_active_threads_mask", file, line)->active};
}
}  // namespace metal
