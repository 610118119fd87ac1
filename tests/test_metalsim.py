"""The simulator as a place of `mx.fast.metal_kernel`: arrays, views, schedules, traffic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="the simulator needs mlx")

# ruff: noqa: E402
import kvc.metal_kernels
from tests.metalsim import Launch, MetalError, build, need, simulate
from tests.metalsim.compute import compute
from tests.metalsim.source import Definition, generate

I = "const uint i = thread_position_in_grid.x;\n"
COPY = f"{I}out[i] = x[elem_to_loc(long(i), x_shape, x_strides, x_ndim)];"


@pytest.fixture(autouse=True, scope="module")
def _clang() -> None:
    need()


@pytest.mark.parametrize("mode", ["check", "fast"])
@pytest.mark.parametrize(
    "name",
    ["float32", "float16", "bfloat16", "bool_"]
    + [f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)],
)
def test_arrays_of_every_dtype_go_in_and_out(name: str, mode: str) -> None:
    dtype = getattr(mx, name)
    x = (mx.arange(64) % 5).astype(dtype)
    with simulate(mode):
        out = compute(COPY, {"x": x}, (8, 8), dtype)
    assert out.dtype == dtype
    assert mx.array_equal(out, x.reshape(8, 8))


VIEWS = {
    "slice": lambda x: x[:, 1:3, 2:, ::2],
    "transpose": lambda x: x.transpose(2, 0, 3, 1),
    "reverse": lambda x: x[:, ::-1],
    "broadcast": lambda x: mx.broadcast_to(x[:1, :1], x.shape),
    "whole": lambda x: x,
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_where_they_lie(view: str, dtype: mx.Dtype) -> None:
    x = VIEWS[view](mx.random.normal((3, 4, 5, 6), key=mx.random.key(0)).astype(dtype))
    for contiguous in (False, True):
        with simulate("check"):
            out = compute(
                COPY, {"x": x}, x.shape, dtype, threads=x.size, ensure_row_contiguous=contiguous
            )
        assert mx.array_equal(out, x)


def test_strides_of_a_slice_are_those_of_its_buffer() -> None:
    x = mx.zeros((2, 100, 8))[:, 3:70]
    source = f"{I}out[i] = x_strides[i];"
    with simulate("check"):
        assert compute(source, {"x": x}, (3,), threads=3).tolist() == [800, 8, 1]
        copied = compute(source, {"x": x}, (3,), threads=3, ensure_row_contiguous=True)
    assert copied.tolist() == [536, 8, 1]


def test_between_rows_of_a_view_memory_can_be_read_but_not_behind_it() -> None:
    x = mx.arange(80).reshape(8, 10)[2:6, 3:7]
    assert x.shape == (4, 4)
    source = f"{I}out[i] = x[int(i) + FROM];"
    with simulate("check"):
        out = compute(source, {"x": x}, (34,), threads=34, template={"FROM": 0})
        assert out.tolist() == [*range(23, 57)]
        for start in (1, -1):
            with pytest.raises(MetalError, match=r"out-of-bounds read.*`x` \(136 bytes"):
                compute(source, {"x": x}, (34,), threads=34, template={"FROM": start})


def test_alignment_is_that_of_the_view() -> None:
    source = f"{I}out[i] = reinterpret_cast<const device float4*>(x)[i].x;"
    x = mx.arange(68).astype(mx.float32)
    with simulate("check"):
        assert compute(source, {"x": x[4:]}, (16,), threads=16)[1] == 8
        with pytest.raises(MetalError, match="misaligned"):
            compute(source, {"x": x[2:66]}, (16,), threads=16)


def test_numbers_become_references_and_short_arrays_constants() -> None:
    source = "out[thread_position_in_grid.x] = x[thread_position_in_grid.x] * scale + n;"
    with simulate("check") as sim:
        out = compute(source, {"x": mx.ones((7,)), "scale": 2.5, "n": 3}, (7,), threads=7)
    assert out.tolist() == [5.5] * 7
    (launch,) = sim.launches
    assert launch.loaded == launch.inputs_bytes == 0  # constants are no traffic
    assert launch.stored == launch.outputs_bytes == 28


def test_outputs_start_with_a_value_and_take_atomics() -> None:
    source = f"{I}atomic_fetch_add_explicit(&out[x[i] % 4], 1u, memory_order_relaxed);"
    with simulate("check"):
        out = compute(
            source,
            {"x": mx.arange(100)},
            (4,),
            mx.uint32,
            threads=100,
            threadgroup=32,
            init_value=5,
            atomic_outputs=True,
        )
    assert out.tolist() == [30] * 4


def test_grid_need_not_be_a_multiple_of_the_threadgroup() -> None:
    source = """
    const uint3 p = thread_position_in_grid;
    out[(p.z * 5 + p.y) * 7 + p.x] = threads_per_threadgroup.x * 100 + threads_per_threadgroup.y;
    """
    with simulate("check"):
        out = compute(
            source, {"x": mx.zeros((8,))}, (2, 5, 7), threads=(7, 5, 2), threadgroup=(4, 4, 1)
        )
    row, col = np.array([4, 4, 4, 4, 3, 3, 3]), np.array([4, 4, 4, 4, 1])
    np.testing.assert_array_equal(
        np.array(out), np.broadcast_to(row * 100 + col[:, None], (2, 5, 7))
    )


LAST = f"{I}if (x[0] == 0) atomic_store_explicit(&out[0], i, memory_order_relaxed);"


def test_orders_differ_and_seeds_repeat() -> None:
    def last(order: str, seed: int) -> int:  # the thread that came last
        with simulate("fast", order=order, seed=seed):
            zero = mx.zeros((8,))
            out = compute(LAST, {"x": zero}, (1,), mx.uint32, threads=1000, atomic_outputs=True)
        return out.item()

    assert last("forward", 0) == 999
    assert last("reverse", 0) == 0
    for order in ("shuffled", "random"):
        found = [last(order, seed) for seed in range(5)]
        assert found == [last(order, seed) for seed in range(5)]
        assert len(set(found)) > 2


def traffic(source: str, n: int = 1024, **options: object) -> Launch:
    with simulate("check") as sim:
        compute(source, {"x": mx.zeros((n,))}, (64,), **options)
    return sim.launches[0]


def test_traffic_counts_each_byte_that_moves() -> None:
    once = traffic(f"{I}out[i] = x[i];")
    assert (once.loaded, once.stored, once.loaded_by["out"]) == (256, 256, 0)
    assert (once.inputs_bytes, once.outputs_bytes) == (4096, 256)
    assert traffic(f"{I}out[i] = x[i] + x[64 + i];").loaded == 512
    twice = traffic(
        f"{I}out[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_none);\nout[i] += x[i];"
    )
    assert (twice.loaded_by, twice.stored_by) == ({"x": 512, "out": 256}, {"out": 512})


def test_lanes_of_a_simdgroup_share_one_load() -> None:
    same = traffic(f"{I}out[i] = x[thread_position_in_threadgroup.x * 0];")
    assert same.loaded == 8  # 4 bytes for each of two simdgroups
    assert same.requested_by["x"] == 256
    wide = traffic(f"{I}out[i] = reinterpret_cast<const device float4*>(x)[i / 4][i % 4];")
    assert wide.loaded == 256
    looped = "for (uint k = 0; k < 16; k++) sum += x[k * 2];"  # the same in each of 64 threads
    assert traffic(f"{I}float sum = 0;\n{looped}\nout[i] = sum;").loaded == 2 * 16 * 4


def test_threadgroup_memory_is_told() -> None:
    source = f"{I}threadgroup float a[64];\nthreadgroup half b[3];\na[i] = x[i];\n"
    source += "if (i < 3) b[i] = half(x[i]);\nout[i] = a[i];"
    assert traffic(source).threadgroup_bytes == 256 + 6
    assert traffic(f"{I}out[i] = x[i];").threadgroup_bytes == 0


def test_kvc_sees_a_gpu_only_while_it_is_simulated() -> None:
    real, before = mx.fast.metal_kernel, kvc.metal_kernels.unavailable
    with simulate("fast"):
        assert kvc.metal_kernels.unavailable() is None
        assert mx.fast.metal_kernel is not real
    assert mx.fast.metal_kernel is real
    assert kvc.metal_kernels.unavailable is before


def test_source_is_what_mlx_itself_generates() -> None:
    definition = Definition("f", ("x", "s"), ("out",), f"{I}out[i] = T(x[i] * s);", "// above\n")
    inputs = [mx.zeros((2, 4), mx.float16), mx.array(1.0)]
    source = generate(
        definition, inputs, [("T", mx.bfloat16), ("N", 3), ("B", True)], [mx.bfloat16]
    )
    assert source.text.startswith(
        "// above\ntemplate <typename T, int N, bool B>\n[[kernel]] void "
    )
    assert "const device float16_t* x [[buffer(0)]]" in source.text
    assert "const constant float& s [[buffer(1)]]" in source.text
    assert definition.source in source.text
    assert source.call == f"{source.kernel}<bfloat16_t, 3, 1>"
    short = generate(definition, [mx.zeros((7,)), mx.array(1)], [("T", mx.float32)], [mx.float32])
    assert "const constant float* x" in short.text
    assert "const constant int32_t& s" in short.text


def test_source_is_never_made_without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no export")

    monkeypatch.setattr(mx, "export_function", refuse)
    with simulate("fast"), pytest.raises(RuntimeError, match="no export"):
        compute(f"{I}out[i] = 1; // never seen before", {"x": mx.zeros((8,))}, (8,))


def test_first_process_to_have_an_object_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(to: Path) -> None:
        (build.folder() / to.name).write_text("first")  # as another process may, meanwhile
        to.write_text("second")

    kept = build._published("object", make)
    assert kept.read_text() == "first"
    assert [*build.folder().iterdir()] == [kept]


def test_without_clang_tests_skip_unless_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CLANG", "clang++-0")
    monkeypatch.setenv("KVC_REQUIRE", "mlx")
    with pytest.raises(pytest.skip.Exception, match=r"clang\+\+-0 is not installed"):
        need()
    monkeypatch.setenv("KVC_REQUIRE", "mlx, clang")
    with pytest.raises(pytest.fail.Exception, match=r"KVC_REQUIRE names clang"):
        need()
