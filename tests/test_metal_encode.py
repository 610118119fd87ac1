"""The Metal kernels of `encode`, executed in the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvc.ops.codec import Code, arrays, decode, encode, map_code, turn
from kvc.ops.dispatch import mode, why_no_kernel
from kvc.ops.quant import Quantized, quantize, unpack_tokens
from kvc.ops.residual import clear, fill, find_outliers, power_iteration, rows, start
from kvc.ops.scales import GRID_STEP, dual_scales
from tests.cases import assert_close, exact, view
from tests.cases.encode import CASES, GEAR2, Case, args
from tests.cases.quantize import assert_codes, assert_rounded
from tests.metal import on_metal
from tests.tolerances import STORED, TIE

# relative, of what is stored in a type after a chain of sums in float32

INCLUDED = (
    "encode_fit",
    "encode_dual",
    "code_of",
    "quantize",
)  # other shaders that it runs


def block(case: Case) -> Any:
    """What the op is given on MLX: a block inside a larger buffer."""
    from kvc.backends.mlx import ops as xp

    return view(xp, args(case)["x"], case.dtype, axis=2)


def assert_levels(code: Any, x: np.ndarray[Any, Any], case: Case) -> None:
    """Fails where a code is not that of z = (x - mu) / (r c), all as stored, but for ties."""
    spec, shape = case.spec, (*x.shape[:2], -1, min(case.tile, case.n), case.D)
    factor = code.r.reshape(shape[:-1])[..., None] * code.c[..., None, :]
    z = (x.reshape(shape) - code.mu[..., None, :]) / factor
    top = 2**case.bits - 1
    if code.step is None:
        place = z / GRID_STEP[case.bits] + top / 2
    else:
        step, low = (z.max(-2) - z.min(-2)) / top, z.min(-2)
        assert_close("step", code.step, step, STORED[case.scale or case.dtype])
        assert_close("low", code.low, low, STORED[case.scale or case.dtype])
        place = (z - code.low[..., None, :]) / code.step[..., None, :]
    found = unpack_tokens(code.codes, case.bits, spec.role, case.D, 0, case.n)
    assert (np.abs(found - place.reshape(x.shape).clip(0, top)) <= 0.5 + TIE).all()


def check(case: Case) -> None:
    from kvc.backends.mlx import ops as xp

    x, spec = block(case), case.spec
    got = encode(x, spec, **case.options)
    with mode("reference"):
        alike = encode(x, spec, **case.options)
    assert [(name, y.shape, y.dtype) for name, y in arrays(got)] == [
        (name, y.shape, y.dtype) for name, y in arrays(alike)
    ]

    # each part is what the definition makes in float64 of the parts before it, as they are stored
    wide = turn(exact(xp, x), spec)
    code = map_code(lambda y: xp.to_numpy(y) if y is got.d.codes else exact(xp, y), got)
    index = None
    if isinstance(got.d, Quantized):
        index = find_outliers(wide, spec.role, case.outliers)
        filled = wide if index is None else fill(wide, index, spec.role)
        how = (spec.bits, spec.role, spec.backbone, spec.group_size)
        want = quantize.define(filled, *how, *[np.dtype("float64")] * 2)
        assert_close("step", code.d.step, want.step, STORED[case.scale or case.dtype])
        assert_close("low", code.d.low, want.low, STORED[case.scale or case.dtype])
        assert_codes(xp, got.d, filled, *how)
    else:
        mu, r, c = dual_scales(wide.reshape(*wide.shape[:2], -1, min(spec.tile, spec.n), case.D))
        tolerance = STORED[case.scale or case.dtype]
        assert_close("mu", code.d.mu, mu[..., 0, :], tolerance)
        assert_close("c", code.d.c, c[..., 0, :], tolerance)
        assert_close("r", code.d.r, r.reshape(code.d.r.shape), tolerance)
        assert_levels(code.d, wide, case)
    rest = wide - decode(Code(code.d, None, None), spec)
    if not isinstance(got.d, Quantized) and case.outliers:
        index = find_outliers(rest, spec.role, case.outliers)
    if code.l is not None:
        seed = case.options["seed"]
        c0 = start(seed, spec.role, case.H, case.D, case.rank)
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


def check_quickly() -> None:
    """A few cases that reach every line of the shaders."""
    with on_metal():
        for case in (
            Case(B=2, H=3, n=70, group=35, outliers=0.1),
            Case("float32", 4, "v", "kcvt", B=2, H=3, n=20, D=48, rank=3, outliers=0.1),
            Case("float32", 8, "k", "token", n=37, D=48, group=16, rank=0, outliers=0.1),
            Case("float32", 4, "k", B=2, H=3, n=20, D=80, scales="dual"),
            Case("float32", 8, "k", n=60, D=48, tile=20, scales="dual"),
            Case("float32", 2, "k", n=40, D=48, scales="dual", outliers=0.1),
            Case("float32", 2, "v", n=20, D=48, scales="dual"),
        ):
            check(case)
        check_constant()


def check_constant() -> None:
    """A block whose groups are constant leaves nothing, to which nothing is fitted."""
    from kvc.backends.mlx import ops as xp

    for scales in ("", "dual"):
        case = Case(rank=3, scales=scales)
        x = block(case) * 0 + 2
        code = encode(x, case.spec, **case.options)
        assert (exact(xp, decode(code, case.spec)) == 2).all()
        with mode("reference"):
            alike = encode(x, case.spec, **case.options)
        assert bool(xp.all(code.d.codes == alike.d.codes))


def test_a_constant_block_is_itself(metal: None) -> None:
    check_constant()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 4])
def test_two_sided_codes_are_the_definition_s(metal: None, role: Any, bits: int) -> None:
    from kvc.backends.mlx import ops as xp

    case = Case("float32", bits, role, n=128, D=80, rank=0, **GEAR2)
    got = encode(block(case), case.spec, **case.options)
    with mode("reference"):
        want = encode(exact(xp, block(case)), case.spec, **case.options)
    if bits == 4:
        assert_rounded(xp, "step", got.d.step, want.d.step, 1e-4)
    code = map_code(lambda y: xp.to_numpy(y) if y is got.d.codes else exact(xp, y), got)
    found, expected = (decode(c, case.spec) for c in (code, want))
    flipped = np.abs(found - expected) > 1e-3 * np.abs(expected).max()
    assert flipped.mean() < 1e-3  # ties alone


@pytest.mark.parametrize("role", ["k", "v"])
def test_a_byte_is_moved_once(sim: Any, role: Any) -> None:
    from kvc.backends.mlx import ops as xp

    case = Case(role=role, n=1024, D=128, group=64, rank=4, outliers=0.02)
    x = block(case)
    code = encode(x, case.spec, **case.options)
    sweep, left = sim.launches
    index = 2 * code.s.index.nbytes  # in 32 bits
    means = 4 * code.s.index.size // code.s.index.shape[-1]
    least = x.nbytes + 2 * x.nbytes + sum(y.nbytes for y in code.d) + index + means
    assert sweep.loaded + sweep.stored <= 1.10 * least
    assert left.loaded + left.stored <= 0.5 * sum(x.nbytes for x in (x, *code.d)) + 4 * index
    assert sweep.threadgroup_bytes <= 24 * 1024
    assert xp.dtype_name(code.s.index) == "int16"


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (Case(D=128, group=64, outliers=0.02), 2),  # no outliers among 64 tokens
        (Case(role="v", D=128, group=64, outliers=0.02), 3),
        (Case(n=128, D=128, bits=4, **GEAR2), 2),
        (Case(n=128, D=128, role="v", **GEAR2), 2),
        (Case(rank=0), 1),
    ],
    ids=lambda x: x.id if isinstance(x, Case) else "",
)
def test_a_block_of_decoding_takes_few_launches(sim: Any, case: Case, launches: int) -> None:
    x = block(case)
    code = encode(x, case.spec, **case.options)
    assert len(sim.launches) == launches
    for launch in sim.launches[:2]:  # the last one only looks at outliers
        least = launch.inputs_bytes + launch.outputs_bytes
        assert launch.loaded + launch.stored <= 1.10 * least
        assert launch.threadgroup_bytes <= 24 * 1024
    assert len(list(arrays(code))) >= 3


def test_what_it_does_not_take(metal: None) -> None:
    case = Case()
    x = block(case)
    assert "one token" in str(
        why_no_kernel("encode", "mlx", x[:, :, :0], case.spec, **case.options)
    )
    odd = replace(case, n=1998, group=999)
    assert "got 999" in str(why_no_kernel("encode", "mlx", block(odd), odd.spec, **odd.options))
