// Scores K Q^T of 8 keys by 8 queries at a time, by simdgroup matrices.

// A lane has two elements of a matrix, side by side: in row `row` at columns `col` and `col + 1`.
struct Place {
  uint row, col;
};

inline Place place(uint lane) {
  return {lane / 16 * 4 + lane / 2 % 4, lane / 8 % 2 * 4 + lane % 2 * 2};
}

inline thread float2& elements(thread simdgroup_float8x8& matrix) {
  return reinterpret_cast<thread float2&>(matrix.thread_elements());
}

// Of 16 channels a lane reads the four from 2 col on, at once, and uses two of them in each of two
// products. So column c of product j stands for this channel; any order will do, as long as keys
// and queries have the same.
inline uint channel(uint c, uint j) {
  return c / 2 * 4 + 2 * j + c % 2;
}

// Adds 16 channels of 8 keys times 8 queries. key: a lane's four channels; queries: [16, pitch].
inline void multiply(
    thread simdgroup_float8x8& scores, float4 key, const threadgroup float* queries, uint pitch,
    Place at) {
  for (uint j = 0; j < 2; j++) {
    simdgroup_float8x8 keys, other;
    elements(keys) = j == 0 ? key.xy : key.zw;
    const threadgroup float* row = queries + channel(at.row, j) * pitch;
    elements(other) = *reinterpret_cast<const threadgroup float2*>(row + at.col);
    simdgroup_multiply_accumulate(scores, keys, other, scores);
  }
}

// Joins what was seen elsewhere, sum of exp(score - top), into a row. One score has a sum of 1.
inline void include(thread Row& row, float top, float sum) {
  const float higher = max(row.top, top);
  row.sum = row.sum * exp(row.top - higher) + sum * exp(top - higher);
  row.top = higher;
}
