// The products of queries and keys, and of p and values, over a tile of tokens.

// How a threadgroup of SIMDS simdgroups shares out a tile of tokens, 32 for each of them.
template <int D_, int ROWS_, int SIMDS_>
struct Shares {
  static constant constexpr const int D = D_, ROWS = ROWS_, SIMDS = SIMDS_, TILE = 32 * SIMDS_;
  static constant constexpr const int E = ROWS > 4 && D <= 128 ? 4 : 8;  // of a lane, side by side
  static constant constexpr const int LANES = lanes_for(D / E);  // of one token
  static constant constexpr const int AHEAD = LANES < 4 ? LANES : 4;  // reads before the first use
  static constant constexpr const int COLUMN = E / 4;  // lanes that have the same tokens of K
  static constant constexpr const int ROUND = ROWS < 4 ? ROWS : 4;  // rows that are shared at once
};

// Keys by channel: sums[r, e] += q[r, d] k[d, token + e] over the simdgroup's channels. COLUMN
// lanes have the same E tokens, and take turns with the channels.
template <typename S, typename Keys, typename Scales, typename Outliers>
inline void sum_channels(
    const device uint* k, int words, int token, bool live, int n, Scales scales, Outliers outliers,
    threadgroup const float* queries, thread float (&sums)[S::ROWS * S::E], uint simdgroup,
    uint lane) {
  constexpr int EACH = S::D / S::SIMDS, TURNS = 4 / S::COLUMN;
  for (int i = lane % S::COLUMN; i < EACH; i += 4) {
    const int first = simdgroup * EACH + i;
    Keys codes[TURNS];
    for (int a = 0; a < TURNS; a++)
      if (live)
        codes[a].read(k + size_t(first + a * S::COLUMN) * words, token, n);
    for (int a = 0; a < TURNS; a++) {
      const int d = first + a * S::COLUMN;
      float x[S::E] = {};
      if (live) {
        scales.decode(codes[a], d, x);
        outliers.add(d, token, x);
      }
      for (int r = 0; r < S::ROWS; r++)
        for (int e = 0; e < S::E; e++)
          sums[r * S::E + e] += queries[r * S::D + d] * x[e];
    }
  }
}

// scores[r], of the thread's own token: the sums of all simdgroups. shared [SIMDS, ROUND, TILE].
template <typename S>
inline void share_sums(
    thread const float* sums, threadgroup float4* shared, thread float (&scores)[S::ROWS],
    uint simdgroup, uint lane) {
  for (int round = 0; round < S::ROWS; round += S::ROUND) {
    const int stop = min(S::ROWS, round + S::ROUND);
    if (round > 0)
      threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = round; r < stop; r++) {
      thread const float* sum = sums + r * S::E;
      float4 four = float4(sum[0], sum[1], sum[2], sum[3]);  // of tokens 4 lane to 4 lane + 3
      if constexpr (S::COLUMN == 2) {
        const float4 upper = float4(sum[4], sum[5], sum[6], sum[7]);
        const float4 theirs = simd_shuffle_xor(lane % 2 ? four : upper, ushort(1));
        four = (lane % 2 ? upper : four) + theirs;
      }
      shared[(simdgroup * S::ROUND + r - round) * 32 + lane] = four;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup const float* each = reinterpret_cast<threadgroup const float*>(shared);
    for (int r = round; r < stop; r++)
      for (int other = 0; other < S::SIMDS; other++)
        scores[r] +=
            each[(other * S::ROUND + r - round) * S::TILE + simdgroup * 32 + lane];
  }
}

// The E channels from `channel` on of AHEAD tokens, all read before the first is used. Group g of
// LANES lanes takes the tokens g LANES + step of a piece.
template <typename S, typename Codes, typename P>
inline void read_tokens(
    P x, size_t stride, int step, int live, int group, int channel,
    thread Codes (&codes)[S::AHEAD]) {
  for (int a = 0; a < S::AHEAD; a++) {
    const int i = group * S::LANES + step + a;
    if (i < live && channel < S::D)
      codes[a].read(x + i * stride, channel, S::D);
  }
}

// Keys by token: scores[r] = sum_d q[r, d] k[token, d]; step i of a group is about its lane i.
template <typename S, typename Keys, typename P, typename Scales>
inline void sum_tokens(
    P k, size_t stride, Piece piece, Scales scales, threadgroup const float* queries,
    thread float (&scores)[S::ROWS], uint lane) {
  const int group = lane / S::LANES, channel = lane % S::LANES * S::E;
  for (int step = 0; step < S::LANES && step < piece.live; step += S::AHEAD) {
    Keys codes[S::AHEAD];
    read_tokens<S>(k, stride, step, piece.live, group, channel, codes);
    for (int a = 0; a < S::AHEAD; a++) {
      const int i = group * S::LANES + step + a;
      const bool has = i < piece.live && channel < S::D;
      float x[S::E] = {};
      if (has)
        scales.decode(codes[a], piece.first + i, x);
      for (int r = 0; r < S::ROWS; r++) {
        float product = 0;
        for (int e = 0; e < S::E && has; e++)
          product += queries[r * S::D + channel + e] * x[e];
        product = sum_lanes<S::LANES>(product);
        scores[r] = int(lane) == i ? product : scores[r];
      }
    }
  }
}

// weighted[r, e] += p[r, token] v[token, channel + e]; lane i has p of token i.
template <typename S, typename Values, typename P, typename Scales, typename Outliers>
inline void add_values(
    P v, size_t stride, Piece piece, Scales scales, Outliers outliers,
    thread const float (&p)[S::ROWS], thread float (&weighted)[S::ROWS * S::E], uint lane) {
  const int group = lane / S::LANES, channel = lane % S::LANES * S::E;
  for (int step = 0; step < S::LANES && step < piece.live; step += S::AHEAD) {
    Values codes[S::AHEAD];
    read_tokens<S>(v, stride, step, piece.live, group, channel, codes);
    for (int a = 0; a < S::AHEAD; a++) {
      const int i = group * S::LANES + step + a;
      float x[S::E] = {};
      if (i < piece.live && channel < S::D) {
        scales.decode(codes[a], piece.first + i, x);
        outliers.add(piece.first + i, channel, x);
      }
      for (int r = 0; r < S::ROWS; r++) {
        const float weight = simd_shuffle(p[r], ushort(i));
        for (int e = 0; e < S::E; e++)
          weighted[r * S::E + e] += weight * x[e];
      }
    }
  }
}
