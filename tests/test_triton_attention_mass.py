"""Triton's `attention_mass` against the definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvc.ops.attention import attend_dense
from kvc.ops.mass import attention_mass
from tests.cases import assert_close, exact, view
from tests.cases.attention_mass import CASES, Case, args
from tests.tolerances import STORED
from tests.triton_device import counted, kernels, marks, on_gpu, tensor

pytestmark = marks()


def compare(case: Case, of_keys: str = "", lse: bool = False) -> None:
    """Runs the kernels, and the definition in float64."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import attention_mass as kernel

    given = args(case)
    with kernels() as device:
        q = tensor(given["q"], case.dtype, device)
        k = view(ops, given["k"], of_keys or case.dtype, axis=2).to(device)
        valid = given["valid"] if given["valid"] is None else ops.from_numpy(given["valid"])
        valid = valid if valid is None else valid.to(device)
        sinks = None if given["sinks"] is None else tensor(given["sinks"], "float32", device)
        options = {"valid": valid, "softcap": case.softcap, "sinks": sinks}
        if lse:
            options["lse"] = attend_dense.define(
                q, k, k, given["scale"], causal=True, **options
            ).lse
        assert kernel.why_not(q, k, given["scale"], **options) is None
        got = kernel.run(q, k, given["scale"], **options)
    want = attention_mass.define(
        exact(ops, q), exact(ops, k), given["scale"], valid=given["valid"], softcap=case.softcap,
        sinks=given["sinks"],
    )  # fmt: skip
    assert ops.dtype_name(got) == "float32"
    assert_close("mass", exact(ops, got), want, STORED["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention_mass(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("valid", ["all", "heads", "none"])
@pytest.mark.parametrize("L", [1, 20])
def test_an_lse_that_attention_has_found(L: int, valid: Any) -> None:
    compare(Case(B=2, G=3, L=L, T=65, valid=valid, softcap=3.0, sinks=True), lse=True)


@pytest.mark.parametrize("L", [1, 20])
def test_keys_of_another_type(L: int) -> None:
    compare(Case("bfloat16", G=4, L=L, D=128, T=65), "float32")


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
def test_one_query_reads_the_keys_twice() -> None:
    case = Case("float16", G=4, D=128, T=1000)
    with counted() as count:
        compare(case)
    keys, mass = case.H * case.T * case.D * 2, case.H * case.T * 4
    assert 2 * keys + mass <= count.touched <= 1.10 * (2 * keys + mass)


def test_memory_does_not_grow_with_queries_times_keys() -> None:
    import torch

    from kvc.cuda_kernels import attention_mass as kernel

    made = []
    empty = torch.Tensor.new_empty

    def noting(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made.append(empty(self, *args, **kwargs))
        return made[-1]

    given = args(Case(H=1, L=200, T=200))
    with kernels() as device, pytest.MonkeyPatch.context() as patch:
        q, k = (tensor(given[x], "float16", device) for x in ("q", "k"))
        patch.setattr(torch.Tensor, "new_empty", noting)
        kernel.run(q, k, 0.1)
    # the interpreter copies what a launch is given
    assert sum(x.numel() for x in made if x.dtype == torch.float32) <= 20 * 200


def test_what_it_does_not_take() -> None:
    from kvc.cuda_kernels import attention_mass as kernel

    with kernels() as device:
        q = tensor(np.zeros((1, 2, 1, 64)), "float16", device)
        assert "not 60" in str(kernel.why_not(q[..., :60], q[..., :60], 1.0))
        assert "not 272" in str(kernel.why_not(*[q.new_zeros(1, 1, 1, 272)] * 2, 1.0))
        assert "not float64" in str(kernel.why_not(q, q.double(), 1.0))
