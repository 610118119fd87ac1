// The power iteration of a short block: E is about A C^T, E held in registers all the while.

// Gram-Schmidt, twice over, of the columns of x [size, R], by one simdgroup; a column that depends
// on those before it becomes 0.
template <int R>
inline void orthonormalize(threadgroup float* x, uint size, uint lane) {
  for (uint r = 0; r < R; r++) {
    float peak = 1e-30f;  // so that no square vanishes
    for (uint i = lane; i < size; i += 32) peak = max(peak, abs(x[i * R + r]));
    peak = simd_max(peak);
    for (uint i = lane; i < size; i += 32) x[i * R + r] /= peak;
    for (uint other = 0; other < 2 * r; other++) {
      float along = 0;
      for (uint i = lane; i < size; i += 32) along += x[i * R + r] * x[i * R + other % r];
      along = simd_sum(along);
      for (uint i = lane; i < size; i += 32) x[i * R + r] -= along * x[i * R + other % r];
    }
    float norm = 0;
    for (uint i = lane; i < size; i += 32) norm += x[i * R + r] * x[i * R + r];
    norm = sqrt(simd_sum(norm));
    for (uint i = lane; i < size; i += 32)
      x[i * R + r] = norm > 1e-5f ? x[i * R + r] / norm : 0.0f;
  }
}
// === kernel
// rest [B, H, n, D] of any strides; c0 [H, D, R]; a [B, H, n, R]; c [B, H, D, R]. A threadgroup has
// one head: each of its SIMDS simdgroups every SIMDS-th token, a lane every 32nd channel of it.
constexpr uint EACH = (TOKENS + SIMDS - 1) / SIMDS, WIDE = (D + 31) / 32;
threadgroup float as[TOKENS * R], cs[D * R], parts[SIMDS * D];
const uint head = threadgroup_position_in_grid.x, H = c0_shape[0];
const uint simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint me = thread_index_in_threadgroup, threads = 32 * SIMDS;

float e[EACH][WIDE];
for (uint i = 0; i < EACH; i++) {
  for (uint j = 0; j < WIDE; j++) {
    const uint t = simdgroup + i * SIMDS, d = lane + 32 * j;
    e[i][j] = 0;
    if (t < TOKENS && d < D)
      e[i][j] = token_of(rest, rest_strides, head / H, head % H, t)[d * rest_strides[3]];
  }
}
for (uint i = me; i < D * R; i += threads) cs[i] = c0[head % H * D * R + i];

for (int step = 0; step < n_iter; step++) {
  // A = orthonormal(E orthonormal(C)), the first C as it is
  if (step > 0 && simdgroup == 0) orthonormalize<R>(cs, D, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < EACH; i++) {
    const uint t = simdgroup + i * SIMDS;
    for (uint r = 0; r < R; r++) {
      float sum = 0;
      for (uint j = 0; j < WIDE; j++) {
        const uint d = lane + 32 * j;
        sum += d < D ? e[i][j] * cs[d * R + r] : 0.0f;
      }
      sum = simd_sum(sum);
      if (lane == 0 && t < TOKENS) as[t * R + r] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) orthonormalize<R>(as, TOKENS, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // C = E^T A, summed over the simdgroups' tokens
  for (uint r = 0; r < R; r++) {
    for (uint j = 0; j < WIDE; j++) {
      float sum = 0;
      for (uint i = 0; i < EACH; i++) {
        const uint t = simdgroup + i * SIMDS;
        sum += t < TOKENS ? e[i][j] * as[t * R + r] : 0.0f;
      }
      if (lane + 32 * j < D) parts[simdgroup * D + lane + 32 * j] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = me; d < D; d += threads) {
      float sum = 0;
      for (uint s = 0; s < SIMDS; s++) sum += parts[s * D + d];
      cs[d * R + r] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
for (uint i = me; i < TOKENS * R; i += threads) a[head * TOKENS * R + i] = static_cast<O>(as[i]);
for (uint i = me; i < D * R; i += threads) c[head * D * R + i] = static_cast<O>(cs[i]);
