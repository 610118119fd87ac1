// Coded tokens as a lane reads them: E elements that lie side by side, one vector after the other.

// How keys lie: by channel with scales of groups of tokens, by channel with scales of tokens, by
// token as values do, by channel with one group for all tokens.
constant constexpr const int BY_CHANNEL = 0, TOKEN_SCALES = 1, BY_TOKEN = 2, ONE_GROUP = 3;

// What is known of K or of V when a kernel is launched.
struct Side {
  int share;     // tokens that have one step and low, or one mu and c, in each channel
  int width;     // channels that have one step and low in each token
  int heads;     // heads that have a step and low of their own: H, or 1
  int outliers;  // in a row
  int norms;     // norms of a token: H, or 1
  int vectors;   // vectors of a token that may be retained: H, or 1
  int retained;  // vectors that may be retained, in a row of the batch
};

struct Sizes {
  int heads;   // H
  int tokens;  // n, of a block
  int pieces;  // of all blocks in use, see Piece
  int span;    // pieces that a threadgroup takes
  int start;   // what norms and retained vectors number the first token
};

// 32 tokens of one block, fewer at its end.
struct Piece {
  int block;
  int first;  // token of the block
  int live;   // how many tokens there are; 0 behind `stop`
};

inline int pieces_of(int tokens) {
  return (tokens + 31) / 32;
}

inline Piece piece_at(int piece, int stop, int tokens) {
  const int each = pieces_of(tokens), first = piece % each * 32;
  return {piece / each, first, piece < stop ? min(32, tokens - first) : 0};
}

// E codes of a row of n that is packed into 32-bit words: code j of a word has the bits from
// j * BITS. `first` is a multiple of E, so that the codes are 1, 2, 4 or 8 bytes by themselves.
template <int BITS, int E>
struct Packed {
  uint2 raw;
  void read(const device uint* row, int first, int n) {
    constexpr int SIZE = BITS * E;
    const int at = first / E;
    if constexpr (SIZE == 8)
      raw = uint2(reinterpret_cast<const device uchar*>(row)[at], 0);
    else if constexpr (SIZE == 16)
      raw = uint2(reinterpret_cast<const device ushort*>(row)[at], 0);
    else if constexpr (SIZE == 32)
      raw = uint2(row[at], 0);
    else  // a row may end with half of it, and need not begin at a multiple of 8 bytes
      raw = uint2(row[2 * at], first + E / 2 < n ? row[2 * at + 1] : 0);
  }
  float at(int e) const {
    constexpr int PER = 32 / BITS;
    return float((e < PER ? raw.x : raw.y) >> (e % PER * BITS) & ((1u << BITS) - 1));
  }
};

// E elements that are not coded.
template <typename T, int E>
struct Plain {
  vec<T, 4> raw[E / 4];
  void read(const device T* row, int first, int) {
    for (int i = 0; i < E / 4; i++)
      raw[i] = *reinterpret_cast<const device vec<T, 4>*>(row + first + 4 * i);
  }
  float at(int e) const {
    return float(raw[e / 4][e % 4]);
  }
};

// Scales give x from codes: of `decode`'s i-th vector, where the lane has the same E elements of
// each. That is a channel's tokens where codes lie by channel, a token's channels where by token.

struct Unscaled {
  template <int E, typename Codes>
  void decode(Codes codes, int, thread float (&x)[E]) {
    for (int e = 0; e < E; e++)
      x[e] = codes.at(e);
  }
};

// x = code step[i] + low[i]: all of the lane's elements are in one group.
template <typename Step, typename Low>
struct Across {
  Step step;
  Low low;
  size_t from;
  int stride;  // from a vector's step to the next one's
  template <int E, typename Codes>
  void decode(Codes codes, int i, thread float (&x)[E]) {
    const float s = step[from + i * stride], l = low[from + i * stride];
    for (int e = 0; e < E; e++)
      x[e] = codes.at(e) * s + l;
  }
};

// The same with the scales of all channels in threadgroup memory.
struct Held {
  threadgroup const float2* levels;  // [D], step and low
  template <int E, typename Codes>
  void decode(Codes codes, int i, thread float (&x)[E]) {
    const float2 level = levels[i];
    for (int e = 0; e < E; e++)
      x[e] = codes.at(e) * level.x + level.y;
  }
};

// x = code step[e] + low[e]: each of the lane's tokens has its own, for `width` channels at a time.
template <int TILE>
struct Along {
  threadgroup const float2* levels;  // [groups of channels, TILE], step and low
  int width, held;
  float2 own[8];
  template <int E, typename Codes>
  void decode(Codes codes, int i, thread float (&x)[E]) {
    if (i / width != held) {
      held = i / width;
      for (int e = 0; e < E; e++)
        own[e] = levels[held * TILE + e];
    }
    for (int e = 0; e < E; e++)
      x[e] = codes.at(e) * own[e].x + own[e].y;
  }
};

// The step or low of a fixed grid.
struct Same {
  float value;
  float operator[](size_t) const {
    return value;
  }
};

// x = (code step[i] + low[i]) c[i] r[e] + mu[i]: two-sided scales where codes lie by channel.
template <typename Scale, typename Step, typename Low>
struct DualChannels {
  Scale mu, c;
  Step step;
  Low low;
  size_t from;
  threadgroup const float2* r;  // in x, of the lane's tokens
  template <int E, typename Codes>
  void decode(Codes codes, int i, thread float (&x)[E]) {
    const float m = mu[from + i], f = c[from + i], s = step[from + i], l = low[from + i];
    for (int e = 0; e < E; e++)
      x[e] = (codes.at(e) * s + l) * f * r[e].x + m;
  }
};

// x = (code step[e] + low[e]) c[e] r[i] + mu[e]: the same where codes lie by token.
template <typename Scale>
struct DualTokens {
  Scale r;
  size_t from;
  float3 levels[8];  // step c, low c and mu
  template <int E, typename Codes>
  void decode(Codes codes, int i, thread float (&x)[E]) {
    const float f = r[from + i];
    for (int e = 0; e < E; e++)
      x[e] = (codes.at(e) * levels[e].x + levels[e].y) * f + levels[e].z;
  }
};

// step c, low c and mu of a channel; mu, c, step, low [..., tiles, D], and `from` is of the tile.
template <typename Scale, typename Step, typename Low>
inline float3 dual_level(Scale mu, Scale c, Step step, Low low, size_t from) {
  const float f = c[from];
  return float3(float(step[from]) * f, float(low[from]) * f, float(mu[from]));
}

// Where a channel's or tile's scales begin that token `token` of a block has.
template <int D>
inline size_t scales_at(size_t head, int token, int tokens, const constant Side& side) {
  return (head * (tokens / side.share) + token / side.share) * D;
}

template <typename Step, typename Low>
inline float2 step_low(Step step, Low low, size_t at) {
  return float2(float(step[at]), float(low[at]));
}

// Scales where codes lie by channel, of tokens from number `column` of the tile on.
template <int KEYS, int TILE, typename Step, typename Low>
inline auto scales_of_channels(
    Step step, Low low, size_t from, threadgroup const float2* levels, int column, int width) {
  if constexpr (KEYS == ONE_GROUP)
    return Held{levels};
  else if constexpr (KEYS == TOKEN_SCALES)
    return Along<TILE>{levels + column, width, -1, {}};
  else
    return Across<Step, Low>{step, low, from, 1};
}

template <typename Scale, typename Step, typename Low>
inline DualChannels<Scale, Step, Low> dual_of_channels(
    Scale mu, Scale c, Step step, Low low, size_t from, threadgroup const float2* r) {
  return {mu, c, step, low, from, r};
}

// Scales of the channels from `channel` on, where codes lie by token; vector 0 is the block's.
template <int D, typename Step, typename Low>
inline Across<Step, Low> scales_of_tokens(
    Step step, Low low, size_t head, int channel, int tokens, const constant Side& side) {
  const int groups = D / side.width;
  return {step, low, head * tokens * groups + channel / side.width, groups};
}
