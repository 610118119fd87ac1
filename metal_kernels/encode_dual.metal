// Two-sided scales of a tile, held in registers: x is about level(code) r c + mu.

constant constexpr float EPS = 1e-8f;  // floor of a deviation

// Sums over all tokens of a tile, or their least, of what each simdgroup found in its own. A lane
// gives and gets channels lane, lane + 32, ... `parts` is [simdgroups, D].
template <uint D, uint WIDE, bool LEAST>
inline void over_tokens(
    thread float* x, threadgroup float* parts, uint simdgroup, uint simdgroups, uint lane) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the last parts are read
  for (uint j = 0; j < WIDE; j++)
    if (lane + 32 * j < D) parts[simdgroup * D + lane + 32 * j] = x[j];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < WIDE; j++) {
    x[j] = LEAST ? INFINITY : 0;
    for (uint s = 0; s < simdgroups && lane + 32 * j < D; s++) {
      const float part = parts[s * D + lane + 32 * j];
      x[j] = LEAST ? min(x[j], part) : x[j] + part;
    }
  }
}

// z = (x - mu) / (r c), 0 where the factor is too small for the type it is stored in
inline float scaled(float x, float mu, float factor) {
  return factor > 0 ? (x - mu) / factor : 0.0f;
}
// === kernel
// x [B, H, n, D] of any strides; codes as quantize has them; mu, c, step, low [B, H, tiles, D];
// r [B, H, n]; rest [B, H, n, D], what is left of x. A threadgroup has `tile` tokens of one head, a
// simdgroup EACH of them, a lane every 32nd channel.
constexpr uint EACH = 8, WIDE = (D + 31) / 32, PER = 32 / BITS;
constexpr float TOP = (1u << BITS) - 1;
threadgroup float parts[16 * D];
const uint H = x_shape[1], n = x_shape[2], tiles = (n + tile - 1) / tile;
const uint nth = threadgroup_position_in_grid.x, head = threadgroup_position_in_grid.y;
const uint b = head / H, lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = threads_per_threadgroup.x / 32;
const uint size = min(uint(tile), n - nth * tile), token0 = nth * tile + simdgroup * EACH;
const uint mine = min(EACH, size - min(size, simdgroup * EACH));  // tokens of this simdgroup

float y[EACH][WIDE], rows[EACH], col[WIDE], mean[WIDE] = {0};
for (uint i = 0; i < EACH; i++) {
  rows[i] = 1;
  for (uint j = 0; j < WIDE; j++) {
    const uint d = lane + 32 * j;
    y[i][j] = 0;
    if (i < mine && d < D) {
      y[i][j] = static_cast<float>(
          token_of(x, x_strides, b, head % H, token0 + i)[d * x_strides[3]]);
    }
  }
}
// mu = mean over tokens, once more over what it leaves
float center[WIDE] = {0};
for (uint pass = 0; pass < 2; pass++) {
  for (uint j = 0; j < WIDE; j++) {
    col[j] = 0;
    for (uint i = 0; i < mine; i++) col[j] += y[i][j] - center[j];
  }
  over_tokens<D, WIDE, false>(col, parts, simdgroup, simdgroups, lane);
  for (uint j = 0; j < WIDE; j++) center[j] += col[j] / size;
}

// c = std_t((x - mu) / r), then r = std_d((x - mu) / c)
for (int round_ = 0; round_ < rounds; round_++) {
  for (uint j = 0; j < WIDE; j++) {
    mean[j] = 0;
    for (uint i = 0; i < mine; i++) mean[j] += (y[i][j] - center[j]) / rows[i];
  }
  over_tokens<D, WIDE, false>(mean, parts, simdgroup, simdgroups, lane);
  for (uint j = 0; j < WIDE; j++) {
    col[j] = 0;
    for (uint i = 0; i < mine; i++) {
      const float off = (y[i][j] - center[j]) / rows[i] - mean[j] / size;
      col[j] += off * off;
    }
  }
  over_tokens<D, WIDE, false>(col, parts, simdgroup, simdgroups, lane);
  for (uint j = 0; j < WIDE; j++) col[j] = max(sqrt(col[j] / size), EPS);
  for (uint i = 0; i < EACH; i++) {
    float sum = 0, square = 0;
    for (uint j = 0; j < WIDE; j++)
      sum += (y[i][j] - center[j]) / col[j];  // 0 where there is no channel
    sum = simd_sum(sum) / D;
    for (uint j = 0; j < WIDE; j++) {
      const float off = lane + 32 * j < D ? (y[i][j] - center[j]) / col[j] - sum : 0.0f;
      square += off * off;
    }
    rows[i] = max(sqrt(simd_sum(square) / D), EPS);
  }
}

// mu, c and r as they are stored
const uint at = (head * tiles + nth) * D;
for (uint j = 0; j < WIDE; j++) {
  const uint d = lane + 32 * j;
  const S mu_ = static_cast<S>(center[j]), c_ = static_cast<S>(col[j]);
  center[j] = static_cast<float>(mu_);
  col[j] = static_cast<float>(c_);
  if (simdgroup == 0 && d < D) {
    mu[at + d] = mu_;
    c[at + d] = c_;
  }
}
for (uint i = 0; i < mine; i++) {
  const S r_ = static_cast<S>(rows[i]);
  rows[i] = static_cast<float>(r_);
  if (lane == 0) r[head * n + token0 + i] = r_;
}

// level = code step + low: the fixed grid, or the channel's own range
float steps[WIDE], lows[WIDE];
#ifdef HAS_GRID_STEP
for (uint j = 0; j < WIDE; j++) {
  steps[j] = grid_step;
  lows[j] = -TOP / 2 * grid_step;
}
#else
float highs[WIDE];  // negative, as the least of -z
for (uint j = 0; j < WIDE; j++) {
  lows[j] = highs[j] = INFINITY;
  for (uint i = 0; i < mine; i++) {
    const float z = scaled(y[i][j], center[j], rows[i] * col[j]);
    lows[j] = min(lows[j], z);
    highs[j] = min(highs[j], -z);
  }
}
over_tokens<D, WIDE, true>(lows, parts, simdgroup, simdgroups, lane);
over_tokens<D, WIDE, true>(highs, parts, simdgroup, simdgroups, lane);
for (uint j = 0; j < WIDE; j++) {
  const uint d = lane + 32 * j;
  const S step_ = static_cast<S>((-highs[j] - lows[j]) / TOP);
  const Z low_ = static_cast<Z>(lows[j]);
  if (simdgroup == 0 && d < D) {
    step[at + d] = step_ == S(0) ? S(1) : step_;
    low[at + d] = low_;
  }
  steps[j] = static_cast<float>(step_);
  lows[j] = static_cast<float>(low_);
}
#endif

threadgroup_barrier(mem_flags::mem_threadgroup);  // the last parts are read
for (uint j = 0; j < WIDE; j++) {
  const uint d = lane + 32 * j;
  uint words[2] = {0};  // of keys: EACH codes, from bit 0 of the first
  for (uint i = 0; i < mine; i++) {
    const float z = scaled(y[i][j], center[j], rows[i] * col[j]);
    const float code = code_of(z, lows[j], steps[j], TOP);
    if (KEYS) {
      words[i / PER] |= uint(code) << (i % PER * BITS);
    } else {
      uint word = uint(code) << (lane % PER * BITS);
      for (ushort mask = 1; mask < PER; mask *= 2) word |= simd_shuffle_xor(word, mask);
      if (d < D && lane % PER == 0) codes[(head * n + token0 + i) * (D / PER) + d / PER] = word;
    }
#ifdef HAS_FIT
    const float level = code * steps[j] + lows[j];
    if (d < D)
      rest[(head * n + token0 + i) * D + d] = y[i][j] - (level * rows[i] * col[j] + center[j]);
#endif
  }
  if (KEYS && PER > EACH && d < D) parts[simdgroup * D + d] = as_type<float>(words[0]);
  const uint in_row = (n + PER - 1) / PER;
  for (uint w = 0; KEYS && PER <= EACH && w * PER < mine; w++)
    if (d < D) codes[(head * D + d) * in_row + token0 / PER + w] = words[w];
}
if (KEYS && PER > EACH) {
  // two simdgroups' codes are a word
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint d = lane; d < D && simdgroup % 2 == 0; d += 32) {
    uint word = as_type<uint>(parts[simdgroup * D + d]);
    if (simdgroup + 1 < simdgroups) word |= as_type<uint>(parts[(simdgroup + 1) * D + d]) << 16;
    codes[(head * D + d) * ((n + PER - 1) / PER) + token0 / PER] = word;
  }
}
