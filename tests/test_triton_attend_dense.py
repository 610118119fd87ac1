"""Triton's `attend_dense` against the definition in float64, and the bytes that it moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.attention import Partial, attend_dense
from kvc.ops.dispatch import mode
from tests.cases import assert_close, exact, view
from tests.cases.attend_dense import CASES, Case, args
from tests.tolerances import PRODUCTS
from tests.triton_device import counted, kernels, marks, on_gpu, tensor

pytestmark = marks()


def compare(case: Case, dtype: str | None = None) -> None:
    """Runs the kernel, and the definition on the same numbers in float64."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import attend_dense as kernel

    inputs = args(case)
    with kernels() as device:
        q, k, v = (tensor(inputs[name], case.dtype, device) for name in "qkv")
        options = {name: inputs[name] for name in ("causal", "softcap")}
        options["valid"] = None
        if inputs["valid"] is not None:
            options["valid"] = ops.from_numpy(inputs["valid"]).to(device)
        options["joined"] = [
            Partial(*(tensor(x, "float32", device) for x in part)) for part in inputs["joined"]
        ]
        options["sinks"] = None
        if inputs["sinks"] is not None:
            options["sinks"] = tensor(inputs["sinks"], "float32", device)
        options["dtype"] = dtype and ops.dtype(dtype)
        assert kernel.why_not(q, k, v, inputs["scale"], **options) is None
        out, lse = kernel.run(q, k, v, inputs["scale"], **options)
    want = attend_dense.define(
        *(exact(ops, x) for x in (q, k, v)),
        **{name: inputs[name] for name in ("scale", "causal", "softcap", "valid", "sinks")},
        joined=[Partial(*(np.asarray(x, np.float64) for x in part)) for part in inputs["joined"]],
    )
    assert ops.dtype_name(out) == (dtype or "float32")
    coarse = max((dtype or "float32", case.dtype), key=lambda x: PRODUCTS[x])
    assert_close("out", exact(ops, out), want.out, PRODUCTS[coarse])
    assert_close("lse", exact(ops, lse), want.lse, PRODUCTS["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attend_dense(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("T", [30, 600])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_returned_in_16_bits(dtype: str, T: int) -> None:
    compare(Case("float32", G=2, T=T, joined=(0, 3), sinks=True), dtype)


@settings(max_examples=15, deadline=None)
@given(
    case=st.builds(
        Case,
        dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
        B=st.integers(1, 2),
        H=st.integers(1, 3),
        G=st.integers(1, 16),
        L=st.integers(1, 8),
        D=st.sampled_from(range(16, 257, 16)),
        T=st.integers(0, 140),
        causal=st.booleans(),
        softcap=st.sampled_from([None, 3.0]),
        valid=st.sampled_from(["all", "heads", "none"]),
        joined=st.sampled_from([(), (0,), (2, 0)]),
        sinks=st.booleans(),
    )
)
def test_any_sizes(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("T", [40, 700])
def test_views_are_read_where_they_lie(T: int) -> None:
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import attend_dense as kernel

    case = Case(B=2, G=2, L=3, T=T, causal=True)
    inputs = args(case)
    with kernels() as device:
        q, k, v = (tensor(inputs[name], case.dtype, device) for name in "qkv")
        inside = [view(ops, inputs[name], case.dtype, 2).to(device) for name in "kv"]
        turned = q.transpose(1, 2).contiguous().transpose(1, 2)
        want = kernel.run(q, k, v, 0.2, causal=True)
        got = kernel.run(turned, *inside, 0.2, causal=True)
    for a, b in zip(got, want, strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "n"), [(90, 0), (90, 3), (90, 90), (700, 4), (700, 299), (700, 700)])
def test_a_length_is_as_good_as_so_many_tokens(T: int, n: int, causal: bool) -> None:
    import torch

    from kvc.backends.torch import ops
    from kvc.cuda_kernels import attend_dense as kernel

    inputs = args(Case(B=2, G=2, L=3, T=T, joined=(0, 2)))
    with kernels() as device:
        q, k, v = (tensor(inputs[name], "float16", device) for name in "qkv")
        joined = [Partial(*(tensor(x, "float32", device) for x in p)) for p in inputs["joined"]]
        length = torch.tensor([n], dtype=torch.int32, device=device)
        options = {"causal": causal, "length": length, "joined": joined}
        assert kernel.why_not(q, k, v, 0.2, **options) is None
        got = kernel.run(q, k, v, 0.2, **options)
    want = attend_dense.define(
        exact(ops, q), exact(ops, k)[:, :, :n], exact(ops, v)[:, :, :n], 0.2, causal=causal,
        joined=[Partial(*(exact(ops, x) for x in part)) for part in joined],
    )  # fmt: skip
    assert_close("out", exact(ops, got.out), want.out, PRODUCTS["float16"])
    assert_close("lse", exact(ops, got.lse), want.lse, PRODUCTS["float32"])


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, G=3, L=2, D=80, T=100, joined=(0, 3), valid="heads"),
        Case("float32", G=4, T=1300, joined=(2,)),
        Case(G=16, L=8, T=65),
        Case(B=2, G=5, T=1100),
    ],
    ids=lambda case: case.id,
)
def test_traffic_is_what_a_launch_moves(case: Case) -> None:
    from kvc.cuda_kernels.attend_dense import traffic

    with counted() as count:
        compare(case)
    itemsize = 4 if case.dtype == "float32" else 2
    joined = [max(1, n) for n in case.joined]
    sizes = (case.B, case.H * case.G, case.H, case.L, case.D, case.T, itemsize)
    told = traffic(*sizes, joined=joined, valid=case.valid != "all")
    assert told.touched == count.touched


@pytest.mark.parametrize("T", [1000, 8192, 32768, 131072])
@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize(("Hq", "H"), [(32, 32), (32, 8), (32, 2)])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_little_more_than_the_tokens_is_moved(Hq: int, H: int, B: int, T: int, D: int) -> None:
    from kvc.cuda_kernels.attend_dense import traffic

    assert traffic(B, Hq, H, 1, D, T, 2, result=2).ratio <= 1.05


def test_programs_fill_a_gpu_at_batch_1() -> None:
    from kvc.cuda_kernels.attend_dense import plan

    for T, least in ((8192, 256), (32768, 512), (131072, 512)):
        made = plan(8, 4, 128, T, 2, True)
        assert 8 * made.tiles * made.splits >= least


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": (1, 4, 9, 64)}, "takes up to 8 queries per step, not 9"),
        ({"q": (1, 34, 1, 64)}, "takes up to 16 query heads per head of K and V, not 17"),
        ({"q": (1, 4, 1, 40)}, "takes a head_dim that is a multiple of 16 up to 256, not 40"),
        ({"dtype": "float64"}, "takes float16, bfloat16 or float32, not float64"),
    ],
)
def test_what_is_not_taken(change: dict[str, Any], why: str) -> None:
    from kvc.cuda_kernels import attend_dense as kernel

    with kernels() as device:
        q = tensor(np.zeros(change.get("q", (1, 4, 1, 64))), change.get("dtype", "float32"), device)
        assert kernel.why_not(q, q[:, :2], q[:, :2], 1.0) == why


def test_a_tensor_on_the_cpu_is_not_taken() -> None:
    import torch

    from kvc.cuda_kernels import attend_dense as kernel

    x = torch.zeros(1, 2, 1, 64)
    assert kernel.why_not(x, x, x, 1.0) == "takes tensors on a CUDA GPU, not on cpu"


def test_the_op_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvc.cuda_kernels

    monkeypatch.setattr(kvc.cuda_kernels, "FUSED", {"attend_dense"})
    with kernels() as device, mode("fused"):
        x = tensor(np.ones((1, 2, 1, 64)), "float32", device)
        assert attend_dense(x, x, x, 1.0).lse.shape == (1, 2, 1)


@pytest.mark.parametrize("T", [20, 600])
def test_rows_of_two_programs(T: int) -> None:
    compare(Case("float32", G=7, L=3, T=T, causal=True, joined=(0, 3), sinks=True))
