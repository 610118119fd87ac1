// Attention mass, first launch: the log-sum-exp of each query's scores, over a split of the keys.

// Joins the row of the lane whose number differs by `mask`, which saw other keys of the same query.
inline void join_lane(thread Row& row, ushort mask) {
  const float top = simd_shuffle_xor(row.top, mask), sum = simd_shuffle_xor(row.sum, mask);
  include(row, top, sum);
}
// === kernel
// q [B, Hq, L, D] of any strides; k [B, H, T, D], the last axis contiguous; valid [B, H or 1, T];
// lse [splits, B, Hq, L]. Row r of a head of k is query r / G of query head r % G of its group. A
// threadgroup has QUERIES rows and `keys` keys, a simdgroup 8 EACH of them at a time.
constexpr uint PITCH = QUERIES + 2, BLOCKS = QUERIES / 8, EACH = 4;
threadgroup float queries[D * PITCH];  // [D, rows], times scale
threadgroup float2 found[SIMDS * QUERIES];  // top and sum of what each simdgroup saw
const uint B = k_shape[0], H = k_shape[1], T_ = k_shape[2], Hq = q_shape[1], L = q_shape[2];
const uint G = Hq / H, rows = G * L, older = T_ - L;  // tokens before the first query's own
const uint heads = (rows + QUERIES - 1) / QUERIES;  // threadgroups of one head
const uint h = threadgroup_position_in_grid.x / heads, b = threadgroup_position_in_grid.z;
const uint row0 = threadgroup_position_in_grid.x % heads * QUERIES;
const uint split = threadgroup_position_in_grid.y;
const uint me = thread_index_in_threadgroup, threads = 32 * SIMDS;
const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const Place at = place(lane);

for (uint e = me; e < QUERIES * D; e += threads) {
  const uint r = row0 + e / D, head = h * G + r % G, d = e % D;
  float value = 0;
  if (r < rows)
    value = static_cast<float>(token_of(q, q_strides, b, head, r / G)[d * q_strides[3]]);
  queries[d * PITCH + e / D] = value * scale;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

Row seen[BLOCKS][2];  // of this lane's queries
// the last of the rows sees most
const uint last = older + min(row0 + QUERIES - 1, rows - 1) / G;
const uint end = min(min((split + 1) * keys, T_), last + 1);
for (uint first = split * keys + 8 * EACH * simdgroup; first < end; first += 8 * EACH * SIMDS) {
  simdgroup_float8x8 scores[EACH][BLOCKS];
  for (uint n = 0; n < EACH; n++) {
    for (uint i = 0; i < BLOCKS; i++)
      scores[n][i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (uint c = 0; c < D / 16; c++) {
    for (uint n = 0; n < EACH; n++) {
      const uint t = first + 8 * n + at.row;
      float4 key = 0;
      if (t < end) {
        key = read4(token_of(k, k_strides, b, h, t) + 16 * c + 2 * at.col);
      }
      for (uint i = 0; i < BLOCKS; i++)
        multiply(scores[n][i], key, queries + 16 * c * PITCH + 8 * i, PITCH, at);
    }
  }
  for (uint n = 0; n < EACH; n++) {
    const uint t = first + 8 * n + at.row;
    bool there = t < end;
#ifdef HAS_VALID
    there = there && *token_of(valid, valid_strides, b, valid_shape[1] == 1 ? 0 : h, t);
#endif
    for (uint i = 0; i < BLOCKS; i++) {
      for (uint j = 0; j < 2; j++) {
        float score = elements(scores[n][i])[j];
#ifdef HAS_SOFTCAP
        score = soft_capped(score, softcap);
#endif
        const bool sees = there && t <= older + (row0 + 8 * i + at.col + j) / G;
        elements(scores[n][i])[j] = sees ? score : -INFINITY;
      }
    }
  }
  // the rows are rescaled once for the EACH scores that a lane has of a query
  for (uint i = 0; i < BLOCKS; i++) {
    for (uint j = 0; j < 2; j++) {
      thread Row& row = seen[i][j];
      float top = row.top;
      for (uint n = 0; n < EACH; n++) top = max(top, elements(scores[n][i])[j]);
      row.sum *= exp(row.top - top);
      for (uint n = 0; n < EACH; n++) row.sum += exp(elements(scores[n][i])[j] - top);
      row.top = top;
    }
  }
}

// lanes of the same columns, then simdgroups
for (uint i = 0; i < BLOCKS; i++) {
  for (uint j = 0; j < 2; j++) {
    join_lane(seen[i][j], 2);
    join_lane(seen[i][j], 4);
    join_lane(seen[i][j], 16);
    if (at.row == 0)
      found[simdgroup * QUERIES + 8 * i + at.col + j] = float2(seen[i][j].top, seen[i][j].sum);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint e = me; e < QUERIES; e += threads) {
  const uint r = row0 + e;
  Row all;
  for (uint s = 0; s < SIMDS; s++)
    include(all, found[s * QUERIES + e].x, found[s * QUERIES + e].y);
  if (r < rows) lse[((split * B + b) * Hq + h * G + r % G) * L + r / G] = log_sum_exp(all);
}
