"""A Metal kernel in one call, for tests of the simulator itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx


def compute(
    source: str,
    inputs: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: mx.Dtype = mx.float32,
    *,
    threads: int | tuple[int, int, int] = 64,
    threadgroup: int | tuple[int, int, int] = 64,
    template: Mapping[str, Any] | None = None,
    header: str = "",
    name: str = "test",
    init_value: float | None = None,
    **options: Any,
) -> mx.array:
    """The output `out` of a kernel with this body, run with `mx.fast.metal_kernel` as it is now."""
    kernel = mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=["out"],
        source=source,
        header=header,
        **{"ensure_row_contiguous": False, **options},
    )
    return kernel(
        inputs=list(inputs.values()),
        template=list((template or {}).items()),
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=(threads, 1, 1) if isinstance(threads, int) else threads,
        threadgroup=(threadgroup, 1, 1) if isinstance(threadgroup, int) else threadgroup,
        init_value=init_value,
    )[0]
