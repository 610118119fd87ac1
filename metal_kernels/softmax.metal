// Softmax over tokens that come a tile at a time, and wide reads of tokens.

// A row is one query of one query head. What it has seen so far: the largest score, and the sum of
// exp(score - top). The first top is finite, so that a row which sees nothing has no inf - inf.
struct Row {
  float top = -1e30f;
  float sum = 0;
};

// Takes a tile of 32 scores, one in each lane of a simdgroup, and turns them into p; a token that
// is not seen has the score -inf and p = 0. Returns the factor of whatever was summed before.
inline float take_tile(thread Row& row, thread float& score) {
  const float top = max(row.top, simd_max(score));
  const float factor = exp(row.top - top);
  score = exp(score - top);
  row.sum = row.sum * factor + simd_sum(score);
  row.top = top;
  return factor;
}

// By what the weighted values of a row are to be multiplied at the end.
inline float inverse_sum(Row row) {
  return row.sum > 0 ? 1 / row.sum : 0;
}

// log(sum of exp(score)); -inf, as log(0) is, where nothing is seen.
inline float log_sum_exp(Row row) {
  return row.top + log(row.sum);
}

// Joins the rows of the SIMDS simdgroups of a threadgroup, which saw different tokens. Each row
// becomes that of all tokens, and weight[r] the factor for what this simdgroup has summed of row r.
// `found` holds top and sum, [SIMDS, ROWS].
template <int SIMDS, int ROWS>
inline void join_rows(
    thread Row* rows, thread float* weight, threadgroup float2* found, uint simdgroup, uint lane) {
  if (lane == 0) {
    for (int r = 0; r < ROWS; r++)
      found[simdgroup * ROWS + r] = float2(rows[r].top, rows[r].sum);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int r = 0; r < ROWS; r++) {
    const float own = rows[r].top;
    rows[r] = Row();
    for (int s = 0; s < SIMDS; s++)
      rows[r].top = max(rows[r].top, found[s * ROWS + r].x);
    for (int s = 0; s < SIMDS; s++)
      rows[r].sum += found[s * ROWS + r].y * exp(found[s * ROWS + r].x - rows[r].top);
    weight[r] = exp(own - rows[r].top);
  }
}

// score, or cap tanh(score / cap); no cap is 0.
inline float soft_capped(float score, float cap) {
  return cap > 0 ? cap * tanh(score / cap) : score;
}

// Sum over each LANES neighbouring lanes, LANES a power of two up to 32.
template <int LANES>
inline float sum_lanes(float x) {
  if (LANES == 32)
    return simd_sum(x);
  for (ushort step = LANES / 2; step > 0; step /= 2)
    x += simd_shuffle_xor(x, step);
  return x;
}

// Elements 4i to 4i + 3 of a piece of tokens, which is 16 bytes or 8, and 4 elements in float32.
template <typename T>
inline float4 part(uint2 piece, int) {
  return float4(as_type<vec<T, 4>>(piece));
}

template <typename T>
inline float4 part(uint4 piece, int i) {
  if constexpr (sizeof(T) == 4)
    return as_type<float4>(piece);
  else
    return part<T>(i == 0 ? piece.xy : piece.zw, 0);
}

constexpr int lanes_for(int pieces) {
  return pieces > 16 ? 32 : pieces > 8 ? 16 : pieces > 4 ? 8 : pieces > 2 ? 4 : 2;
}

// How a vector of D elements of type T lies over lanes, a piece of BYTES in a lane at a time: lane
// i of LANES has the pieces i, i + LANES, ..., so that neighbours read what is side by side, and a
// simdgroup reads 32 / LANES vectors at once. In float32 a lane has FOURS float4 of a vector: its
// number f is number `at(i, f)` of the vector, and is there if `has(i, f)`.
template <typename T, int D, int BYTES = 16>
struct Lanes {
  using Piece = conditional_t<BYTES == 16, uint4, uint2>;
  static constant constexpr const int PER = BYTES / sizeof(T);  // elements in a piece
  static constant constexpr const int PIECES = D / PER;
  static constant constexpr const int LANES = lanes_for(PIECES);
  static constant constexpr const int READS = (PIECES + LANES - 1) / LANES;  // pieces of a lane
  static constant constexpr const int FOURS = READS * PER / 4;
  static constant constexpr const int VECTOR = D / 4;
  static int at(int i, int f) {
    return (i + f / (PER / 4) * LANES) * (PER / 4) + f % (PER / 4);
  }
  static bool has(int i, int f) {
    return i + f / (PER / 4) * LANES < PIECES;
  }
  static Piece read(const device T* x, int piece) {
    return *reinterpret_cast<const device Piece*>(x + piece * PER);
  }
  static float4 four(const thread Piece* pieces, int f) {
    return part<T>(pieces[f / (PER / 4)], f % (PER / 4));
  }
};

// Takes answers over other tokens into ROWS rows and their weighted values, which the first LANES
// lanes have. An answer is one more key: its lse is the score, its out the value. A simdgroup takes
// every SIMDS-th of a stack, up to 32 at a time. out [stack, all, D], lse [stack, all]; the rows
// are `begin` to `end` of `all`, and no more than ROWS.
template <typename Shape, int SIMDS, int ROWS, typename Lse>
inline void take_answers(
    thread Row* rows, thread float4* weighted, const device float* out, Lse lse, int stack,
    size_t all, size_t begin, size_t end, uint simdgroup, uint lane) {
  const device float4* outs = reinterpret_cast<const device float4*>(out);
  for (int first = simdgroup; first < stack; first += 32 * SIMDS) {
    const int own = first + lane * SIMDS;
    float p[ROWS];
    for (int r = 0; r < ROWS; r++) {
      p[r] = own < stack && begin + r < end ? lse[own * all + begin + r] : -INFINITY;
      const float factor = take_tile(rows[r], p[r]);
      for (int f = 0; f < Shape::FOURS; f++)
        weighted[r * Shape::FOURS + f] *= factor;
    }
    for (int a = 0; a < 32 && first + a * SIMDS < stack; a++)
      for (int r = 0; r < ROWS; r++) {
        const float weight = simd_shuffle(p[r], ushort(a));
        const size_t answer = (first + a * SIMDS) * all + begin + r;
        for (int f = 0; f < Shape::FOURS; f++)
          if (lane < Shape::LANES && Shape::has(lane, f) && begin + r < end)
            weighted[r * Shape::FOURS + f] +=
                weight * outs[answer * Shape::VECTOR + Shape::at(lane, f)];
      }
  }
}

// Sums the weighted values of the simdgroups of a threadgroup, one after the other: sums[r, :] +=
// weight[r] weighted[r], sums [ROWS, D / 4]. Nobody may still read what was in sums.
template <typename Shape, int SIMDS, int ROWS>
inline void sum_values(
    thread float4* weighted, thread float* weight, threadgroup float4* sums, uint simdgroup,
    uint lane) {
  for (uint s = 0; s < SIMDS; s++) {
    if (simdgroup == s && lane < Shape::LANES) {
      for (int r = 0; r < ROWS; r++)
        for (int f = 0; f < Shape::FOURS; f++)
          if (Shape::has(lane, f)) {
            const int at = r * Shape::VECTOR + Shape::at(lane, f);
            const float4 before = s == 0 ? float4(0) : sums[at];
            sums[at] = before + weight[r] * weighted[r * Shape::FOURS + f];
          }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Writes rows `begin` to `end` of the answer: out [all, D], lse [all].
template <int D, int SIMDS, int ROWS, typename Out>
inline void write_rows(
    thread Row* rows, threadgroup float4* sums, device Out* out, device float* lse, size_t begin,
    size_t end, uint simdgroup, uint lane) {
  device vec<Out, 4>* outs = reinterpret_cast<device vec<Out, 4>*>(out);
  for (int r = 0; r < ROWS; r++) {
    if (r % SIMDS == int(simdgroup) && begin + r < end) {
      for (int d = lane; d < D / 4; d += 32) {
        const float4 x = sums[r * (D / 4) + d] * inverse_sum(rows[r]);
        outs[(begin + r) * (D / 4) + d] = vec<Out, 4>(x);
      }
      if (lane == 0)
        lse[begin + r] = log_sum_exp(rows[r]);
    }
  }
}
