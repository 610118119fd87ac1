"""What Metal's language and library mean, against numpy and MLX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="the simulator needs mlx")

# ruff: noqa: E402
from tests.metalsim import need, simulate
from tests.metalsim.compute import compute

I = "const uint i = thread_position_in_grid.x;\n"
N = 64
X = np.random.default_rng(0).standard_normal(N).astype(np.float32)
LANES = np.arange(N) % 32
ROWS = X.reshape(2, 32)


@pytest.fixture(autouse=True, scope="module")
def _clang() -> None:
    need()


def run(
    source: str,
    x: Any = X,
    dtype: mx.Dtype = mx.float32,
    shape: tuple[int, ...] = (N,),
    **options: Any,
) -> np.ndarray:
    with simulate("check"):
        out = compute(source, {"x": mx.array(x)}, shape, dtype, **options)
    with simulate("fast"):
        assert mx.array_equal(out, compute(source, {"x": mx.array(x)}, shape, dtype, **options))
    return np.array(out.astype(mx.float32) if dtype == mx.bfloat16 else out)


VECTORS = {  # of four numbers x, y, z, w: an expression, and its value
    "constructor": ("float4(v.w, v.z, v.y, v.x)", "wzyx"),
    "of vectors": ("float4(v.zw, float2(v.x, v.y))", "zwxy"),
    "of one number": ("float4(v.y)", "yyyy"),
    "named vec": ("vec<float, 4>(v.y, v.xzw)", "yxzw"),
    "of namespace metal": ("metal::vec<float, 4>(v.yx, v.wz)", "yxwz"),
    "alias": ("Four(v.x, v.x, v.y, v.w)", "xxyw"),
    "swizzle": ("v.wyxz", "wyxz"),
    "cast": ("static_cast<float4>(half4(v))", None),
    "array access": ("float4(v[3], v[2], v[1], v[0])", "wzyx"),
}


@pytest.mark.parametrize("case", VECTORS)
def test_vectors(case: str) -> None:
    expression, order = VECTORS[case]
    source = f"""
    using Four = vec<float, 4>;
    {I} const float4 v = reinterpret_cast<const device float4*>(x)[i / 4];
    out[i] = ({expression})[i % 4];
    """
    expected = X.astype(np.float16).astype(np.float32)
    if order:
        expected = X.reshape(-1, 4)[:, ["xyzw".index(c) for c in order]].reshape(-1)
    np.testing.assert_array_equal(run(source), expected)


VALUES: dict[str, tuple[str, Any]] = {  # an expression of v = x[i], and numpy's
    "exp": ("exp(v)", np.exp(X)),
    "precise": ("precise::exp(v) + precise::tanh(v)", np.exp(X) + np.tanh(X)),
    "fast": ("fast::exp2(v) + fast::sqrt(fabs(v))", np.exp2(X) + np.sqrt(np.abs(X))),
    "log": ("metal::log(abs(v))", np.log(np.abs(X))),
    "rsqrt": ("rsqrt(v * v)", 1 / np.abs(X)),
    "fma": ("fma(v, 2.0f, 1.0f)", X * 2 + 1),
    "rint": ("rint(v * 2)", np.rint(X * 2)),
    "round": (
        "round(floor(v) + 0.5f)",
        np.sign(np.floor(X) + 0.5) * np.ceil(abs(np.floor(X) + 0.5)),
    ),
    "clamp": ("clamp(v, -0.5f, 0.5f)", np.clip(X, -0.5, 0.5)),
    "min max": ("min(v, 0.25f) + max(v, 0.5f)", np.minimum(X, 0.25) + np.maximum(X, 0.5)),
    "nan loses": ("max(v, NAN) + min(NAN, v)", X + X),
    "select": ("select(v, 7.0f, v < 0)", np.where(X < 0, 7, X)),
    "select of vectors": (
        "select(float2(v), float2(1, 2), float2(v) < float2(0)).y",
        np.where(X < 0, 2, X),
    ),
    "dot": ("dot(float4(v, 1, 2, 3), float4(1, v, 0, 1))", 2 * X + 3),
    "sign": ("sign(v) + copysign(2.0f, v)", 3 * np.sign(X)),
    "literals are float": ("v * 0.1 == v * 0.1f ? 1.0 : 0.0", np.ones(N)),
    "half literal": ("float(1.5h) + v", X + 1.5),
    "infinity": ("isinf(-INFINITY) && exp(-INFINITY) == 0 ? v : 0.0f", X),
    "all any": ("all(float2(v) == float2(v)) && !any(float4(v) > float4(99)) ? v : 0.0f", X),
    "limits": ("numeric_limits<float>::infinity() > v ? v : 0.0f", X),
    "sum of tags": ("dot(abs(float4(v)), float4(0.25f))", np.abs(X)),
    "macro": ("TWICE(v)", 2 * X),
    "template": ("power<3>(v)", X**3),
    "struct": ("Pair{v, 2.0f}.sum()", X + 2),
    "private memory": ("last(v)", X),
}
HEADER = """
#define TWICE(x) ((x) + (x))
template <int N> inline float power(float x) {
  if constexpr (N == 0) { return 1; } else { return x * power<N - 1>(x); }
}
struct Pair { float a, b; float sum() const thread { return a + b; } };
inline void put(thread float* to, float x) { *to = x; }
inline float last(float x) {
  thread float kept[3] = {0, 0, 0};
  for (int k = 0; k < 3; k++) put(&kept[k], x);
  return kept[2];
}
"""


@pytest.mark.parametrize("case", VALUES)
def test_values(case: str) -> None:
    expression, expected = VALUES[case]
    got = run(f"{I}const float v = x[i];\nout[i] = {expression};", header=HEADER)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


BITS = np.random.default_rng(1).integers(0, 2**32, N, dtype=np.uint32)
INTEGERS = {
    "extract_bits": ("extract_bits(v, 5u, 7u)", BITS >> 5 & 127),
    "insert_bits": ("insert_bits(v, 9u, 4u, 5u)", BITS & ~np.uint32(31 << 4) | 9 << 4),
    "popcount": ("popcount(v)", np.bitwise_count(BITS)),
    "clz": ("clz(v | 1)", 31 - np.floor(np.log2(BITS | 1)).astype(int)),
    "mulhi": ("mulhi(v, 77777u)", BITS.astype(np.uint64) * 77777 >> 32),
    "as_type": ("as_type<uint>(as_type<float>(v & 0x7fffff))", BITS & 0x7FFFFF),
    "as_type of vectors": ("as_type<uint>(as_type<uchar4>(v).wzyx)", BITS.byteswap()),
    "as_type of halves": ("as_type<uint>(as_type<ushort2>(v).yx)", BITS << 16 | BITS >> 16),
    "reverse_bits": ("reverse_bits(reverse_bits(v) >> 8) >> 8", (BITS << 8) >> 8),
    "packed": ("((const device packed_uchar4*)x)[i].y", BITS >> 8 & 255),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_integers(case: str) -> None:
    expression, expected = INTEGERS[case]
    got = run(f"{I}const uint v = x[i];\nout[i] = {expression};", BITS, mx.uint32)
    np.testing.assert_array_equal(got, expected)


PREFIX = np.cumsum(ROWS, 1).reshape(-1)
SIMD = {
    "simd_sum": np.repeat(ROWS.sum(1), 32),
    "simd_max": np.repeat(ROWS.max(1), 32),
    "simd_min": np.repeat(ROWS.min(1), 32),
    "simd_prefix_inclusive_sum": PREFIX,
    "simd_prefix_exclusive_sum": PREFIX - X,
    "quad_sum": np.repeat(X.reshape(-1, 4).sum(1), 4),
    "simd_broadcast_first": np.repeat(ROWS[:, 0], 32),
}
SHUFFLES = {
    "simd_shuffle(v, ushort(31 - lane))": ROWS[:, ::-1].reshape(-1),
    "simd_shuffle_xor(v, 5)": X[np.arange(N) ^ 5],
    "simd_broadcast(v, 7)": np.repeat(ROWS[:, 7], 32),
    "simd_shuffle_rotate_up(v, 3)": np.roll(ROWS, 3, 1).reshape(-1),
    "simd_shuffle_and_fill_down(v, -v, 2)": np.concatenate([ROWS[:, 2:], -ROWS[:, :2]], 1).reshape(
        -1
    ),
    "simd_shuffle_and_fill_up(v, -v, 2)": np.concatenate([-ROWS[:, -2:], ROWS[:, :-2]], 1).reshape(
        -1
    ),
    "popcount(uint(ulong(simd_ballot(v > 0))))": np.repeat((ROWS > 0).sum(1), 32),
    "simd_any(lane == 3) && !simd_all(lane == 3) ? v : 0.0f": X,
    "simd_sum(float2(v, 1)).y": np.full(N, 32),
}


@pytest.mark.parametrize("op", SIMD)
def test_simdgroup_operations(op: str) -> None:
    np.testing.assert_allclose(run(f"{I}out[i] = {op}(x[i]);"), SIMD[op], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expression", SHUFFLES)
def test_shuffles(expression: str) -> None:
    lane = "const uint lane = thread_index_in_simdgroup;"
    source = f"{I}{lane}\nconst float v = x[i];\nout[i] = {expression};"
    np.testing.assert_array_equal(run(source), SHUFFLES[expression])


def test_shuffle_down_leaves_the_last_lanes_alone() -> None:
    got = run(f"{I}out[i] = simd_shuffle_down(x[i], ushort(4));").reshape(2, 32)
    np.testing.assert_array_equal(got[:, :28], ROWS[:, 4:])


def test_simdgroup_operations_of_the_lanes_that_are_left() -> None:
    got = run(f"{I}if (i >= 20) return;\nout[i] = simd_sum(x[i]);", shape=(20,))
    np.testing.assert_allclose(got, np.repeat(X[:20].sum(), 20), rtol=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat", "half"])
def test_sixteen_bits_round_as_in_mlx(dtype: mx.Dtype) -> None:
    x = np.concatenate([X[:60] * 1000, [np.inf, -np.inf, 3.3895e38, 65519]]).astype(np.float32)
    got = run(f"{I}out[i] = T(x[i]);", x, dtype, template={"T": dtype})
    expected = mx.array(x).astype(dtype)
    np.testing.assert_array_equal(got, np.array(expected.astype(mx.float32)))
    quotients = run(f"{I}out[i] = T(x[i]) / T(3) + T(1);", X, dtype, template={"T": dtype})
    third = (mx.array(X).astype(dtype) / mx.array(3, dtype)).astype(dtype) + mx.array(1, dtype)
    np.testing.assert_array_equal(quotients, np.array(third.astype(mx.float32)))


def test_sixteen_byte_loads_of_bfloats() -> None:
    x = mx.array(X).astype(mx.bfloat16)
    source = f"""
    {I} const uint4 words = reinterpret_cast<const device uint4*>(x)[i / 8];
    const bfloat4 half_of_it = as_type<bfloat4>(i % 8 < 4 ? words.xy : words.zw);
    out[i] = float4(half_of_it)[i % 4];
    """
    with simulate("check") as sim:
        out = compute(source, {"x": x}, (N,))
    assert mx.array_equal(out, x)
    assert sim.launches[0].loaded == 128


def test_threadgroup_arrays_go_to_functions() -> None:
    header = """
    // the sum of n numbers that all threads wrote
    template <typename T, uint n>
    inline T total(const threadgroup T (&all)[n], uint from) {
      T sum = 0;
      for (uint k = from; k < n; k++) sum += all[k];
      return sum;
    }
    inline void put(threadgroup float2* to, uint i, float x) { to[i] = float2(x, -x); }
    """
    source = f"""
    threadgroup float one[64], pairs[2][64];  // two declarations
    threadgroup float2 both[64];
    {I} one[i] = x[i];
    pairs[0][i] = x[i]; pairs[1][i] = 1;
    put(both, i, x[i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = total(one, 0u) + pairs[1][63 - i] + both[63 - i].y + pairs[0][i];
    """
    expected = X.sum() + 1 - X[::-1] + X
    np.testing.assert_allclose(run(source, header=header), expected, rtol=1e-5, atol=1e-5)


def test_arrays_of_every_instantiation_are_its_own() -> None:
    source = f"""
    constexpr int size = N * 2;
    threadgroup T all[size];
    {I} all[i] = T(x[i]); all[i + N] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = float(all[N - 1 - i] + all[i + N]);
    """
    for dtype in (mx.float32, mx.float16):
        got = run(source, template={"T": dtype, "N": N})
        np.testing.assert_allclose(got, X[::-1] + 1, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["float", "half", "bfloat"])
def test_simdgroup_matrices(kind: str) -> None:
    source = f"""
    simdgroup_matrix<{kind}, 8, 8> a, b;
    simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    threadgroup {kind} left[64], right[64];
    const uint lane = thread_index_in_simdgroup;
    for (uint k = lane; k < 64; k += 32) {{
      left[k] = {kind}(x[k]);
      right[k] = {kind}(x[63 - k]);
    }}
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(a, left, 8, ulong2(0, 0), true);
    simdgroup_load(b, right);
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, out, 8);
    """
    dtype = {"float": mx.float32, "half": mx.float16, "bfloat": mx.bfloat16}[kind]
    x = np.array(mx.array(X).astype(dtype).astype(mx.float32)).reshape(8, 8)
    got = run(source, threads=32, threadgroup=32, shape=(8, 8))
    np.testing.assert_allclose(got, x.T @ x[::-1, ::-1] + 1, rtol=1e-5, atol=1e-5)
