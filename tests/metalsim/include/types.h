// Address spaces, scalars, vectors and traits.
#ifdef METALSIM_STRICT  // only compiled: real address spaces
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else  // run: one flat memory, whose regions the runtime tells apart
#define device
#define constant const
#define threadgroup
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __HAVE_BFLOAT__ 1
#define MSL_PLAIN __attribute__((no_sanitize("thread")))  // touches no memory of the kernel

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
constexpr half operator""h(long double x) { return (half)x; }
constexpr half operator""H(long double x) { return (half)x; }
constexpr bfloat operator""bf(long double x) { return (bfloat)(float)x; }
constexpr bfloat operator""BF(long double x) { return (bfloat)(float)x; }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-05f)
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX (~0u)
#define M_PI_F 3.14159274101257324219f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  typedef T value_type;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
constexpr bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class A, class B>
constexpr bool is_convertible_v = __is_convertible_to(A, B);
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T>
constexpr bool is_signed_v = __is_signed(T);
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
struct make_unsigned {
  typedef __make_unsigned(T) type;
};
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
struct remove_cv {
  typedef __remove_cv(T) type;
};
template <class T>
using remove_addrspace_t = __remove_cv(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
}  // namespace metal

#define MSL_VECTORS(T)             \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(bool)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)

// Vectors without padding, aligned as their scalars are.
#define MSL_PACKED(T)                                                                         \
  struct packed_##T##2 {                                                                      \
    T x, y;                                                                                   \
    operator T##2() const { return T##2{x, y}; }                                              \
  };                                                                                          \
  struct packed_##T##3 {                                                                      \
    T x, y, z;                                                                                \
    operator T##3() const { return T##3{x, y, z}; }                                           \
  };                                                                                          \
  struct packed_##T##4 {                                                                      \
    T x, y, z, w;                                                                             \
    operator T##4() const { return T##4{x, y, z, w}; }                                        \
  };
MSL_PACKED(uchar)
MSL_PACKED(ushort)
MSL_PACKED(int)
MSL_PACKED(uint)
MSL_PACKED(half)
MSL_PACKED(float)

namespace msl {
// The scalar and the length of a vector; a scalar has length 0.
template <class T>
struct shape {
  typedef T scalar;
  static constexpr int n = 0;
};
template <class T, int N>
struct shape<T __attribute__((ext_vector_type(N)))> {
  typedef T scalar;
  static constexpr int n = N;
};
template <class T>
constexpr int parts = shape<T>::n ? shape<T>::n : 1;

template <class V, class A>
constexpr void append(V& v, int& i, A a) {
  if constexpr (shape<A>::n == 0)
    v[i++] = (typename shape<V>::scalar)a;
  else
    for (int k = 0; k < shape<A>::n; k++) v[i++] = (typename shape<V>::scalar)a[k];
}

// V(a, b, ...): clang's vectors have no such constructors, so the rewriter calls this instead.
template <class V>
constexpr V make() {
  return V{};
}
template <class V, class A>
constexpr V make(A a) {
  if constexpr (shape<V>::n == 0) {
    return (V)a;
  } else if constexpr (shape<A>::n == 0) {
    V v{};
    for (int k = 0; k < shape<V>::n; k++) v[k] = (typename shape<V>::scalar)a;
    return v;
  } else {
    static_assert(shape<A>::n == shape<V>::n, "a vector is made from one of another length");
    return __builtin_convertvector(a, V);
  }
}
template <class V, class A, class B, class... C>
constexpr V make(A a, B b, C... c) {
  if constexpr (shape<V>::n == 0) {
    return V(a, b, c...);
  } else {
    static_assert(parts<A> + parts<B> + (0 + ... + parts<C>) == shape<V>::n,
                  "wrong number of vector components");
    V v{};
    int i = 0;
    append(v, i, a);
    append(v, i, b);
    (append(v, i, c), ...);
    return v;
  }
}
}  // namespace msl

template <class T, class S>
inline constexpr T as_type(S s) {
  static_assert(sizeof(T) == sizeof(S), "as_type needs types of one size");
  return __builtin_bit_cast(T, s);
}
