// MiniCache's merge: one direction and two norms for two layers' vectors of the same token.

// Sums over a vector: one head's, in a simdgroup, or all heads' (TOKEN), in a threadgroup.
template <bool TOKEN>
inline float2 total(
    float2 x, threadgroup float2* parts, uint simdgroup, uint simdgroups, uint lane) {
  x = float2(simd_sum(x.x), simd_sum(x.y));
  if (TOKEN) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last sum's parts are read
    if (lane == 0) parts[simdgroup] = x;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x = 0;
    for (uint s = 0; s < simdgroups; s++) x += parts[s];
  }
  return x;
}

inline float4 over(float4 x, float norm) {
  return norm > 0 ? x / norm : x;
}

// What of u and of v the direction between them is made of, t of the way along the arc w.
inline float2 slerp(float w, float t) {
  constexpr float EPS = 1e-3f;
  if (w < EPS) return float2(1 - t, t);  // nearly parallel
  if (w > M_PI_F - EPS) return float2(0, 1);  // there is no direction between
  return float2(sin((1 - t) * w), sin(t * w)) / sin(w);
}
// === kernel
// xa, xb [B, H, T, D], the last axis contiguous; e [B, H, T, D]; norm_a, norm_b, angle [B, G, T],
// G = H, or 1 for whole tokens. how: 0 slerp, 1 mean, 2 max-norm. A simdgroup has EACH heads of a
// token, and a lane every 32nd four of channels: SIZE of them in all.
constexpr uint FOURS = (D + 127) / 128, SIZE = EACH * FOURS;
threadgroup float2 parts[32];
const uint B = xa_shape[0], H = xa_shape[1], T_ = xa_shape[2];
const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = threads_per_threadgroup.x / 32;
const uint vector_ = TOKEN ? threadgroup_position_in_grid.x : thread_position_in_grid.x / 32;
const uint b = vector_ / (TOKEN ? T_ : H * T_), token = vector_ % T_;
const uint head0 = TOKEN ? simdgroup : vector_ / T_ % H;

float4 u[SIZE], v[SIZE];
float2 squares = 0;
for (uint i = 0; i < SIZE; i++) {
  const uint head = head0 + i / FOURS * simdgroups, c = 4 * (lane + 32 * (i % FOURS));
  u[i] = v[i] = 0;
  if (head < H && c < D) {
    u[i] = read4(token_of(xa, xa_strides, b, head, token) + c);
    v[i] = read4(token_of(xb, xb_strides, b, head, token) + c);
  }
  squares += float2(dot(u[i], u[i]), dot(v[i], v[i]));
}
const float2 norms = sqrt(total<TOKEN>(squares, parts, simdgroup, simdgroups, lane));

// w = 2 atan2(|u - v|, |u + v|); a zero vector takes the other's direction
float2 chords = 0;
float4 mean[SIZE];
for (uint i = 0; i < SIZE; i++) {
  mean[i] = (u[i] + v[i]) / 2;
  u[i] = over(u[i], norms.x);
  v[i] = over(v[i], norms.y);
  if (norms.x == 0 && norms.y == 0) u[i].x = i == 0 && lane == 0 && (head0 == 0 || !TOKEN);
  if (norms.x == 0 && norms.y > 0) u[i] = v[i];
  if (norms.y == 0) v[i] = u[i];
  chords += float2(dot(u[i] - v[i], u[i] - v[i]), dot(u[i] + v[i], u[i] + v[i]));
}
chords = sqrt(total<TOKEN>(chords, parts, simdgroup, simdgroups, lane));
const float w = 2 * atan2(chords.x, chords.y);

// e = of u + of v, renormalized after slerp
const float2 of = how == 0 ? slerp(w, t) : norms.x > norms.y ? float2(1, 0) : float2(0, 1);
float2 square = 0;
for (uint i = 0; i < SIZE; i++) {
  u[i] = of.x * u[i] + of.y * v[i];
  square.x += dot(u[i], u[i]);
}
const float length_ = sqrt(total<TOKEN>(square, parts, simdgroup, simdgroups, lane).x);
for (uint i = 0; i < SIZE; i++) {
  const uint head = head0 + i / FOURS * simdgroups, c = 4 * (lane + 32 * (i % FOURS));
  if (head < H && c < D) {
    const float4 merged = how == 1 ? mean[i] : how == 0 ? over(u[i], length_) : u[i];
    write4(e + ((b * H + head) * T_ + token) * D + c, merged);
  }
}
if (lane == 0 && (simdgroup == 0 || !TOKEN)) {
  norm_a[vector_] = how == 1 ? 1.0f : norms.x;
  norm_b[vector_] = how == 1 ? 1.0f : norms.y;
  angle[vector_] = w;
}
