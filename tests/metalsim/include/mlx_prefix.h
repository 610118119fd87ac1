// What MLX puts before a custom kernel: its utils.h, less headers that need more of Apple's
// compiler than clang has. metal_stdlib covers bf16_math.h, and no kernel logs.
using namespace metal;
typedef bfloat bfloat16_t;
template <class T>
struct complex_t {  // of complex.h: enough for utils.h to compile
  T real, imag;
  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
};
typedef complex_t<float> complex64_t;
#include "mlx/backend/metal/kernels/utils.h"

namespace metal {  // of steel/utils/type_traits.h, which only MLX's own kernels include
template <class T>
constexpr bool is_empty_v = __is_empty(T);
template <class T>
struct is_empty : bool_constant<is_empty_v<T>> {};
template <class T>
struct is_static : is_empty<T> {};
template <class... T>
struct make_void {
  typedef void type;
};
template <class... T>
using void_t = typename make_void<T...>::type;
template <class T>
struct pointer_element {};
template <class T>
struct pointer_element<T*> {
  typedef remove_cv_t<T> type;
};
#ifdef METALSIM_STRICT
template <class T>
struct pointer_element<device T*> : pointer_element<T*> {};
template <class T>
struct pointer_element<threadgroup T*> : pointer_element<T*> {};
template <class T>
struct pointer_element<constant T*> : pointer_element<T*> {};
#endif
template <class T>
using pointer_element_t = typename pointer_element<remove_cv_t<T>>::type;
}  // namespace metal
