"""A block as codes, a low-rank fit and outliers, in a few launches.

One sweep over the block gives its codes and what they leave of it, to which A C^T is fitted; the
outliers are looked at once more. MLX's own ops sort, rotate, and fit long blocks.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from kvc.metal_kernels import encode_dual, encode_fit, quantize
from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.codec import Code, Spec, decode, turn
from kvc.ops.quant import Quantized
from kvc.ops.residual import Outliers, Seed, clear, find_outliers, start, take_rows


def why_not(
    x: mx.array,
    spec: Spec,
    *,
    rank: int,
    outliers: float,
    n_iter: int,
    seed: Seed,
) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    if x.dtype not in DTYPES:
        return "takes float16, bfloat16 and float32"
    if not x.size:
        return "takes at least one token"
    if spec.scales == "dual":
        return None
    wide = mx.float32 if spec.rotate else x.dtype
    return quantize.unfit(x.shape, wide.size, spec.bits, spec.role, spec.backbone, spec.group_size)


def run(
    x: mx.array,
    spec: Spec,
    *,
    rank: int,
    outliers: float,
    n_iter: int,
    seed: Seed,
) -> Code:
    """The code of `encode`, from the kernels."""
    turned = turn(x, spec)
    scale = getattr(mx, spec.scale_dtype) if spec.scale_dtype else x.dtype
    zero = getattr(mx, spec.zero_dtype) if spec.zero_dtype else x.dtype
    r = min(rank, spec.n, spec.head_dim)
    d: Any
    if spec.scales == "dual":
        d, rest = encode_dual.run(turned, spec, scale, zero, fit=r > 0 or outliers > 0)
        index = find_outliers(rest, spec.role, outliers) if outliers else None
        if index is not None:
            rest = clear(rest, index, spec.role)  # outliers are S's: they do not bend the fit
    else:
        index = find_outliers(turned, spec.role, outliers)
        axes = (2,) if spec.role == "k" else (1, 3)
        mean = None if index is None else mx.mean(turned.astype(mx.float32), axes)
        d, rest = quantize.sweep(
            turned, spec.bits, spec.role, spec.backbone, spec.group_size, scale, zero,
            index=index, mean=mean, fit=r > 0,
        )  # fmt: skip
    code = Code(d, None, None)
    if r:
        c0 = start(seed, spec.role, x.shape[1], spec.head_dim, r)
        fit = encode_fit.run(rest, mx.array(c0.astype("float32")), n_iter, x.dtype)
        code = code._replace(l=fit)
    if index is None:
        return code
    if isinstance(d, Quantized):
        return code._replace(s=left(turned, spec, code, index, x.dtype))
    wide = turned.astype(mx.float32)
    return code._replace(s=take_rows(wide - decode(code, spec), index, spec.role, x.dtype))


def left(x: mx.array, spec: Spec, code: Code, index: mx.array, dtype: mx.Dtype) -> Outliers:
    """What D + L leave of the outliers at `index`, in `dtype`.

    Shapes: x [B, H, n, D]; index keys [B, H, D, m], values [B, n, m]; both results are alike.
    """
    along, width, group = quantize.layout(x.shape, spec.role, spec.backbone, spec.group_size)
    row = spec.n if spec.role == "k" else x.shape[1] * x.shape[3]
    low_rank = code.l._asdict() if code.l is not None else {}
    places, delta = launch(
        "encode",
        {"x": x, **code.d._asdict(), "index": index, **low_rank, "width": width, "group": group},
        {
            "places": (index.shape, mx.int16 if row <= 2**16 else mx.int32),
            "delta": (index.shape, dtype),
        },
        template={
            "O": dtype, "P": mx.int16 if row <= 2**16 else mx.int32, "BITS": spec.bits,
            "KEYS": spec.role == "k", "ALONG": along,
        },
        grid=(index.size, 1, 1),
        threadgroup=(256, 1, 1),
        include=("tokens",),
    )  # fmt: skip
    return Outliers(places, delta)
