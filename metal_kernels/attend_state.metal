// phi(q) Hs / rho and log rho, rho = phi(q) z, phi(q) = |gelu(gelu(q A1) A2)|.
// === kernel
// q [B, Hq, L, D]; state [B, H, R, D]; norm [B, H, R]; all of any strides. a1 [Hq, D, M] and
// a2 [Hq, M, R], contiguous, M a multiple of 16 bytes. out [B, Hq, L, D]; lse [B, Hq, L].
// A threadgroup has one query head and the L queries of BATCH batch rows, which share one read of
// its maps: most of the bytes are A1. Rows are (batch row, query).
using Shape = Lanes<K, M>;
constexpr int ROWS = BATCH * L, PER = Shape::PER, PIECES = Shape::PIECES, THREADS = 32 * SIMDS;
threadgroup float queries[ROWS * D];
threadgroup float4 hidden[ROWS * M / 4];
threadgroup float features[ROWS * R];
threadgroup float rho[ROWS];
const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int t = thread_index_in_threadgroup;
const int B = q_shape[0], Hq = q_shape[1], H = state_shape[1];
const int head = threadgroup_position_in_grid.y, h = head / (Hq / H);
const int first = threadgroup_position_in_grid.x * BATCH;

for (int e = t; e < ROWS * D; e += THREADS) {
  const int b = first + e / (L * D), l = e / D % L;
  queries[e] = b < B ? float(q[b * q_strides[0] + head * q_strides[1] + l * q_strides[2]
                               + e % D * q_strides[3]])
                     : 0;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// hidden = gelu(q A1). WIDE lanes have pieces of a row of A1 side by side, the others further rows.
for (int strip = simdgroup * WIDE; strip < PIECES; strip += SIMDS * WIDE) {
  const int piece = strip + lane % WIDE;
  float4 sums[ROWS][PER / 4] = {};
  if (piece < PIECES)
    for (int d = lane / WIDE; d < D; d += 32 / WIDE) {
      const uint4 read = Shape::read(a1 + (size_t(head) * D + d) * M, piece);
      for (int f = 0; f < PER / 4; f++)
        for (int row = 0; row < ROWS; row++)
          sums[row][f] += queries[row * D + d] * part<K>(read, f);
    }
  for (int row = 0; row < ROWS; row++)
    for (int f = 0; f < PER / 4; f++) {
      float4 x = sums[row][f];
      for (ushort step = WIDE; step < 32; step *= 2)
        x += simd_shuffle_xor(x, step);
      if (lane < WIDE && piece < PIECES)
        hidden[(row * M + piece * PER) / 4 + f] =
            float4(gelu(x.x), gelu(x.y), gelu(x.z), gelu(x.w));
    }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// features = |gelu(hidden A2)|
threadgroup const float* wide = reinterpret_cast<threadgroup const float*>(hidden);
for (int r = simdgroup; r < R; r += SIMDS) {
  float sums[ROWS] = {};
  for (int m = lane; m < M; m += 32) {
    const float a = float(a2[(size_t(head) * M + m) * R + r]);
    for (int row = 0; row < ROWS; row++)
      sums[row] += wide[row * M + m] * a;
  }
  for (int row = 0; row < ROWS; row++) {
    const float x = simd_sum(sums[row]);
    if (lane == 0)
      features[row * R + r] = abs(gelu(x));
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// rho = features z
for (int row = simdgroup; row < ROWS; row += SIMDS) {
  const int b = first + row / L;
  float x = 0;
  if (b < B)
    for (int r = lane; r < R; r += 32)
      x += features[row * R + r]
          * float(norm[b * norm_strides[0] + h * norm_strides[1] + r * norm_strides[2]]);
  x = simd_sum(x);
  if (lane == 0)
    rho[row] = x;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// out = features Hs / rho: each number of Hs is read once for all queries
for (int e = t; e < BATCH * D; e += THREADS) {
  const int b = first + e / D, d = e % D, row = e / D * L;
  if (b < B) {
    float sums[L] = {};
    for (int r = 0; r < R; r++) {
      const float x = float(state[b * state_strides[0] + h * state_strides[1]
                                  + r * state_strides[2] + d * state_strides[3]]);
      for (int l = 0; l < L; l++)
        sums[l] += features[(row + l) * R + r] * x;
    }
    for (int l = 0; l < L; l++)
      out[((size_t(b) * Hq + head) * L + l) * D + d] =
          rho[row + l] > 0 ? sums[l] / rho[row + l] : 0;
  }
}
if (t < ROWS && first + t / L < B)
  lse[((first + t / L) * size_t(Hq) + head) * L + t % L] = log(rho[t]);  // -inf if 0
