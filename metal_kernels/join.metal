// The answer over the union of disjoint sets of tokens, from the answers over each.
// === kernel
// out0, out1, ... [stack, B, Hq, L, D], contiguous; lse0, lse1, ... [stack, B, Hq, L]; sinks [Hq];
// out [B, Hq, L, D]; lse [B, Hq, L]. A threadgroup has one query of one query head.
using Shape = Lanes<float, D>;
threadgroup float4 sums[D / 4];
threadgroup float2 found[SIMDS];
const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const size_t row = threadgroup_position_in_grid.x, all = threadgroups_per_grid.x;
Row rows[1];
float4 weighted[Shape::FOURS] = {};  // sum of exp(lse - top) out
#define TAKE(out, lse, shape) \
  take_answers<Shape, SIMDS, 1>( \
      rows, weighted, out, lse, shape[0], all, row, row + 1, simdgroup, lane);
TAKE(out0, lse0, out0_shape)
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
#ifdef HAS_OUT5
TAKE(out5, lse5, out5_shape)
#endif
#ifdef HAS_SINKS
if (simdgroup == 0) {  // a sink is a score without a value
  const int Hq = out0_shape[2], L = out0_shape[3];
  float p = lane == 0 ? float(sinks[row / L % Hq]) : -INFINITY;
  const float factor = take_tile(rows[0], p);
  for (int f = 0; f < Shape::FOURS; f++)
    weighted[f] *= factor;
}
#endif

float weight[1];
join_rows<SIMDS, 1>(rows, weight, found, simdgroup, lane);
sum_values<Shape, SIMDS, 1>(weighted, weight, sums, simdgroup, lane);
write_rows<D, SIMDS, 1>(rows, sums, out, lse, row, row + 1, simdgroup, lane);
