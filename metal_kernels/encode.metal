// GEAR's outliers: what must be added to D + L at their places, so that they are exact.
// === kernel
// x [B, H, n, D] of any strides; codes, step and low as quantize writes them; a [B, H, n, R] and
// c [B, H, D, R]; index and both outputs: keys [B, H, D, m] tokens, values [B, n, m] channels of
// all heads. A thread has one outlier; D there is the code of what stood for it.
constexpr uint PER = 32 / BITS;
const uint H = x_shape[1], n = x_shape[2], D = x_shape[3], m = index_shape[index_ndim - 1];
const uint e = thread_position_in_grid.x, row = e / m, place = index[e];
const uint b = KEYS ? row / D / H : row / n, h = KEYS ? row / D % H : place / D;
const uint t = KEYS ? place : row % n, d = KEYS ? row % D : place % D, head = b * H + h;

const uint in_line = (ALONG ? n : width) / group, line = width == int(D) ? head : b;
const uint g = ALONG ? (head * in_line + t / group) * D + d
                     : (line * n + t) * in_line + (width == int(D) ? d : place) / group;
const uint word = KEYS ? codes[(head * D + d) * ((n + PER - 1) / PER) + t / PER]
                       : codes[(head * n + t) * (D / PER) + d / PER];
const uint code = word >> ((KEYS ? t : d) % PER * BITS) & ((1u << BITS) - 1);
float near = code * static_cast<float>(step[g]) + static_cast<float>(low[g]);
#ifdef HAS_A
// L = a c^T
const uint R = a_shape[3];
for (uint r = 0; r < R; r++) {
  const float along = static_cast<float>(a[(head * n + t) * R + r]);
  near += along * static_cast<float>(c[(head * D + d) * R + r]);
}
#endif
const float value = static_cast<float>(token_of(x, x_strides, b, h, t)[d * x_strides[3]]);
delta[e] = static_cast<O>(value - near);
places[e] = static_cast<P>(place);
