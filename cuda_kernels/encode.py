"""A block as D + L + S, in few launches.

One finds outliers, one makes codes and what they leave, one fits that where the block is short, and
one takes what the outliers add.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvc.cuda_kernels import encode_dual, encode_low_rank, encode_outliers, quantize
from kvc.cuda_kernels.encode_dual import code_dual, rotated
from kvc.cuda_kernels.encode_low_rank import fit
from kvc.cuda_kernels.encode_outliers import find, take
from kvc.cuda_kernels.launch import Variant, off_device, off_types
from kvc.ops.codec import Code, Spec
from kvc.ops.quant import Quantized
from kvc.ops.residual import Seed, clear

RANK = 64  # of a fit


def why_not(
    x: torch.Tensor,
    spec: Spec,
    *,
    rank: int,
    outliers: float,
    n_iter: int,
    seed: Seed,
) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    reason = off_device(x) or off_types(x)
    if reason is None and spec.head_dim % 16:
        reason = f"takes a head_dim that is a multiple of 16, not {spec.head_dim}"
    if reason is None and min(rank, spec.n, spec.head_dim) > RANK:
        reason = f"takes a rank of up to {RANK}, not {rank}"
    if reason is None and spec.scales != "dual":
        reason = quantize.why_not(
            x, spec.bits, spec.role, spec.backbone, spec.group_size, *_dtypes(x, spec)
        )
    return reason


def run(
    x: torch.Tensor,
    spec: Spec,
    *,
    rank: int,
    outliers: float,
    n_iter: int,
    seed: Seed,
) -> Code:
    """The code of `encode`, from kernels."""
    x = x if x.stride(3) == 1 else x.contiguous()
    dtype, role, r = x.dtype, spec.role, min(rank, spec.n, spec.head_dim)
    scale, zero = _dtypes(x, spec)
    if spec.scales == "dual":
        d, left = code_dual(x, spec, scale, zero)
        found = find(left, role, outliers)
        code, rest = Code(d, None, None), left if r else None
        if found is not None and r:  # outliers are S's: they do not bend the fit
            rest = clear(left, _places(found.index), role)
    else:
        left = rotated(x) if spec.rotate else x
        found = find(left, role, outliers)
        of, mean = (None, None) if found is None else (found.bounds, found.mean)
        coded, rest = quantize.code_block(
            left, spec.bits, role, spec.backbone, spec.group_size, scale, zero,
            bounds=of, mean=mean, fit=bool(r),
        )  # fmt: skip
        code = Code(coded, None, None)
    if r and rest is not None:
        code = code._replace(l=fit(rest.contiguous(), r, n_iter, role, seed, dtype))
    if found is None:
        return code
    plain = code.d if isinstance(code.d, Quantized) else None
    return code._replace(
        s=take(left, found.index, role, dtype, plain, *_shared(spec), spec.bits, code.l)
    )


def _dtypes(x: torch.Tensor, spec: Spec) -> tuple[torch.dtype, torch.dtype]:
    """Of step and of low."""
    scale = getattr(torch, spec.scale_dtype) if spec.scale_dtype else x.dtype
    zero = getattr(torch, spec.zero_dtype) if spec.zero_dtype else x.dtype
    return scale, zero


def _places(index: torch.Tensor) -> torch.Tensor:
    """Places that may be the low 16 bits, as an index of PyTorch."""
    return index.long() & 0xFFFF if index.dtype == torch.int16 else index.long()


def _shared(spec: Spec) -> tuple[int, int]:
    """How many tokens and channels share a step."""
    if spec.role == "k" and spec.backbone != "token":
        return (spec.n if spec.backbone == "kcvt" else spec.group_size), 1
    return 1, spec.head_dim if spec.backbone == "kcvt" else spec.group_size


def variants() -> Iterator[Variant]:
    """Those of outliers, of the fit and of dual scales; the codes' are with `quantize`."""
    for module in (encode_outliers, encode_low_rank, encode_dual):
        yield from module.variants()
