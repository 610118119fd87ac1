// simdgroup_matrix: 8 x 8 elements, two in each lane, where MLX's kernels expect them.
namespace metal {
namespace impl {
// Lane 0 holds (0, 0) and (0, 1), lane 1 (0, 2) and (0, 3); lanes 0-7 are the upper left quarter,
// then come the upper right one, the lower left one and the lower right one.
MSL_PLAIN inline int row(unsigned lane) { return (lane / 16) * 4 + lane / 2 % 4; }
MSL_PLAIN inline int column(unsigned lane) { return (lane / 8 % 2) * 4 + lane % 2 * 2; }
MSL_PLAIN inline unsigned holder(int row, int column) {
  return row / 4 * 16 + column / 4 * 8 + row % 4 * 2 + column / 2 % 2;
}
}  // namespace impl

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8 x 8 matrices only");
  vec<T, 2> elements;
  simdgroup_matrix() {}  // undefined, as in Metal
  MSL_PLAIN explicit simdgroup_matrix(T x) {  // x on the diagonal
    const int r = impl::row(impl::me()), c = impl::column(impl::me());
    elements = vec<T, 2>{r == c ? x : (T)0, r == c + 1 ? x : (T)0};
  }
  thread vec<T, 2>& thread_elements() { return elements; }
  const thread vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.elements = vec<T, 2>{x, x};
  return m;
}

namespace impl {
MSL_PLAIN inline void uniform(const void* p, const char* op, const char* file, int line) {
  const msl_lanes* lanes = exchange((ulong)p, op, file, line);
  if (lanes->active != ~0u || lane<ulong>(lanes, 0) != (ulong)p)
    msl_fail("a simdgroup_matrix is loaded or stored with 32 lanes at one address", file, line);
}
}  // namespace impl

// Functions, not lambdas: the elements are touched in sanitized code, so the runtime sees them.
#define MSL_MATRIX_MEMORY(SPACE)                                                              \
  template <class T>                                                                          \
  inline void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const SPACE T* p,           \
                             ulong per_row = 8, ulong2 origin = ulong2{0, 0},                 \
                             bool transpose = false, MSL_SITE) {                              \
    impl::uniform((const void*)p, "simdgroup_load", file, line);                              \
    const int r = impl::row(impl::me()), c = impl::column(impl::me());                        \
    for (int k = 0; k < 2; k++)                                                               \
      m.elements[k] = transpose ? p[(origin.x + c + k) * per_row + origin.y + r]              \
                                : p[(origin.y + r) * per_row + origin.x + c + k];             \
  }                                                                                           \
  template <class T>                                                                          \
  inline void simdgroup_store(thread const simdgroup_matrix<T, 8, 8>& m, SPACE T* p,          \
                              ulong per_row = 8, ulong2 origin = ulong2{0, 0},                \
                              bool transpose = false, MSL_SITE) {                             \
    impl::uniform((const void*)p, "simdgroup_store", file, line);                             \
    const int r = impl::row(impl::me()), c = impl::column(impl::me());                        \
    for (int k = 0; k < 2; k++)                                                               \
      (transpose ? p[(origin.x + c + k) * per_row + origin.y + r]                             \
                 : p[(origin.y + r) * per_row + origin.x + c + k]) = m.elements[k];           \
  }
MSL_MATRIX_MEMORY(device)
#ifdef METALSIM_STRICT
MSL_MATRIX_MEMORY(threadgroup)
#endif

// d = a b + c, where d may be any of the others: all values are exchanged before d is written.
template <class D, class A, class B, class C>
MSL_PLAIN inline void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                                    thread const simdgroup_matrix<A, 8, 8>& a,
                                                    thread const simdgroup_matrix<B, 8, 8>& b,
                                                    thread const simdgroup_matrix<C, 8, 8>& c,
                                                    MSL_SITE) {
  struct Pair {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  const char* op = "simdgroup_multiply_accumulate";
  const msl_lanes* lanes = impl::exchange(Pair{a.elements, b.elements}, op, file, line);
  if (lanes->active != ~0u) msl_fail("a matrix is multiplied by 32 active lanes", file, line);
  const int r = impl::row(impl::me()), col = impl::column(impl::me());
  vec<D, 2> out;
  for (int j = 0; j < 2; j++) {
    float sum = (float)c.elements[j];
    for (int k = 0; k < 8; k++) {
      const Pair left = impl::lane<Pair>(lanes, impl::holder(r, k));
      const Pair right = impl::lane<Pair>(lanes, impl::holder(k, col + j));
      sum = __builtin_fmaf((float)left.a[k & 1], (float)right.b[(col + j) & 1], sum);
    }
    out[j] = (D)sum;
  }
  d.elements = out;
}
template <class D, class A, class B>
MSL_PLAIN inline void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d,
                                         thread const simdgroup_matrix<A, 8, 8>& a,
                                         thread const simdgroup_matrix<B, 8, 8>& b, MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>((D)0), file, line);
}
}  // namespace metal
