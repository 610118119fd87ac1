"""Triton's `encode`, each part against the definition in float64 of the parts before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvc.ops import residual
from kvc.ops.codec import Code, arrays, decode, encode, map_code, turn
from kvc.ops.quant import Quantized, quantize, unpack_tokens
from kvc.ops.residual import Seed, clear, fill, find_outliers, power_iteration, rows, start
from kvc.ops.scales import GRID_STEP, dual_scales
from tests.cases import assert_close, exact, view
from tests.cases.encode import CASES, GEAR2, Case, args
from tests.cases.quantize import assert_codes
from tests.tolerances import STORED, TIE
from tests.triton_device import kernels, launched, marks, on_gpu, tensor

pytestmark = marks()

FEW = 4  # of the cases that the interpreter takes, one of so many


def block(case: Case, device: str) -> Any:
    """What the op is given: a block inside a larger buffer."""
    from kvc.backends.torch import ops

    return view(ops, args(case)["x"], case.dtype, axis=2).to(device)


def assert_levels(code: Any, x: np.ndarray[Any, Any], case: Case) -> None:
    """Fails where a code is not that of z = (x - mu) / (r c), all as stored, but for ties."""
    shape = (*x.shape[:2], -1, min(case.tile, case.n), case.D)
    factor = code.r.reshape(shape[:-1])[..., None] * code.c[..., None, :]
    z = (x.reshape(shape) - code.mu[..., None, :]) / factor
    top = 2**case.bits - 1
    if code.step is None:
        place = z / GRID_STEP[case.bits] + top / 2
    else:
        assert_close(
            "step", code.step, (z.max(-2) - z.min(-2)) / top, STORED[case.scale or case.dtype]
        )
        assert_close("low", code.low, z.min(-2), STORED[case.scale or case.dtype])
        place = (z - code.low[..., None, :]) / code.step[..., None, :]
    found = unpack_tokens(code.codes, case.bits, case.role, case.D, 0, case.n)
    assert (np.abs(found - place.reshape(x.shape).clip(0, top)) <= 0.5 + TIE).all()


def check(case: Case, x: Any = None) -> Code:
    """Runs the kernels and checks each part; returns the code."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import encode as kernel

    spec = case.spec
    with kernels() as device:
        x = block(case, device) if x is None else x.to(device)
        assert kernel.why_not(x, spec, **case.options) is None
        got = kernel.run(x, spec, **case.options)
    alike = encode.define(x, spec, **case.options)
    assert [(name, y.shape, y.dtype) for name, y in arrays(got)] == [
        (name, y.shape, y.dtype) for name, y in arrays(alike)
    ]

    wide, stored = turn(exact(ops, x), spec), STORED[case.scale or case.dtype]
    code = map_code(lambda y: ops.to_numpy(y) if y is got.d.codes else exact(ops, y), got)
    index = None
    if isinstance(got.d, Quantized):
        index = find_outliers(wide, spec.role, case.outliers)
        filled = wide if index is None else fill(wide, index, spec.role)
        how = (spec.bits, spec.role, spec.backbone, spec.group_size)
        want = quantize.define(filled, *how, *[np.dtype("float64")] * 2)
        assert_close("step", code.d.step, want.step, stored)
        assert_close("low", code.d.low, want.low, stored)
        assert_codes(ops, got.d, filled, *how)
    else:
        mu, r, c = dual_scales(wide.reshape(*wide.shape[:2], -1, min(spec.tile, spec.n), case.D))
        assert_close("mu", code.d.mu, mu[..., 0, :], stored)
        assert_close("c", code.d.c, c[..., 0, :], stored)
        assert_close("r", code.d.r, r.reshape(code.d.r.shape), stored)
        assert_levels(code.d, wide, case)
    rest = wide - decode(Code(code.d, None, None), spec)
    if not isinstance(got.d, Quantized) and case.outliers:
        index = find_outliers(rest, spec.role, case.outliers)
    if code.l is not None:
        seed = case.options["seed"]
        rank = min(case.rank, case.n, case.D)
        c0 = start(seed, spec.role, case.H, case.D, rank)
        fitted = rest if index is None else clear(rest, index, spec.role)
        a, c = power_iteration(fitted, c0.astype("float32"), case.n_iter)
        near = code.l.a @ code.l.c.swapaxes(-1, -2)
        assert_close("A C^T", near, a @ c.swapaxes(-1, -2), STORED[case.dtype])
        rest = rest - near
    assert (code.s is None) == (index is None)
    if index is not None:
        assert np.array_equal(code.s.index, index)
        delta = np.take_along_axis(rows(rest, spec.role), index, -1)
        assert_close("delta", code.s.delta, delta, STORED[case.dtype])
    return got


@pytest.mark.parametrize("case", CASES if on_gpu() else CASES[::FEW], ids=lambda case: case.id)
def test_encode(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(outliers=0.1),
        Case("bfloat16", 2, "v", outliers=0.05),
        Case("float32", 4, "v", "kcvt", B=2, H=3, n=20, D=48, rank=3, outliers=0.1),
        Case("float32", 2, "k", n=40, D=48, scales="dual", outliers=0.1),
        Case("float32", 2, "k", n=80, B=2, rank=0, scales="dual", tile=20),
        Case("bfloat16", 4, "k", n=128, D=128, **GEAR2),
        Case("float16", 2, "v", n=256, **GEAR2),
        Case("float32", n=64, D=80, group=64, rotate="hadamard", outliers=0.1),
        Case("float32", n=320, H=1, rank=3, n_iter=1),
    ],
    ids=lambda case: case.id,
)
def test_every_way_through_the_kernels(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_of_equal_entries_the_earlier_are_outliers(role: Any, values: int) -> None:
    case = Case("float32", 2, role, n=64, D=32, H=1, rank=0, outliers=0.3)
    few = np.random.default_rng(values).integers(0, values, (1, 1, 64, 32)) - values // 2
    check(case, tensor(few.astype(np.float32) * -1.0, "float32", "cpu"))


def test_a_start_is_the_same_when_it_was_drawn_early() -> None:
    def drawn(chunk: int, rank: int) -> np.ndarray[Any, Any]:
        rng = np.random.default_rng([7, 3, 1, chunk])
        return rng.standard_normal((2, 32, max(16, rank)))[..., :rank]

    for chunk, rank in ((0, 4), (1, 2), (2, 2), (3, 4), (4, 20), (5, 2), (9, 2), (9, 2), (10, 2)):
        assert np.array_equal(start(Seed(7, 3, chunk), "v", 2, 32, rank), drawn(chunk, rank))
        early = residual._early[7, 3, "v"]
        assert np.array_equal(early.numbers.result(), drawn(chunk + 1, rank))  # and waits for it


def test_a_process_has_its_own_heads_of_the_start() -> None:
    whole = start(Seed(7, 3, 0), "v", 4, 32, 2)
    parts = [start(Seed(7, 3, 0, (shard, 2)), "v", 2, 32, 2) for shard in (0, 1)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_an_early_start_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    start(Seed(8, 3, 0), "k", 2, 32, 2)
    want = residual._early[8, 3, "k"].numbers.result()

    def never(*args: Any) -> Any:
        raise AssertionError("drawn again")

    monkeypatch.setattr(residual, "_draw", never)
    assert np.array_equal(want, start(Seed(8, 3, 1), "k", 2, 32, 2))


@pytest.mark.parametrize("n", [64, 320])  # a fit by one program, and by several
def test_a_rank_above_that_of_the_block_adds_nothing(n: int) -> None:
    from kvc.cuda_kernels.encode_low_rank import fit

    rng = np.random.default_rng(0)
    e = rng.standard_normal((1, 2, n, 2)) @ rng.standard_normal((1, 2, 2, 32))
    e[0, 1] = 0  # a head whose codes leave nothing
    with kernels() as device:
        x = tensor(e, "float32", device)
        l = fit(x, 4, 3, "k", Seed(0, 0, 0), x.dtype)
        near = (l.a @ l.c.swapaxes(-1, -2)).cpu().numpy()
    assert_close("A C^T", near, e, STORED["float32"])


@pytest.mark.parametrize("n", [64, 320])
def test_columns_of_very_different_lengths_stay_orthonormal(n: int) -> None:
    from kvc.cuda_kernels.encode_low_rank import fit

    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in (n, 32))
    e = (u * [1, 1e-1, 1e-2, 1e-3]) @ v.T
    with kernels() as device:
        x = tensor(e[None, None], "float32", device)
        l = fit(x, 4, 3, "k", Seed(0, 0, 0), x.dtype)
        a = l.a[0, 0].cpu().numpy().astype(np.float64)
        near = a @ l.c[0, 0].cpu().numpy().astype(np.float64).T
    np.testing.assert_allclose(a.T @ a, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(near, e, atol=1e-6 * np.abs(e).max())


@pytest.mark.parametrize("scales", ["", "dual"])
def test_a_constant_block_is_itself(scales: str) -> None:
    from kvc.cuda_kernels import encode as kernel

    case = Case(rank=3, scales=scales)
    with kernels() as device:
        x = block(case, device) * 0 + 2
        assert (decode(kernel.run(x, case.spec, **case.options), case.spec) == 2).all()


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (Case(D=128, group=64, outliers=0.02), ["sweep", "iterate"]),  # no outliers of 64 tokens
        (Case(role="v", group=64, outliers=0.02), ["select", "sweep", "iterate", "deltas"]),
        (Case(n=128, D=128, bits=4, **GEAR2), ["scale_tile", "iterate"]),
        (Case(rank=0), ["sweep"]),
    ],
    ids=lambda x: x.id if isinstance(x, Case) else "",
)
@pytest.mark.skipif(on_gpu(), reason="the interpreter's launches are counted")
def test_a_block_of_decoding_takes_few_launches(case: Case, launches: list[str]) -> None:
    from kvc.cuda_kernels import encode as kernel

    with kernels() as device, launched() as made:
        kernel.run(block(case, device), case.spec, **case.options)
    assert made == launches


@pytest.mark.skipif(not on_gpu(), reason="graphs are a GPU's")
@pytest.mark.parametrize("case", [Case(role="v", outliers=0.05), Case(n=128, **GEAR2)])
def test_it_can_be_captured(case: Case) -> None:
    import torch

    from kvc.cuda_kernels import encode as kernel

    x = block(case, "cuda")
    want = kernel.run(x, case.spec, **case.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernel.run(x, case.spec, **case.options)
    graph.replay()
    for (_, y), (_, z) in zip(arrays(got), arrays(want), strict=True):
        assert (y == z).all()


def test_what_it_does_not_take() -> None:
    from kvc.cuda_kernels import encode as kernel

    with kernels() as device:
        x = block(Case(), device)
        for case, said in (
            (Case(D=60), "not 60"),
            (Case(n=100, D=128, rank=80), "not 80"),
            (Case(n=1998, group=999), "not 999"),
        ):
            zeros = x.new_zeros(1, 2, case.n, case.D)
            assert said in str(kernel.why_not(zeros, case.spec, **case.options))
