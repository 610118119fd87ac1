// Attention mass, second launch: each key's probability, summed over the queries of its head.
// === kernel
// q [B, Hq, L, D] of any strides; k [B, H, T, D], the last axis contiguous; lse [splits, B, Hq, L];
// valid [B, H or 1, T]; sinks [Hq]; mass [B, H, T]. Row r of a head of k is query r / G of query
// head r % G of its group. A threadgroup has `keys` keys, of each 8 SIMDS eight in a simdgroup.
constexpr uint PITCH = QUERIES + 2, BLOCKS = QUERIES / 8;
threadgroup float queries[D * PITCH];  // [D, rows], times scale
threadgroup float below[QUERIES];  // log of the denominator, inf where a query adds nothing
const uint B = k_shape[0], H = k_shape[1], T_ = k_shape[2], Hq = q_shape[1], L = q_shape[2];
const uint G = Hq / H, rows = G * L, older = T_ - L;  // tokens before the first query's own
const uint h = threadgroup_position_in_grid.y, b = threadgroup_position_in_grid.z;
const uint me = thread_index_in_threadgroup, threads = 32 * SIMDS;
const uint lane = thread_index_in_simdgroup;
const Place at = place(lane);
const uint begin = threadgroup_position_in_grid.x * keys, end = min(begin + keys, T_);

for (uint first = begin; first < end; first += 8 * SIMDS) {
  const uint t = first + 8 * simdgroup_index_in_threadgroup + at.row;
  float4 key[D / 16];
  for (uint c = 0; c < D / 16; c++) {
    key[c] = 0;
    if (t < T_) {
      key[c] = read4(token_of(k, k_strides, b, h, t) + 16 * c + 2 * at.col);
    }
  }
  float sum = 0;
  const uint row0 = first > older ? (first - older) * G / QUERIES * QUERIES : 0;  // sees `first`
  for (uint row = row0; row < rows; row += QUERIES) {
    if (first == begin) {  // where there is more than one block of rows, there is one of keys
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last rows are used
      for (uint e = me; e < QUERIES * D; e += threads) {
        const uint r = row + e / D, head = h * G + r % G, d = e % D;
        float value = 0;
        if (r < rows)
          value = static_cast<float>(token_of(q, q_strides, b, head, r / G)[d * q_strides[3]]);
        queries[d * PITCH + e / D] = value * scale;
      }
      for (uint e = me; e < QUERIES; e += threads) {
        const uint r = row + e, l = r / G, head = h * G + r % G;
        Row all;
        bool own = r < rows;
#ifdef HAS_VALID
        own = own && *token_of(valid, valid_strides, b, valid_shape[1] == 1 ? 0 : h, older + l);
#endif
        for (uint s = 0; own && s < uint(lse_shape[0]); s++)
          include(all, lse[((s * B + b) * Hq + head) * L + l], 1);
#ifdef HAS_SINKS
        if (own) include(all, static_cast<float>(sinks[head * sinks_strides[0]]), 1);
#endif
        below[e] = all.sum > 0 ? log_sum_exp(all) : INFINITY;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    simdgroup_float8x8 scores[BLOCKS];
    for (uint i = 0; i < BLOCKS; i++) scores[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint c = 0; c < D / 16; c++) {
      for (uint i = 0; i < BLOCKS; i++)
        multiply(scores[i], key[c], queries + 16 * c * PITCH + 8 * i, PITCH, at);
    }
    // p = exp(score - log of the denominator)
    for (uint i = 0; i < BLOCKS; i++) {
      for (uint j = 0; j < 2; j++) {
        const uint r = 8 * i + at.col + j;
        float score = elements(scores[i])[j];
#ifdef HAS_SOFTCAP
        score = soft_capped(score, softcap);
#endif
        if (t <= older + (row + r) / G) sum += exp(score - below[r]);
      }
    }
  }
  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 8);
  if (at.col == 0 && t < end) {
#ifdef HAS_VALID
    const bool there = *token_of(valid, valid_strides, b, valid_shape[1] == 1 ? 0 : h, t);
    sum = there ? sum : 0.0f;
#endif
    mass[(b * H + h) * T_ + t] = sum;
  }
}
