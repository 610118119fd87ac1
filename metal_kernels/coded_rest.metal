// What is added to codes: low rank, outliers, norms, vectors that are retained; and the rotation.

// Places are the low 16 bits where a row has no more than 65536.
inline int place_of(int16_t place) {
  return ushort(place);
}
inline int place_of(int32_t place) {
  return place;
}

struct NoOutliers {
  template <int E>
  void add(int, int, thread float (&)[E]) {}
};

// Outliers of keys: x[e] += delta[d, token + e]. A channel's entries ascend, so that each tile goes
// on where the one before ended. Lanes that have other tokens of the channel take every step too,
// so that each entry is read once for all.
template <typename Index, typename Delta>
struct ChannelOutliers {
  Index index;  // [D, count], of the block
  Delta delta;
  size_t from;
  int count, tokens, begin, end;     // tokens of the block, and those in this tile
  bool goes_on, last;               // whether the tile before had some of them; who tells the next
  threadgroup int2 *before, *after;  // [D], the next entry and its token

  int2 entry(size_t row, int at) {
    return int2(at, at < count ? place_of(index[row + at]) : 0x7fffffff);
  }
  // The first entry that is not before `begin`, sought where it would be if they were even.
  int2 seek(size_t row) {
    if (begin == 0)
      return entry(row, 0);
    int2 low = int2(0, 0), high = int2(count, tokens);  // entries, and tokens before and at them
    while (low.x < high.x) {
      const float part = float(begin - low.y) / float(max(1, high.y - low.y));
      const int at = min(high.x - 1, low.x + int(part * float(high.x - low.x)));
      const int place = place_of(index[row + at]);
      if (place < begin)
        low = int2(at + 1, place + 1);
      else
        high = int2(at, place);
    }
    return high.x < count ? high : int2(count, 0x7fffffff);
  }
  template <int E>
  void add(int d, int token, thread float (&x)[E]) {
    const size_t row = from + size_t(d) * count;
    int2 next;
    if (goes_on)
      next = before[d];
    else
      next = seek(row);
    while (next.y < end) {
      const float found = delta[row + next.x];
      for (int e = 0; e < E; e++)
        x[e] += token + e == next.y ? found : 0;
      next = entry(row, next.x + 1);
    }
    if (last)
      after[d] = next;
  }
};

// Outliers of values: x[e] += delta[token, channel + e], channels `low` to `high` of all heads'.
// They are sought from where they would be if they were even, down and then up; each is read once.
template <typename Index, typename Delta>
struct TokenOutliers {
  Index index;  // [n, count], of the block
  Delta delta;
  size_t from;
  int count, low, high, guess;

  template <int E>
  void add(int token, int channel, thread float (&x)[E]) {
    const size_t row = from + size_t(token) * count;
    for (int way = -1; way <= 1; way += 2) {
      for (int at = way < 0 ? guess - 1 : guess; at >= 0 && at < count; at += way) {
        const int place = place_of(index[row + at]);
        if (way < 0 ? place < low : place >= high)
          break;
        if (place < low || place >= high)
          continue;
        const float found = delta[row + at];
        for (int e = 0; e < E; e++)
          x[e] += low + channel + e == place ? found : 0;
      }
    }
  }
};

// projected[r, j] = sum_d queries[r, d] basis[d, j]: q C of K = A C^T, by one simdgroup.
template <int D, int ROWS, int RANK, typename Basis>
inline void project(
    Basis basis, size_t from, threadgroup const float* queries, threadgroup float* projected,
    uint lane) {
  for (int j = 0; j < RANK; j++) {
    float products[ROWS] = {};
    for (int d = lane; d < D; d += 32) {
      const float c = basis[from + d * RANK + j];
      for (int r = 0; r < ROWS; r++)
        products[r] += queries[r * D + d] * c;
    }
    for (int r = 0; r < ROWS; r++) {
      const float sum = simd_sum(products[r]);
      if (lane == 0)
        projected[r * RANK + j] = sum;
    }
  }
}

// folded[r, j] = factors[r] folded[r, j] + sum_t p[r, t] a[t, j] over `count` tokens: p A of
// V = A C^T, by one simdgroup. p [ROWS, TILE].
template <int ROWS, int RANK, int TILE, typename Fit>
inline void fold(
    Fit a, size_t from, threadgroup const float* p, int count,
    thread const float (&factors)[ROWS], bool goes_on, threadgroup float* folded, uint lane) {
  for (int j = 0; j < RANK; j++) {
    float products[ROWS] = {};
    for (int t = lane; t < count; t += 32) {
      const float x = a[from + t * RANK + j];
      for (int r = 0; r < ROWS; r++)
        products[r] += p[r * TILE + t] * x;
    }
    for (int r = 0; r < ROWS; r++) {
      const float sum = simd_sum(products[r]);
      if (lane == 0)
        folded[r * RANK + j] = sum + (goes_on ? factors[r] * folded[r * RANK + j] : 0);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// weighted[r, e] += sum_j folded[r, j] basis[e, j]: (p A) C^T of E channels.
template <int E, int ROWS, int RANK, typename Basis>
inline void unfold(
    Basis basis, size_t from, threadgroup const float* folded,
    thread float (&weighted)[ROWS * E]) {
  for (int j = 0; j < RANK; j++)
    for (int e = 0; e < E; e++) {
      const float c = basis[from + e * RANK + j];
      for (int r = 0; r < ROWS; r++)
        weighted[r * E + e] += folded[r * RANK + j] * c;
    }
}

// Where the norm of token `at` lies; norms [B, norms, start + T].
inline size_t norm_of(
    const constant int64_t* strides, const constant Side& side, int b, int h, int at) {
  return b * strides[0] + (side.norms == 1 ? 0 : h) * strides[1] + at * strides[2];
}

// Which entry of the retained vectors is that of token `at` and head h, or -1: the lane's own, of
// `live` tokens of a simdgroup. A row's entries ascend, and end with -1.
template <typename Index>
inline int find_retained(
    Index index, const constant Side& side, int b, int h, int at, int live, int lane) {
  const int count = side.retained, first = (at - lane) * side.vectors;
  const int own = at * side.vectors + (side.vectors == 1 ? 0 : h);
  const size_t row = size_t(b) * count;
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2, vector = index[row + middle];
    if (vector >= 0 && vector < first)
      low = middle + 1;
    else
      high = middle;
  }
  int found = -1;
  for (int i = low; i < count; i++) {
    const int vector = index[row + i];
    if (vector < 0 || vector >= first + live * side.vectors)
      break;
    found = vector == own ? i : found;
  }
  return found;
}

// Where retained vector `place` has its channels of head h; exact [B, m, D or H D].
inline size_t exact_of(const constant Side& side, int b, int h, int H, int D, int place) {
  const int heads = side.vectors == 1 ? H : 1;
  return ((size_t(b) * side.retained + place) * heads + (side.vectors == 1 ? h : 0)) * D;
}

// scores[r] = sum_d q[r, d] exact[d], where the lane's token has a place.
template <int D, int ROWS, typename Exact>
inline void score_retained(
    int place, Exact exact, const constant Side& side, int b, int h, int H,
    threadgroup const float* queries, thread float (&scores)[ROWS], uint lane) {
  for (ushort l = 0; l < 32; l++) {
    const int there = simd_shuffle(place, l);
    if (there < 0)
      continue;
    const size_t from = exact_of(side, b, h, H, D, there);
    float products[ROWS] = {};
    for (int d = lane; d < D; d += 32) {
      const float x = exact[from + d];
      for (int r = 0; r < ROWS; r++)
        products[r] += queries[r * D + d] * x;
    }
    for (int r = 0; r < ROWS; r++) {
      const float sum = simd_sum(products[r]);
      scores[r] = lane == l ? sum : scores[r];
    }
  }
}

// weighted[r, e] += p[r] exact[channel + e] of each token that has a place.
template <int E, int D, int ROWS, typename Exact>
inline void add_retained(
    int place, Exact exact, const constant Side& side, int b, int h, int H, int channel, bool has,
    thread const float (&p)[ROWS], thread float (&weighted)[ROWS * E]) {
  for (ushort l = 0; l < 32; l++) {
    const int there = simd_shuffle(place, l);
    if (there < 0)
      continue;
    const size_t from = exact_of(side, b, h, H, D, there) + channel;
    for (int e = 0; e < E; e++) {
      const float x = has ? float(exact[from + e]) : 0;
      for (int r = 0; r < ROWS; r++)
        weighted[r * E + e] += simd_shuffle(p[r], l) * x;
    }
  }
}

// Turns vectors x [count, D] by the orthogonal Hadamard matrix, in blocks of the largest power of
// two that divides D: a, b become (a + b) / sqrt 2, (a - b) / sqrt 2, at each distance in turn.
template <int D, int THREADS>
inline void turn(threadgroup float* x, int count, uint thread_index) {
  for (int step = 1; step < (D & -D); step *= 2) {
    for (int pair = thread_index; pair < count * D / 2; pair += THREADS) {
      const int i = pair / step * 2 * step + pair % step;
      const float a = x[i], b = x[i + step];
      x[i] = (a + b) * M_SQRT1_2_F;
      x[i + step] = (a - b) * M_SQRT1_2_F;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
