"""Triton's `attend_coded` over the heads of one process, whose outliers of values are of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvc.backends.base import Shard
from kvc.methods import parse
from kvc.ops.attention import Partial, attend_coded, join
from kvc.ops.dispatch import mode
from kvc.ops.quant import Role
from kvc.store.coded import Coded
from tests.cases import array, assert_close
from tests.cases.attend_coded import in_float64
from tests.test_triton_attend_coded import numbers
from tests.tolerances import PRODUCTS
from tests.triton_device import kernels, marks

pytestmark = marks()

H, D, N = 2, 16, 32  # heads of each of two processes


@pytest.mark.parametrize("index", [0, 1])
def test_outliers_of_others_add_nothing(index: int) -> None:
    """Also where one of its own lies on the first or last channel, as theirs then do too."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import attend_coded as kernel

    codec = parse("gear", {"group_size": D, "buffer": N, "outliers": 0.1}).codec
    assert codec is not None
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2 * H, N, D)).astype("f4")
    v[:, H - 1, :, -1], v[:, H, :, 0] = 12, -12  # where the processes' heads meet
    q = rng.standard_normal((1, 2 * H, 1, D)).astype("f4")
    with kernels() as device:

        def coded(role: Role, x: Any) -> Coded:
            whole = array(ops, x, "float16").to(device)
            shard = Shard(index, 2, lambda _: whole)
            found = Coded(codec, role, 0, shard=shard)
            with mode("reference"):
                found.append(shard.own(whole), 2)
            return found

        past_k, past_v = coded("k", k), coded("v", v)
        query = array(ops, q, "float16").to(device)
        assert kernel.why_not(query, past_k, past_v, D**-0.5) is None
        part = Partial(*map(numbers, kernel.run(query, past_k, past_v, D**-0.5)))
    with mode("reference"):
        got = join([part])
        wide = in_float64(past_k, numbers), in_float64(past_v, numbers)
        want = attend_coded(numbers(query), *wide, D**-0.5)
    for name, x in want._asdict().items():
        assert_close(name, getattr(got, name), x, PRODUCTS["float16"])
