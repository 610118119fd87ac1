"""Launches of `attend_coded` without tensors: for checks ahead of time, and of what they move."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvc.cuda_kernels import attend_coded_decoded as decoded
from kvc.cuda_kernels import attend_coded_folded as folded
from kvc.cuda_kernels import attend_coded_form as form
from kvc.cuda_kernels.attend_coded import arguments, kernel, plan
from kvc.cuda_kernels.launch import Variant
from kvc.ops.codec import Code, Spec
from kvc.ops.past import Layout
from kvc.ops.quant import Quantized, n_words
from kvc.ops.residual import LowRank, Outliers
from kvc.ops.scales import GRID_STEP, Dual

TYPES = {
    torch.float16: "*fp16:16",
    torch.bfloat16: "*bf16:16",
    torch.float32: "*fp32:16",
    torch.int16: "*i16:16",
    torch.int32: "*i32:16",
    torch.bool: "*i1:16",
}


@dataclass
class Sample:
    """Blocks of coded tokens of the shapes that `kvc.ops.codec.encode` gives them, and no more."""

    code: Code
    spec: Spec
    n: int

    @classmethod
    def of(
        cls, spec: Spec, B: int, H: int, blocks: int, dtype: Any, rank: int = 0, far: int = 0
    ) -> Sample:
        """With a low-rank fit of `rank`, and `far` outliers in each row."""
        n, D, g, bits = spec.n, spec.head_dim, spec.group_size, spec.bits

        def new(*shape: int, type: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty((blocks, B, *shape), dtype=type, device="meta")

        d: Any
        rows = (D, n_words(n, bits)) if spec.role == "k" else (n, n_words(D, bits))
        codes = new(H, *rows, type=torch.int32)
        if spec.scales:
            channels = [new(H, max(1, n // spec.tile), D) for _ in range(4)]
            mu, c, step, low = channels
            fixed = bits in GRID_STEP
            d = Dual(codes, mu, c, new(H, n), None if fixed else step, None if fixed else low)
        else:
            if spec.backbone == "kcvt":
                groups = (H, 1, 1, D) if spec.role == "k" else (1, n, 1, 1)
            elif spec.backbone == "kivi" and spec.role == "k":
                groups = (H, n // g, 1, D)
            else:
                groups = (H, n, D // g, 1)
            d = Quantized(codes, new(*groups), new(*groups))
        fit = LowRank(new(H, n, rank), new(H, D, rank)) if rank else None
        places = (H, D, far) if spec.role == "k" else (n, far)
        outliers = Outliers(new(*places, type=torch.int16), new(*places)) if far else None
        return cls(Code(d, fit, outliers), spec, blocks)


def layouts(
    backbone: Any, bits: int, n: int, blocks: int, D: int, dtype: torch.dtype,
    *, B: int = 1, H: int = 8, rank: int = 0, far: int = 0, scales: str = "", kept: bool = False,
) -> tuple[Layout, Layout]:  # fmt: skip
    """K and V of one codec, B rows of H heads."""
    found = []
    for role in ("k", "v"):
        spec = Spec(
            "v" if kept else role, bits, backbone, min(64, D), n, D,
            rotate="hadamard" if scales else "", scales=scales,
        )  # fmt: skip
        found.append(Layout(runs=[Sample.of(spec, B, H, blocks, dtype, rank, far)]))
    return found[0], found[1]


def variants() -> Iterator[Variant]:
    """What is folded: widths, bits, long blocks and short ones, and low-rank fits; and the rest."""
    half, full = torch.bfloat16, torch.float32
    for D in (64, 128):
        for bits in (2, 4, 8):
            for n, blocks, rank in ((8192, 1, 0), (8192, 1, 4), (64, 128, 0), (64, 128, 2)):
                pair = layouts("kivi", bits, n, blocks, D, half, rank=rank)
                yield _variant(f"kivi{bits}-D{D}-n{n}-rank{rank}", pair, D, half)
    yield _variant("kcvt4", layouts("kcvt", 4, 8180, 1, 128, half), 128, half)
    yield _variant("kcvt2-short", layouts("kcvt", 2, 20, 400, 128, half), 128, half)
    yield _variant("token4", layouts("token", 4, 8180, 1, 128, half), 128, half)
    pair = layouts("kivi", 4, 8192, 1, 128, half, rank=2)
    yield _variant("kivi4-all", pair, 128, half, more=True)
    for name, dtype in (("bf16", half), ("fp32", full)):
        for bits in (2, 8):
            pair = layouts("kivi", bits, 8192, 1, 128, dtype, rank=4, far=80)
            yield _variant(f"outliers{bits}-{name}", pair, 128, dtype, more=True)
        for bits in (2, 4):
            pair = layouts("kivi", bits, 1024, 1, 128, dtype, rank=2, scales="dual")
            yield _variant(f"dual{bits}-{name}", pair, 128, dtype)
        for D in (128, 256):
            pair = layouts("token", 4, 400, 1, D, dtype, kept=True)
            yield _variant(f"kept4-D{D}-{name}", pair, D, dtype, more=True)
            dense = torch.empty((1, 8, 8192, D), dtype=dtype, device="meta")
            norm = torch.empty((1, 8, 8192), dtype=dtype, device="meta")
            index = torch.empty((1, 80), dtype=torch.int32, device="meta")
            exact = torch.empty((1, 80, D), dtype=dtype, device="meta")
            merged = Layout(dense=dense, norm=norm, index=index, exact=exact)
            yield _variant(f"merged-D{D}-{name}", (merged, merged), D, dtype)
        pair = layouts("kivi", 4, 8192, 1, 256, dtype, rank=4)
        yield _variant(f"kivi4-D256-{name}", pair, 256, dtype, more=True)


def _variant(
    name: str, pair: tuple[Layout, Layout], D: int, dtype: torch.dtype, more: bool = False
) -> Variant:
    """The kernel for four query heads per head; with `more` also a mask, a softcap and a length."""

    def empty(*shape: int, type: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=type, device="meta")

    B, H, _, n, blocks = form.shape(pair[0])
    q = empty(B, 4 * H, 1, D, type=dtype)
    made = plan(q, *pair)
    valid = empty(B, H, n * blocks, type=torch.bool) if more else None
    length = empty(1, type=torch.int32) if more else None
    given = arguments(q, *pair, made, 1.0, 30.0 if more else None, valid, length)
    wide = empty(0, type=torch.float32)
    given |= {"out": wide, "lse": wide}
    if made.folds:
        given["PACKED"] = True
    signature, constants = {}, {}
    function = kernel(made)
    growing = (folded if made.folds else decoded).GROWING
    for argument, p in inspect.signature(function.fn).parameters.items():
        x = given[argument]
        if p.annotation == "tl.constexpr" or x is None:
            constants[argument] = x
        elif isinstance(x, torch.Tensor):
            signature[argument] = TYPES[x.dtype]
        elif isinstance(x, float):
            signature[argument] = "fp32"
        else:
            known = x % 16 == 0 and argument not in growing
            signature[argument] = "i32:16" if known else "i32"
    config = made.config
    return Variant(name, function, signature, constants, config.num_warps, config.num_stages)
