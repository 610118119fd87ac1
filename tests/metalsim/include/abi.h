// What a compiled kernel and the runtime know of each other. No header of the host is included: a
// kernel sees Metal's names and nothing else.
extern "C" {
struct msl_thread {
  unsigned position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3];
  unsigned index, simdgroup, lane;  // in the threadgroup, and in the simdgroup
  unsigned size[3];                 // of this threadgroup; the last one of an axis may be smaller
  unsigned dispatch_size[3];        // of a whole threadgroup
  unsigned threadgroups[3], grid[3];
  unsigned simdgroups, dispatch_simdgroups;  // per threadgroup
};
extern msl_thread* msl_current;

// What the lanes of a simdgroup gave to one simdgroup operation.
struct msl_lanes {
  unsigned active;  // a bit for each lane that takes part
  alignas(16) char value[32][32];
};

// A threadgroup array; one for each declaration (and instantiation of its function).
struct msl_array {
  unsigned launch;
  void* memory;
};

void msl_threadgroup_barrier(unsigned flags, const char* file, int line);
void msl_simdgroup_barrier(unsigned flags, const char* file, int line);
const msl_lanes* msl_exchange(const void* value, unsigned size, const char* op, const char* file,
                              int line);
void* msl_threadgroup_array(msl_array* array, unsigned long size, unsigned long align,
                            const char* name, const char* file, int line);
void msl_atomic(const volatile void* p, unsigned size, bool read, bool write, const void* pc);
void msl_fail(const char* what, const char* file, int line);
}
