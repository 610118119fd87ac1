// Math, integer and common functions, and numeric limits.
namespace metal {
// A function of floats, and over it those of half, bfloat and vectors, one element at a time.
#define MSL_1(name, f)                                                     \
  inline float name(float x) { return f(x); }                              \
  inline half name(half x) { return (half)f((float)x); }                   \
  inline bfloat name(bfloat x) { return (bfloat)f((float)x); }             \
  template <class T, int N>                                                \
  inline vec<T, N> name(vec<T, N> x) {                                     \
    vec<T, N> y;                                                           \
    for (int i = 0; i < N; i++) y[i] = name((T)x[i]);                      \
    return y;                                                              \
  }
#define MSL_2(name, f)                                                                  \
  inline float name(float x, float y) { return f(x, y); }                               \
  inline half name(half x, half y) { return (half)f((float)x, (float)y); }              \
  inline bfloat name(bfloat x, bfloat y) { return (bfloat)f((float)x, (float)y); }      \
  template <class T, int N>                                                             \
  inline vec<T, N> name(vec<T, N> x, vec<T, N> y) {                                     \
    vec<T, N> z;                                                                        \
    for (int i = 0; i < N; i++) z[i] = name((T)x[i], (T)y[i]);                          \
    return z;                                                                           \
  }
namespace impl {
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }
inline float fract(float x) { return x - __builtin_floorf(x); }
inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float exp10(float x) { return __builtin_powf(10.0f, x); }
inline float divide(float x, float y) { return x / y; }
inline float powr(float x, float y) { return x < 0 ? __builtin_nanf("") : __builtin_powf(x, y); }
}  // namespace impl
#define MSL_TRANSCENDENTAL          \
  MSL_1(exp, __builtin_expf)        \
  MSL_1(exp2, __builtin_exp2f)      \
  MSL_1(exp10, impl::exp10)         \
  MSL_1(log, __builtin_logf)        \
  MSL_1(log2, __builtin_log2f)      \
  MSL_1(log10, __builtin_log10f)    \
  MSL_1(sqrt, __builtin_sqrtf)      \
  MSL_1(rsqrt, impl::rsqrt)         \
  MSL_1(sin, __builtin_sinf)        \
  MSL_1(cos, __builtin_cosf)        \
  MSL_1(tan, __builtin_tanf)        \
  MSL_1(sinh, __builtin_sinhf)      \
  MSL_1(cosh, __builtin_coshf)      \
  MSL_1(tanh, __builtin_tanhf)      \
  MSL_1(asin, __builtin_asinf)      \
  MSL_1(acos, __builtin_acosf)      \
  MSL_1(atan, __builtin_atanf)      \
  MSL_1(asinh, __builtin_asinhf)    \
  MSL_1(acosh, __builtin_acoshf)    \
  MSL_1(atanh, __builtin_atanhf)    \
  MSL_2(atan2, __builtin_atan2f)    \
  MSL_2(pow, __builtin_powf)        \
  MSL_2(powr, impl::powr)           \
  MSL_2(divide, impl::divide)       \
  MSL_2(fmod, __builtin_fmodf)      \
  MSL_1(floor, __builtin_floorf)    \
  MSL_1(ceil, __builtin_ceilf)      \
  MSL_1(trunc, __builtin_truncf)    \
  MSL_1(round, __builtin_roundf)    \
  MSL_1(rint, __builtin_rintf)      \
  MSL_1(fabs, __builtin_fabsf)      \
  MSL_1(fract, impl::fract)         \
  MSL_1(sign, impl::sign)           \
  MSL_1(saturate, impl::saturate)   \
  MSL_2(fmin, __builtin_fminf)      \
  MSL_2(fmax, __builtin_fmaxf)      \
  MSL_2(copysign, __builtin_copysignf)
MSL_TRANSCENDENTAL

// Sums and minima of what no function above is: every scalar type, and vectors of it.
#define MSL_ORDERED(T)                                             \
  inline T min(T a, T b) { return b < a ? b : a; }                 \
  inline T max(T a, T b) { return a < b ? b : a; }                 \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
MSL_ORDERED(char)
MSL_ORDERED(signed char)
MSL_ORDERED(uchar)
MSL_ORDERED(short)
MSL_ORDERED(ushort)
MSL_ORDERED(int)
MSL_ORDERED(uint)
MSL_ORDERED(long)
MSL_ORDERED(ulong)
#define MSL_ORDERED_FLOAT(T)                                                         \
  inline T min(T a, T b) { return a != a ? b : b != b ? a : b < a ? b : a; }         \
  inline T max(T a, T b) { return a != a ? b : b != b ? a : a < b ? b : a; }         \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }              \
  inline bool isnan(T x) { return x != x; }                                          \
  inline bool isinf(T x) { return __builtin_isinf((float)x); }                       \
  inline bool isfinite(T x) { return __builtin_isfinite((float)x); }                 \
  inline bool signbit(T x) { return __builtin_signbit((float)x); }                   \
  inline T abs(T x) { return (T)__builtin_fabsf((float)x); }                         \
  inline T fma(T a, T b, T c) { return (T)__builtin_fmaf((float)a, (float)b, (float)c); } \
  inline T mix(T a, T b, T t) { return a + (b - a) * t; }                            \
  inline T ldexp(T x, int e) { return (T)__builtin_ldexpf((float)x, e); }
MSL_ORDERED_FLOAT(float)
MSL_ORDERED_FLOAT(half)
MSL_ORDERED_FLOAT(bfloat)
#define MSL_ELEMENTWISE(name, parameters, call) \
  template <class T, int N>                     \
  inline vec<T, N> name parameters {            \
    vec<T, N> y;                                \
    for (int i = 0; i < N; i++) y[i] = call;    \
    return y;                                   \
  }
#define MSL_V vec<T, N>
MSL_ELEMENTWISE(min, (MSL_V a, MSL_V b), min((T)a[i], (T)b[i]))
MSL_ELEMENTWISE(max, (MSL_V a, MSL_V b), max((T)a[i], (T)b[i]))
MSL_ELEMENTWISE(min, (MSL_V a, T b), min((T)a[i], b))
MSL_ELEMENTWISE(max, (MSL_V a, T b), max((T)a[i], b))
MSL_ELEMENTWISE(clamp, (MSL_V x, MSL_V a, MSL_V b), clamp((T)x[i], (T)a[i], (T)b[i]))
MSL_ELEMENTWISE(clamp, (MSL_V x, T a, T b), clamp((T)x[i], a, b))
MSL_ELEMENTWISE(fma, (MSL_V a, MSL_V b, MSL_V c), fma((T)a[i], (T)b[i], (T)c[i]))
MSL_ELEMENTWISE(mix, (MSL_V a, MSL_V b, MSL_V t), mix((T)a[i], (T)b[i], (T)t[i]))
MSL_ELEMENTWISE(abs, (MSL_V x), abs((T)x[i]))
MSL_ELEMENTWISE(popcount, (MSL_V x), popcount((T)x[i]))
template <class T, class M, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<M, N> c) {
  vec<T, N> y;
  for (int i = 0; i < N; i++) y[i] = c[i] ? b[i] : a[i];
  return y;
}
template <class T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = 0;
  for (int i = 0; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T, int N>
inline T length(vec<T, N> x) {
  return sqrt(dot(x, x));
}
template <class T>
inline bool any(T x) {
  if constexpr (msl::shape<T>::n == 0) return x;
  else for (int i = 0; i < msl::shape<T>::n; i++) if (x[i]) return true;
  return false;
}
template <class T>
inline bool all(T x) {
  if constexpr (msl::shape<T>::n == 0) return x;
  else for (int i = 0; i < msl::shape<T>::n; i++) if (!x[i]) return false;
  return true;
}

#define MSL_INTEGER template <class T, class = enable_if_t<is_integral_v<T>>>
template <class T, class = enable_if_t<is_integral_v<T> && is_signed_v<T>>>
inline T abs(T x) { return x < 0 ? -x : x; }
MSL_INTEGER inline make_unsigned_t<T> absdiff(T a, T b) { return a < b ? b - a : a - b; }
MSL_INTEGER inline T popcount(T x) { return (T)__builtin_popcountll((make_unsigned_t<T>)x); }
MSL_INTEGER inline T clz(T x) {
  constexpr int bits = 8 * sizeof(T);
  return x ? (T)(__builtin_clzll((make_unsigned_t<T>)x) - (64 - bits)) : (T)bits;
}
MSL_INTEGER inline T ctz(T x) {
  return x ? (T)__builtin_ctzll((make_unsigned_t<T>)x) : (T)(8 * sizeof(T));
}
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (~0u >> (32 - bits));
}
inline int extract_bits(int x, uint offset, uint bits) {
  return bits == 0 ? 0 : (int)((uint)x << (32 - bits - offset)) >> (32 - bits);
}
inline uint insert_bits(uint base, uint x, uint offset, uint bits) {
  const uint mask = bits == 0 ? 0 : (~0u >> (32 - bits)) << offset;
  return (base & ~mask) | (x << offset & mask);
}
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
inline uint rotate(uint x, uint n) { return n % 32 ? x << n % 32 | x >> (32 - n % 32) : x; }
inline uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
inline int mulhi(int a, int b) { return (int)((long)a * b >> 32); }
inline uint mad24(uint a, uint b, uint c) { return (a & 0xffffff) * (b & 0xffffff) + c; }

// math_mode is safe unless a caller asks, so fast:: is where accuracy may be lost on a GPU. Here
// all three are the host's functions.
namespace precise {
MSL_TRANSCENDENTAL
using metal::abs, metal::clamp, metal::fma, metal::max, metal::min;
}
namespace fast {
MSL_TRANSCENDENTAL
using metal::abs, metal::clamp, metal::fma, metal::max, metal::min;
}
#undef MSL_1
#undef MSL_2

template <class T>
struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, low, high)                    \
  template <>                                               \
  struct numeric_limits<T> {                                \
    static constexpr bool is_integer = true;                \
    static constexpr int digits = 8 * sizeof(T) - (low < 0); \
    static constexpr T min() { return low; }                \
    static constexpr T lowest() { return low; }             \
    static constexpr T max() { return high; }               \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(signed char, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(short, -32768, 32767)
MSL_INTEGER_LIMITS(ushort, 0, 65535)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, (-__LONG_MAX__ - 1), __LONG_MAX__)
MSL_INTEGER_LIMITS(ulong, 0, ~0ul)
#define MSL_FLOAT_LIMITS(T, least, most, eps)                                  \
  template <>                                                                  \
  struct numeric_limits<T> {                                                   \
    static constexpr bool is_integer = false;                                  \
    static constexpr T min() { return (T)least; }                              \
    static constexpr T lowest() { return (T)-most; }                           \
    static constexpr T max() { return (T)most; }                               \
    static constexpr T epsilon() { return (T)eps; }                            \
    static constexpr T infinity() { return (T)__builtin_inff(); }              \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }           \
  };
MSL_FLOAT_LIMITS(float, __FLT_MIN__, __FLT_MAX__, __FLT_EPSILON__)
MSL_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f)
MSL_FLOAT_LIMITS(bfloat, __FLT_MIN__, 3.3895313892515355e38f, 7.8125e-03f)
}  // namespace metal
