// softmax(scale q K^T) V over coded tokens: each lane decodes what it needs, for all rows at once.

#ifdef HAS_K_INDEX
constant constexpr const bool K_OUTLIERS = true;
#else
constant constexpr const bool K_OUTLIERS = false;
#endif
// Two-sided scales of 2 bits have a fixed grid.
#ifdef HAS_K_STEP
#define K_LEVELS k_step, k_low
#else
#define K_LEVELS grid_step, grid_low
#endif
#ifdef HAS_V_STEP
#define V_LEVELS v_step, v_low
#else
#define V_LEVELS grid_step, grid_low
#endif
// === kernel
// q [B, Hq, L, D]. A run of equal blocks: arrays [blocks, B, ...], contiguous, for K and V
//   k, v      codes: keys by channel [H, D, words of n], or by token [H, n, words of D] as values
//   step, low by channel [H, n / share, D], by token [heads, n, D / width]
//   mu, c, r  two-sided scales [H, n / share, D] and [H, n]; then step, low as mu
//   a, b      low rank A [H, n, RANK] and C [H, D, RANK]
//   index, delta  outliers of keys [H, D, outliers], of values [n, outliers]; ascending
// or vectors that are not coded, plain [B, H, n, D]. For each of both norm [B, norms, start + T];
// retained [B, m], token * vectors + vector, ascending, then -1; exact [B, m, D or H D].
// valid [8 times the same, B, H, T]; out [S, B, Hq, L, D]; lse [S, B, Hq, L].
// A threadgroup has `span` pieces of a head of K and V, and ROWS of the rows (query head, query)
// that share them.
using S = Shares<D, ROWS, SIMDS>;
using Keys = conditional_t<K_BITS == 0, Plain<T, S::E>, Packed<K_BITS, S::E>>;
using Values = conditional_t<V_BITS == 0, Plain<T, S::E>, Packed<V_BITS, S::E>>;
constexpr int E = S::E, TILE = S::TILE, FIT = SIMDS * ROWS * (RANK > 0 ? RANK : 1);
threadgroup float4 queries4[ROWS * D / 4];  // the queries [ROWS, D], and in the end the answer
threadgroup float4 shared[KEYS == BY_TOKEN ? 1 : SIMDS * S::ROUND * 32];
threadgroup float tops[SIMDS * ROWS], projected[FIT], folded[FIT];
threadgroup float weights[RANK > 0 ? ROWS * TILE : 1];  // p of all simdgroups
threadgroup int2 outliers[K_OUTLIERS ? 2 * D : 1];
threadgroup float2 found[SIMDS * ROWS];
threadgroup float2 k_levels[KEYS == ONE_GROUP ? D : K_GROUPS > 0 ? K_GROUPS * TILE : 1];
threadgroup float3 v_levels[V_WHOLE ? D : 1];  // of the tile
threadgroup float* queries = reinterpret_cast<threadgroup float*>(queries4);
const uint thread_index = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const constant Sizes& sizes_ = *reinterpret_cast<const constant Sizes*>(sizes);
const constant Side& of_k = *reinterpret_cast<const constant Side*>(k_sizes);
const constant Side& of_v = *reinterpret_cast<const constant Side*>(v_sizes);
const float scale = numbers[0], softcap = numbers[1], k_gain = numbers[2], v_gain = numbers[3];
const Same grid_step{numbers[4]}, grid_low{numbers[5]};
const int B = q_shape[0], L = q_shape[2], H = sizes_.heads, n = sizes_.tokens;
const int share = q_shape[1] / H * L, first = threadgroup_position_in_grid.x * ROWS;
const int b = threadgroup_position_in_grid.y / H, h = threadgroup_position_in_grid.y % H;
const int start = threadgroup_position_in_grid.z * sizes_.span;
const int stop = min(start + sizes_.span, sizes_.pieces), pieces = pieces_of(n);

for (int e = thread_index; e < ROWS * D; e += TILE) {
  const int row = first + e / D, head = h * (share / L) + row / L;
  queries[e] = row < share
      ? scale * float(q[b * q_strides[0] + head * q_strides[1] + row % L * q_strides[2]
                        + e % D * q_strides[3]])
      : 0;
}
#if defined(HAS_K_STEP) && !defined(HAS_K_MU)
for (int d = thread_index; d < D && KEYS == ONE_GROUP; d += TILE)
  k_levels[d] = step_low(k_step, k_low, (size_t(b) * H + h) * D + d);
#endif
threadgroup_barrier(mem_flags::mem_threadgroup);
if (TURN)
  turn<D, TILE>(queries, ROWS, thread_index);

Row rows[ROWS];  // one top for all simdgroups; each lane sums up for itself
float weighted[ROWS * E] = {};  // sum of exp(score - top) v
const int group = lane / S::LANES, channel = lane % S::LANES * E;
for (int tile = start; tile < stop; tile += SIMDS) {
  const Piece own = piece_at(tile + simdgroup, stop, n);
  const int token = own.first + lane, tail = min(tile + SIMDS, stop);
  const bool live = int(lane) < own.live;
  const size_t row = size_t(own.block) * B + b, head = row * H + h;
  float scores[ROWS] = {};  // of `token`

  if constexpr (KEYS == BY_TOKEN) {
#ifdef HAS_K_PLAIN
    const size_t stride = k_plain_strides[2];
    sum_tokens<S, Keys>(
        k_plain + b * k_plain_strides[0] + h * k_plain_strides[1] + own.first * stride, stride, own,
        Unscaled(), queries, scores, lane);
#elif defined(HAS_K_STEP)
    const size_t stride = D * K_BITS / 32;
    const size_t level = of_k.heads == 1 ? row : head;
    auto scales = scales_of_tokens<D>(k_step, k_low, level, channel, n, of_k);
    sum_tokens<S, Keys>(
        k + (head * n + own.first) * stride, stride, own, scales, queries, scores, lane);
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);  // nobody reads the last tile's tops
  } else {
#ifndef HAS_K_PLAIN
    const int column = lane / S::COLUMN * E, words = (n * K_BITS + 31) / 32;
    const Piece there = piece_at(tile + column / 32, stop, n);
    const int at = there.first + column % 32, there_live = there.live - column % 32;
    const size_t from = (size_t(there.block) * B + b) * H + h;
    const size_t level = scales_at<D>(from, at, n, of_k);
    if constexpr (K_GROUPS > 0) {  // scales of tokens, for all simdgroups
      for (int g = 0; g < K_GROUPS; g++) {
        const size_t place = (head * n + token) * K_GROUPS + g;
#ifdef HAS_K_MU
        k_levels[thread_index] = live ? float2(k_r[place], 0) : 0;
#else
        k_levels[g * TILE + thread_index] = live ? step_low(k_step, k_low, place) : 0;
#endif
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
#ifdef HAS_K_MU
    auto scales = dual_of_channels(k_mu, k_c, K_LEVELS, level, k_levels + column);
#else
    auto scales =
        scales_of_channels<KEYS, TILE>(k_step, k_low, level, k_levels, column, of_k.width);
#endif
#ifdef HAS_K_INDEX
    const Piece begin = piece_at(tile, stop, n);
    const bool cut = there.block == begin.block && begin.first > 0;
    const int odd = (tile - start) / SIMDS % 2;
    const ChannelOutliers<decltype(k_index), decltype(k_delta)> rest{
        k_index, k_delta, from * D * of_k.outliers, of_k.outliers, n, cut ? begin.first : 0,
        min(n, (tail - there.block * pieces) * 32), cut && tile > start, column == TILE - E,
        outliers + (1 - odd) * D, outliers + odd * D};
#else
    const NoOutliers rest;
#endif
    float sums[ROWS * E] = {};
    sum_channels<S, Keys>(
        k + from * D * words, words, at, there_live > 0, n, scales, rest, queries, sums, simdgroup,
        lane);
#ifdef HAS_K_A
    if (own.live > 0 && (own.first == 0 || tile + simdgroup == start))  // for the whole block
      project<D, ROWS, RANK>(
          k_b, head * D * RANK, queries, projected + own.block % SIMDS * ROWS * RANK, lane);
#endif
    share_sums<S>(sums, shared, scores, simdgroup, lane);
#ifdef HAS_K_A
    for (int j = 0; live && j < RANK; j++) {  // score += A[token] (q C)
      const float a = k_a[(head * n + token) * RANK + j];
      for (int r = 0; r < ROWS; r++)
        scores[r] += a * projected[(own.block % SIMDS * ROWS + r) * RANK + j];
    }
#endif
#endif
  }

#ifdef HAS_V_MU
  if constexpr (V_WHOLE) {  // while nobody reads those of the last tile
    const Piece begin = piece_at(tile, stop, n);
    const size_t from = scales_at<D>(
        (size_t(begin.block) * B + b) * H + h, begin.first, n, of_v);
    for (int d = thread_index; d < D; d += TILE)
      v_levels[d] = dual_level(v_mu, v_c, V_LEVELS, from + d);
  }
#endif
  const int at = sizes_.start + own.block * n + token;  // as norms and retained vectors count
  float k_factor = k_gain, v_factor = v_gain;
#ifdef HAS_K_NORM
  k_factor *= live ? float(k_norm[norm_of(k_norm_strides, of_k, b, h, at)]) : 0;
#endif
#ifdef HAS_V_NORM
  v_factor *= live ? float(v_norm[norm_of(v_norm_strides, of_v, b, h, at)]) : 0;
#endif
  for (int r = 0; r < ROWS; r++)
    scores[r] *= k_factor;
#ifdef HAS_K_RETAINED
  score_retained<D, ROWS>(
      find_retained(k_retained, of_k, b, h, at, own.live, lane), k_exact, of_k, b, h, H, queries,
      scores, lane);
#endif
  bool seen = live;
#ifdef HAS_VALID
  seen = seen && valid[b * valid_strides[1] + h * valid_strides[2]
                       + (own.block * n + token) * valid_strides[3]];
#endif

  // the scores become p = exp(score - top), with one top for all simdgroups
  for (int r = 0; r < ROWS; r++) {
    scores[r] = seen ? soft_capped(scores[r], softcap) : -INFINITY;
    const float top = simd_max(scores[r]);
    if (lane == 0)
      tops[simdgroup * ROWS + r] = top;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float factors[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const float before = rows[r].top;
    for (int other = 0; other < SIMDS; other++)
      rows[r].top = max(rows[r].top, tops[other * ROWS + r]);
    factors[r] = exp(before - rows[r].top);
    scores[r] = exp(scores[r] - rows[r].top);
    rows[r].sum = factors[r] * rows[r].sum + scores[r];
    for (int e = 0; e < E; e++)
      weighted[r * E + e] *= factors[r];
  }

#ifdef HAS_V_RETAINED
  const int kept = find_retained(v_retained, of_v, b, h, at, own.live, lane);
  add_retained<E, D, ROWS>(
      kept, v_exact, of_v, b, h, H, channel, group == 0 && channel < D, scores, weighted);
  v_factor = kept < 0 ? v_factor : 0;
#endif
  for (int r = 0; r < ROWS; r++)
    scores[r] *= v_factor;
#ifdef HAS_V_INDEX
  const TokenOutliers<decltype(v_index), decltype(v_delta)> rest{
      v_index, v_delta, row * n * of_v.outliers, of_v.outliers, h * D, h * D + D,
      (2 * h + 1) * of_v.outliers / (2 * H)};
#else
  const NoOutliers rest;
#endif
#ifdef HAS_V_PLAIN
  const size_t stride = v_plain_strides[2];
  add_values<S, Values>(
      v_plain + b * v_plain_strides[0] + h * v_plain_strides[1] + own.first * stride, stride, own,
      Unscaled(), rest, scores, weighted, lane);
#else
#ifdef HAS_V_MU
  DualTokens<decltype(v_r)> scales{v_r, head * n, {}};
  for (int e = 0; e < E && channel < D && own.live > 0; e++) {
    if constexpr (V_WHOLE)
      scales.levels[e] = v_levels[channel + e];
    else
      scales.levels[e] = dual_level(
          v_mu, v_c, V_LEVELS, scales_at<D>(head, own.first, n, of_v) + channel + e);
  }
#else
  const size_t level = of_v.heads == 1 ? row : head;
  auto scales = scales_of_tokens<D>(v_step, v_low, level, channel, n, of_v);
#endif
  const size_t stride = D * V_BITS / 32;
  add_values<S, Values>(
      v + (head * n + own.first) * stride, stride, own, scales, rest, scores, weighted, lane);
#endif

#ifdef HAS_V_A
  for (int r = 0; r < ROWS; r++)
    weights[r * TILE + thread_index] = scores[r];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int piece = tile, next; piece < tail; piece = next) {  // each block by one simdgroup
    const int block = piece / pieces, end = (block + 1) * pieces;
    next = min(end, tail);
    if (block % SIMDS != int(simdgroup))
      continue;
    const size_t from = (size_t(block) * B + b) * H + h;
    const int before = piece_at(piece, stop, n).first;
    threadgroup float* sums = folded + simdgroup * ROWS * RANK;
    fold<ROWS, RANK, TILE>(
        v_a, (from * n + before) * RANK, weights + (piece - tile) * 32,
        min((next - piece) * 32, n - before), factors, before > 0 && tile > start, sums, lane);
    if ((next == end || next == stop) && group == 0 && channel < D)
      unfold<E, ROWS, RANK>(v_b, (from * D + channel) * RANK, sums, weighted);
  }
#endif
}

for (int r = 0; r < ROWS; r++) {
  rows[r].sum = simd_sum(rows[r].sum);
  for (int e = 0; e < E; e++)
    for (ushort step = S::LANES; step < 32; step *= 2)  // groups had different tokens
      weighted[r * E + e] += simd_shuffle_xor(weighted[r * E + e], step);
}
float same[ROWS];  // 1, as there is one top
join_rows<SIMDS, ROWS>(rows, same, found, simdgroup, lane);  // all are done with the queries
for (uint other = 0; other < SIMDS; other++) {
  for (int i = 0; i < ROWS * E && other == simdgroup && group == 0 && channel < D; i++) {
    const int place = i / E * D + channel + i % E;
    queries[place] = (other == 0 ? 0 : queries[place]) + weighted[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (TURN)
  turn<D, TILE>(queries, ROWS, thread_index);
const size_t all = size_t(B) * H * share, split = threadgroup_position_in_grid.z * all;
const size_t end = split + (b * H + h + 1) * share;
write_rows<D, SIMDS, ROWS>(
    rows, queries4, out, lse, end - share + first, end, simdgroup, lane);
