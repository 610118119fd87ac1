// Where tokens lie, and four numbers of them at once, in float32.

// Token t of head h of batch row b, in an array whose first three axes have these strides.
template <typename P>
inline P token_of(P x, const constant int64_t* strides, uint b, uint h, uint t) {
  return x + (b * strides[0] + h * strides[1] + t * strides[2]);
}

// p is a multiple of four numbers.
template <typename T>
inline float4 read4(const device T* p) {
  const vec<T, 4> x = *reinterpret_cast<const device vec<T, 4>*>(p);
  return float4(x);
}

inline void write4(device float* p, float4 x) {
  *reinterpret_cast<device float4*>(p) = x;
}
