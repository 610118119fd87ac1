// LESS: H += psi(k) v^T and z += psi(k) of tokens that go, psi(k) = |u + (u B3) s2| and
// u = |s1| gelu(gelu(k B1) B2).
// === kernel
// k, v [B, H, T, D], the last axis contiguous; valid [B, H or 1, T]; b1 [H, D, M]; b2 [H, M, R];
// b3 [H, R, R]; s1, s2 [H, R]; state, new_state [B, H, R, D]; norm, new_norm [B, H, R]. Without
// state and norm the new ones are sums over `split` tokens each, stacked in front.
// A threadgroup has ROWS rows of the batch, whose tokens it counts through: number q is token q % T
// of row q / T. SLOTS of them at a time go through one reading of the maps.
threadgroup float tokens[SLOTS * D];  // keys, then values
threadgroup float hidden[SLOTS * THREADS];  // gelu(k B1) of THREADS units, then parts of u
threadgroup float u[SLOTS * R], psi[SLOTS * R];
threadgroup bool seen[SLOTS];
const uint B = k_shape[0], H = k_shape[1], T_ = k_shape[2], M = b1_shape[2];
const uint me = thread_index_in_threadgroup, h = threadgroup_position_in_grid.x;
const uint b0 = threadgroup_position_in_grid.z * ROWS;
const uint last = min(uint(ROWS), B - b0) * T_;
const uint first = threadgroup_position_in_grid.y * split, stop = min(first + split, last);
const uint heads = valid_shape[1] == 1 ? 0 : 1;

constexpr uint PARTS = THREADS / R, EACH = (ROWS * R * D + THREADS - 1) / THREADS;
const uint r_ = me % R, part = me / R;
float more[EACH] = {0};  // psi v^T, entries me, me + THREADS, ... of [ROWS, R, D]
float more_norm = 0;  // psi, entry me of [ROWS, R]

for (uint q0 = first; q0 < stop; q0 += SLOTS) {
  const uint count = min(uint(SLOTS), stop - q0);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the last slots are folded
  for (uint s = me; s < SLOTS; s += THREADS) {
    const uint b = b0 + (q0 + s) / T_, t = (q0 + s) % T_;
    seen[s] = s < count && *token_of(valid, valid_strides, b, h * heads, t);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  bool some = false;
  for (uint s = 0; s < SLOTS; s++) some = some || seen[s];
  if (!some) continue;
  for (uint e = me; e < SLOTS * D / 4; e += THREADS) {
    const uint s = e / (D / 4), c = e % (D / 4) * 4;
    const uint b = b0 + (q0 + s) / T_, t = (q0 + s) % T_;
    float4 key = 0;
    if (seen[s]) {
      key = read4(token_of(k, k_strides, b, h, t) + c);
    }
    *reinterpret_cast<threadgroup float4*>(tokens + s * D + c) = key;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float sums[SLOTS] = {0};  // of hidden B2, over the part of the units that this thread takes
  for (uint unit0 = 0; unit0 < M; unit0 += THREADS) {
    // hidden = gelu(k B1), a unit in each thread
    if (unit0 + me < M) {
      float unit[SLOTS] = {0};
      for (uint d = 0; d < D; d += 4) {
        float4 b;
        for (uint j = 0; j < 4; j++)
          b[j] = static_cast<float>(b1[(h * D + d + j) * M + unit0 + me]);
        for (uint s = 0; s < SLOTS; s++)
          unit[s] += dot(b, *reinterpret_cast<threadgroup float4*>(tokens + s * D + d));
      }
      for (uint s = 0; s < SLOTS; s++)
        hidden[s * THREADS + me] = gelu(unit[s]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint m = part; m < min(uint(THREADS), M - unit0); m += PARTS) {
      const float b = static_cast<float>(b2[(h * M + unit0 + m) * R + r_]);
      for (uint s = 0; s < SLOTS; s++)
        sums[s] += hidden[s * THREADS + m] * b;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  for (uint s = 0; s < SLOTS; s++)
    hidden[s * THREADS + me] = sums[s];
  for (uint e = me; e < SLOTS * D / 4; e += THREADS) {
    const uint s = e / (D / 4), c = e % (D / 4) * 4;
    const uint b = b0 + (q0 + s) / T_, t = (q0 + s) % T_;
    float4 value = 0;
    if (seen[s]) {
      value = read4(token_of(v, v_strides, b, h, t) + c);
    }
    *reinterpret_cast<threadgroup float4*>(tokens + s * D + c) = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // u = |s1| gelu(hidden B2)
  for (uint e = me; e < SLOTS * R; e += THREADS) {
    float sum = 0;
    for (uint p = 0; p < PARTS; p++) sum += hidden[e / R * THREADS + p * R + e % R];
    u[e] = abs(static_cast<float>(s1[h * R + e % R])) * gelu(sum);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // psi = |u + (u B3) s2|
  for (uint e = me; e < SLOTS * R; e += THREADS) {
    float turned = 0;
    for (uint i = 0; i < R; i++)
      turned += u[e / R * R + i] * static_cast<float>(b3[(h * R + i) * R + e % R]);
    psi[e] = seen[e / R] ? abs(u[e] + turned * static_cast<float>(s2[h * R + e % R])) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = 0, e = me; e < ROWS * R * D; i++, e += THREADS) {
    const uint from = e / (R * D) * T_;
    for (uint s = from; s < min(from + T_, count); s++)
      more[i] += psi[s * R + e / D % R] * tokens[s * D + e % D];
  }
  const uint from = me / R * T_;
  for (uint s = from; s < min(from + T_, count); s++)
    more_norm += psi[s * R + me % R];
}

const uint at = (threadgroup_position_in_grid.y * B + b0) * H + h;  // of the first row's head
for (uint i = 0, e = me; e < ROWS * R * D; i++, e += THREADS) {
  const uint row = e / (R * D), to = (at + row * H) * R * D + e % (R * D);
  if (b0 + row < B) {
#ifdef HAS_STATE
    more[i] += state[to];
#endif
    new_state[to] = more[i];
  }
}
if (me < ROWS * R && b0 + me / R < B) {
  const uint to = (at + me / R * H) * R + me % R;
#ifdef HAS_STATE
  more_norm += norm[to];
#endif
  new_norm[to] = more_norm;
}
