// softmax(scale q K^T) V over tokens as they came, joined with answers over other tokens.

// The pieces that lane i of a group has of AHEAD tokens, all read before the first is used.
template <typename Shape, int AHEAD, typename T, typename Piece>
inline void read_tokens(
    const device T* x, size_t stride, int token, int stop, int i,
    thread Piece (&pieces)[AHEAD * Shape::READS]) {
  for (int a = 0; a < AHEAD; a++)
    for (int c = 0; c < Shape::READS; c++) {
      const int piece = i + c * Shape::LANES;
      if (token + a < stop && piece < Shape::PIECES)
        pieces[a * Shape::READS + c] = Shape::read(x + (token + a) * stride, piece);
      else
        pieces[a * Shape::READS + c] = 0;
    }
}
// === kernel
// q [B, Hq, L, D]; k, v [B, H, n, D], D contiguous, each token at a multiple of 16 bytes;
// valid [8 times the same, B, H, n]; sinks [Hq]; out0, out1, ... [stack, B, Hq, L, D], contiguous;
// lse0, lse1, ... [stack, B, Hq, L]; out [S, B, Hq, L, D]; lse [S, B, Hq, L].
// A threadgroup has `span` tokens of a head of K and V, and ROWS of the rows (query head, query)
// that share them. Its simdgroups take 32 tokens at a time, and never wait for one another.
using Shape = Lanes<T, D, BYTES>;
constexpr int LANES = Shape::LANES, READS = Shape::READS, FOURS = Shape::FOURS;
constexpr int AHEAD = LANES < 4 ? LANES : 4;
threadgroup float4 shared[ROWS * D / 4];  // the queries, and in the end the answer
threadgroup float2 found[SIMDS * ROWS];
const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int L = q_shape[2], H = k_shape[1], n = k_shape[2], G = q_shape[1] / H, share = G * L;
const int b = threadgroup_position_in_grid.y / H, h = threadgroup_position_in_grid.y % H;
const int first = threadgroup_position_in_grid.x * ROWS;
const int start = threadgroup_position_in_grid.z * span, stop = min(start + span, n);

for (int e = thread_index_in_threadgroup; e < ROWS * D; e += 32 * SIMDS) {
  const int row = first + e / D, head = h * G + row / L;
  reinterpret_cast<threadgroup float*>(shared)[e] = row < share
      ? scale * float(q[b * q_strides[0] + head * q_strides[1] + row % L * q_strides[2]
                        + e % D * q_strides[3]])
      : 0;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const device T* keys = k + b * k_strides[0] + h * k_strides[1];
const device T* values = v + b * v_strides[0] + h * v_strides[1];
const int i = lane % LANES;
Row rows[ROWS];
float4 weighted[ROWS * FOURS] = {};  // sum of exp(score - top) v
for (int tile = start + 32 * simdgroup; tile < stop; tile += 32 * SIMDS) {
  const int token = tile + lane;
  float scores[ROWS] = {};  // of `token`: step i of a group of lanes is about the token of lane i
  for (int step = 0; step < LANES && tile + step < stop; step += AHEAD) {
    typename Shape::Piece pieces[AHEAD * READS];
    read_tokens<Shape, AHEAD>(keys, k_strides[2], token - i + step, stop, i, pieces);
    for (int r = 0; r < ROWS; r++) {
      float dots[AHEAD] = {};
      for (int f = 0; f < FOURS; f++)
        if (Shape::has(i, f)) {
          const float4 query = shared[r * (D / 4) + Shape::at(i, f)];
          for (int a = 0; a < AHEAD; a++)
            dots[a] += dot(query, Shape::four(pieces + a * READS, f));
        }
      for (int a = 0; a < AHEAD; a++) {
        const float score = sum_lanes<LANES>(dots[a]);
        scores[r] = i == step + a ? score : scores[r];
      }
    }
  }

  bool seen = token < stop;
#ifdef HAS_VALID
  seen = seen && valid[b * valid_strides[1] + h * valid_strides[2] + token * valid_strides[3]];
#endif
  for (int r = 0; r < ROWS; r++) {
    const bool late = CAUSAL && token > n - L + (first + r) % L;
    scores[r] = seen && !late ? soft_capped(scores[r], softcap) : -INFINITY;
    const float factor = take_tile(rows[r], scores[r]);  // scores are now p
    for (int f = 0; f < FOURS; f++)
      weighted[r * FOURS + f] *= factor;
  }

  for (int step = 0; step < LANES && tile + step < stop; step += AHEAD) {
    typename Shape::Piece pieces[AHEAD * READS];
    read_tokens<Shape, AHEAD>(values, v_strides[2], token - i + step, stop, i, pieces);
    for (int a = 0; a < AHEAD; a++)
      for (int r = 0; r < ROWS; r++) {
        const float p = simd_shuffle(scores[r], ushort(lane - i + step + a));
        for (int f = 0; f < FOURS; f++)
          weighted[r * FOURS + f] += p * Shape::four(pieces + a * READS, f);
      }
  }
}
for (ushort group = LANES; group < 32; group *= 2)  // groups of lanes had different tokens
  for (int r = 0; r < ROWS; r++)
    for (int f = 0; f < FOURS; f++)
      weighted[r * FOURS + f] += simd_shuffle_xor(weighted[r * FOURS + f], group);

const size_t all = size_t(q_shape[0]) * H * share;
const size_t own = size_t(b * H + h) * share, begin = own + first, end = own + share;
#define TAKE(out, lse, shape) \
  take_answers<Shape, SIMDS, ROWS>( \
      rows, weighted, out, lse, shape[0], all, begin, end, simdgroup, lane);
#ifdef HAS_OUT0
TAKE(out0, lse0, out0_shape)
#endif
#ifdef HAS_OUT1
TAKE(out1, lse1, out1_shape)
#endif
#ifdef HAS_OUT2
TAKE(out2, lse2, out2_shape)
#endif
#ifdef HAS_OUT3
TAKE(out3, lse3, out3_shape)
#endif
#ifdef HAS_OUT4
TAKE(out4, lse4, out4_shape)
#endif
#ifdef HAS_SINKS
if (simdgroup == 0)
  for (int r = 0; r < ROWS; r++) {  // a sink is a score without a value
    const bool there = lane == 0 && begin + r < end;
    float p = there ? float(sinks[h * G + (first + r) / L]) : -INFINITY;
    const float factor = take_tile(rows[r], p);
    for (int f = 0; f < FOURS; f++)
      weighted[r * FOURS + f] *= factor;
  }
#endif

float weight[ROWS];
join_rows<SIMDS, ROWS>(rows, weight, found, simdgroup, lane);  // all are done with the queries
sum_values<Shape, SIMDS, ROWS>(weighted, weight, shared, simdgroup, lane);
const size_t split = threadgroup_position_in_grid.z * all;
write_rows<D, SIMDS, ROWS>(rows, shared, out, lse, split + begin, split + end, simdgroup, lane);
