"""Where the tests of Metal kernels run: on the GPU of a Mac, in the simulator elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ATTENTION = ("attend_dense", "attend_coded", "attend_state", "join")


@contextmanager
def on_metal() -> Iterator[None]:
    """Metal kernels run in the block, and nothing else does; a test is skipped where none can."""
    from tests.conftest import REQUIRED, need

    need("mlx")
    import mlx.core as mx

    from kvc.ops.dispatch import mode
    from tests import metalsim

    if mx.metal.is_available():
        with mode("fused"):
            yield
        return
    if "metal" in REQUIRED:
        pytest.fail("KVC_REQUIRE names metal, and there is no Metal GPU")
    metalsim.need()
    with metalsim.simulate("check"), mode("fused"):
        yield


def op_of(kernel: str) -> str:
    """The op, or the part of one, whose shader a kernel of this name is."""
    return kernel.removeprefix("kvc_").rpartition("_")[0]
