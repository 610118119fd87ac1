// What the rewriter and the entry point of a kernel use.
#define MSL_TYPE(...) __VA_ARGS__

// threadgroup TYPE NAME DIMS;
#ifdef METALSIM_STRICT
#define MSL_THREADGROUP(TYPE, NAME, DIMS) \
  typedef MSL_TYPE TYPE msl_type_##NAME DIMS; \
  threadgroup msl_type_##NAME& NAME = *(threadgroup msl_type_##NAME*)0
#else
#define MSL_THREADGROUP(TYPE, NAME, DIMS)                                                  \
  static msl_array msl_array_##NAME;                                                       \
  typedef MSL_TYPE TYPE msl_type_##NAME DIMS;                                              \
  msl_type_##NAME& NAME = *(msl_type_##NAME*)msl_threadgroup_array(                        \
      &msl_array_##NAME, sizeof(msl_type_##NAME), alignof(msl_type_##NAME), #NAME, __FILE__, \
      __LINE__)
#endif

namespace msl {
// An argument that becomes what the kernel declares: a pointer, a reference, or one to three
// numbers of an attribute.
struct Pointer {
  void* p;
  template <class T>
  operator T*() const { return (T*)p; }
};
struct Reference {
  void* p;
  template <class T>
  operator T&() const { return *(T*)p; }
};
struct Attribute {
  unsigned x, y, z;
  Attribute(unsigned n) : x(n), y(0), z(0) {}
  MSL_PLAIN Attribute(const unsigned (&n)[3]) : x(n[0]), y(n[1]), z(n[2]) {}
  operator uint() const { return x; }
  operator ushort() const { return (ushort)x; }
  operator uint2() const { return uint2{x, y}; }
  operator uint3() const { return uint3{x, y, z}; }
  operator ushort2() const { return ushort2{(ushort)x, (ushort)y}; }
  operator ushort3() const { return ushort3{(ushort)x, (ushort)y, (ushort)z}; }
};
MSL_PLAIN inline unsigned threads(const unsigned (&size)[3]) { return size[0] * size[1] * size[2]; }
}  // namespace msl

#define MSL_thread_position_in_grid msl_current->position_in_grid
#define MSL_thread_position_in_threadgroup msl_current->position_in_threadgroup
#define MSL_threadgroup_position_in_grid msl_current->threadgroup_position
#define MSL_threadgroups_per_grid msl_current->threadgroups
#define MSL_threads_per_grid msl_current->grid
#define MSL_grid_size msl_current->grid
#define MSL_grid_origin 0u
#define MSL_threads_per_threadgroup msl_current->size
#define MSL_dispatch_threads_per_threadgroup msl_current->dispatch_size
#define MSL_thread_index_in_threadgroup msl_current->index
#define MSL_thread_index_in_simdgroup msl_current->lane
#define MSL_thread_index_in_quadgroup (msl_current->lane % 4)
#define MSL_quadgroup_index_in_threadgroup (msl_current->index / 4)
#define MSL_simdgroup_index_in_threadgroup msl_current->simdgroup
#define MSL_simdgroups_per_threadgroup msl_current->simdgroups
#define MSL_dispatch_simdgroups_per_threadgroup msl_current->dispatch_simdgroups
#define MSL_quadgroups_per_threadgroup ((msl::threads(msl_current->size) + 3) / 4)
#define MSL_dispatch_quadgroups_per_threadgroup ((msl::threads(msl_current->dispatch_size) + 3) / 4)
#define MSL_thread_execution_width 32u
#define MSL_threads_per_simdgroup 32u
