// Codes, steps and lows of a tile of tokens and channels: x is read once, and words made of it.

// An entry of x, or the mean that stands for it where it is an outlier, which is NaN in the tile.
template <typename T>
inline float filled(T x, float mean) {
  const float value = static_cast<float>(x);
  return isnan(value) ? mean : value;
}
// === kernel
// x [B, H, n, D], of any strides. A line of the tile runs along the groups: one channel's tokens
// (ALONG) or one token's channels. KEYS: the words run along tokens, else along channels.
//   codes        keys [B, H, D, words of n], values [B, H, n, words of D]
//   step, low    ALONG [B, H, n / group, 1, D], else [B, planes, n, width / group, 1]
//   index, mean  outliers' places, ascending, and what stands for them: keys [B, H, D, m] tokens
//                and [B, H, D], values [B, n, m] channels of all heads and [B, n]
//   rest         [B, H, n, D], x - (code step + low), 0 at outliers
// A threadgroup has `lines` lines of `span` entries, of which a `piece` at a time fits in the tile.
// There is more than one piece only where a group is that long; then it is walked through twice.
constexpr uint PER = 32 / BITS, CHUNK = 16 / sizeof(T);
constexpr float TOP = (1u << BITS) - 1;
threadgroup T tile[TILE / sizeof(T)];
threadgroup float lows[GROUPS], steps[GROUPS];  // of the groups; at first a step is high
threadgroup float means[GROUPS];  // of the rows that outliers are chosen in
#ifdef HAS_INDEX
#define ENTRY(line, i) filled(tile[(line) * pitch + i], means[KEYS == ALONG ? line : i])
#else
#define ENTRY(line, i) static_cast<float>(tile[(line) * pitch + i])
#endif

const uint H = x_shape[1], n = x_shape[2], D = x_shape[3];
const uint planes = H * D / width;  // of D channels each, or one with those of all heads
const uint plane = threadgroup_position_in_grid.z, b = plane / planes, head = plane % planes;
const uint threads = threads_per_threadgroup.x, me = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup, simdgroups = threads / 32;

const uint length = ALONG ? n : width, across = ALONG ? width : n;
const uint first = threadgroup_position_in_grid.y * span, stop = min(first + span, length);
const uint line0 = threadgroup_position_in_grid.x * lines, count = min(uint(lines), across - line0);
const uint pitch = piece + 4 / sizeof(T);  // so that lines begin in different banks
const uint in_line = max(1u, (stop - first) / group), groups = count * in_line;

for (uint walk = 0; walk < 2; walk++) {
  for (uint at = first; at < stop; at += piece) {
    const uint size = min(uint(piece), stop - at);
    const uint token0 = ALONG ? at : line0, tokens = ALONG ? size : count;
    const uint channel0 = ALONG ? line0 : at, channels = ALONG ? count : size;

    if (walk == 0 || stop - first > uint(piece)) {
      for (uint e = me; e < tokens * channels / CHUNK; e += threads) {
        const uint t = e / (channels / CHUNK), c = e % (channels / CHUNK) * CHUNK;
        const uint h = head + (channel0 + c) / D;
        const device T* from =
            token_of(x, x_strides, b, h, token0 + t) + (channel0 + c) % D * x_strides[3];
        alignas(16) T some[CHUNK];
        if (x_strides[3] == 1) {
          *reinterpret_cast<thread uint4*>(some) = *reinterpret_cast<const device uint4*>(from);
        } else {
          for (uint j = 0; j < CHUNK; j++) some[j] = from[j * x_strides[3]];
        }
        for (uint j = 0; j < CHUNK; j++)
          tile[ALONG ? (c + j) * pitch + t : t * pitch + c + j] = some[j];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
#ifdef HAS_INDEX
      // the outliers of each row that lie in the tile, from the first one on, which is searched for
      const uint m = index_shape[index_ndim - 1];
      const uint begin = KEYS ? token0 : head * D + channel0;
      const uint end = begin + (KEYS ? tokens : channels);
      for (uint r = me; r < (KEYS ? channels : tokens); r += threads) {
        const uint nth = KEYS ? plane * D + channel0 + r : b * n + token0 + r, row = nth * m;
        means[r] = mean[nth];
        uint k = 0;
        for (uint last = m; k < last;) {
          const uint middle = (k + last) / 2;
          if (uint(index[row + middle]) < begin)
            k = middle + 1;
          else
            last = middle;
        }
        for (; k < m && uint(index[row + k]) < end; k++) {
          const uint place = index[row + k] - begin, t = KEYS ? place : r, c = KEYS ? r : place;
          tile[ALONG ? c * pitch + t : t * pitch + c] = static_cast<T>(NAN);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
    }

    if (walk == 0) {
      // low = min(x), high = max(x); a simdgroup takes a group
      for (uint g = simdgroup_index_in_threadgroup; g < groups; g += simdgroups) {
        const uint line = g / in_line, from = g % in_line * group;
        float low_ = INFINITY, high = -INFINITY;
        for (uint i = from + lane; i < min(from + group, size); i += 32) {
          const float value = ENTRY(line, i);
          low_ = min(low_, value);
          high = max(high, value);
        }
        low_ = simd_min(low_);
        high = simd_max(high);
        if (lane == 0) {
          lows[g] = at == first ? low_ : min(lows[g], low_);
          steps[g] = at == first ? high : max(steps[g], high);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      continue;
    }

    // a thread makes whole words
    const uint along = KEYS == ALONG ? size : count, beside = KEYS == ALONG ? count : size;
    const uint words = (along + PER - 1) / PER;
    for (uint e = me; e < words * beside; e += threads) {
      const uint w = e % words, row = e / words;
      uint word = 0;
      for (uint j = 0; j < min(PER, along - w * PER); j++) {
        const uint line = KEYS == ALONG ? row : w * PER + j, i = KEYS == ALONG ? w * PER + j : row;
        const uint g = line * in_line + i / group;
        word |= uint(code_of(ENTRY(line, i), lows[g], steps[g], TOP)) << (j * BITS);
      }
      if (KEYS) {
        const uint in_row = (n + PER - 1) / PER;
        codes[(plane * D + channel0 + row) * in_row + token0 / PER + w] = word;
      } else {
        const uint c = channel0 + w * PER, h = head + c / D;
        codes[((b * H + h) * n + token0 + row) * (D / PER) + c % D / PER] = word;
      }
    }
#ifdef HAS_FIT
    for (uint e = me; e < tokens * channels / 4; e += threads) {
      const uint t = e / (channels / 4), c = e % (channels / 4) * 4;
      float4 left;
      for (uint j = 0; j < 4; j++) {
        const uint line = ALONG ? c + j : t, i = ALONG ? t : c + j;
        const uint g = line * in_line + i / group;
        const float value = static_cast<float>(tile[line * pitch + i]);
        left[j] = value - (code_of(value, lows[g], steps[g], TOP) * steps[g] + lows[g]);
        left[j] = isnan(value) ? 0.0f : left[j];
      }
      const uint h = b * H + head + (channel0 + c) / D;
      write4(rest + (h * n + token0 + t) * D + (channel0 + c) % D, left);
    }
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (walk == 0) {
    // step = (high - low) / top, both as they are stored; a step that rounds to 0 is stored as 1
    for (uint g = me; g < groups; g += threads) {
      const uint line = g / in_line, nth = first / group + g % in_line;
      const uint to = ALONG ? (plane * (n / group) + nth) * D + line0 + line
                            : (plane * n + line0 + line) * (width / group) + nth;
      const S step_ = static_cast<S>((steps[g] - lows[g]) / TOP);
      step[to] = step_ == S(0) ? S(1) : step_;
      low[to] = static_cast<Z>(lows[g]);
      steps[g] = static_cast<float>(step_);
      lows[g] = static_cast<float>(static_cast<Z>(lows[g]));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
