"""Attention over tokens as they came: few in one launch, many split over the GPU and joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels import join
from kvc.cuda_kernels.attend_dense_kernel import attend_dense_kernel
from kvc.cuda_kernels.launch import (
    TYPES,
    Config,
    Traffic,
    Variant,
    capability,
    newest,
    off_device,
    off_shape,
    off_types,
    product_type,
    span,
    type_name,
)
from kvc.ops.attention import Partial

SHORT = 512  # tokens up to which nothing is split
LEAST = 256  # tokens of a split
PARTS = 4  # stacks of answers that are joined in the same launch
PAIRS = 16  # answers that a program reads at a time

# By compute capability, then by bytes of a number and width of a token (a power of two): the most
# rows that share a read of K and V, and how the kernel is compiled for up to 16 of them.
TABLE: dict[int, dict[tuple[int, int], tuple[int, Config]]] = {
    80: {
        (2, 64): (64, Config(64, 4, 3)),
        (2, 128): (64, Config(32, 4, 3)),
        (2, 256): (32, Config(32, 4, 2)),
        (4, 64): (16, Config(32, 4, 2)),
        (4, 128): (16, Config(16, 4, 3)),
        (4, 256): (16, Config(16, 4, 2)),
    },
}
MANY = 8  # warps for more rows, and for joins: they need more registers


class Plan(NamedTuple):
    """How a launch is shared out and compiled."""

    rows: int  # (query head, query) that a program has of a head of K and V; padding is behind them
    tiles: int  # programs that share the rows of a head
    span: int  # tokens of a program
    splits: int
    config: Config


def why_not(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    joined: Sequence[Partial] = (),
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if k.dtype != v.dtype:
        return f"takes K and V of one type, not {type_name(k.dtype)} and {type_name(v.dtype)}"
    if v.shape[-1] != q.shape[-1]:
        return f"takes K and V of one head_dim, not {q.shape[-1]} and {v.shape[-1]}"
    if dtype is not None and dtype not in TYPES:
        return f"gives float16, bfloat16 or float32, not {type_name(dtype)}"
    return (
        off_device(q, k, v, valid, length, sinks)
        or off_types(q, k, v, *([] if sinks is None else [sinks]))
        or off_shape(q, k.shape[1])
        or (join.why_not(joined, sinks=sinks, dtype=dtype) if joined else None)
    )


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    joined: Sequence[Partial] = (),
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Partial:
    """As `kvc.ops.attention.attend_dense`.

    K and V may be views whose last axis is contiguous; they are read where they lie.
    """
    B, Hq, L, D = q.shape
    H, T = k.shape[1], k.shape[2]
    if T == 0:
        nothing = Partial(q.new_zeros(q.shape, dtype=torch.float32), _nowhere(q))
        return join.run(joined or [nothing], sinks=sinks, dtype=dtype)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    joined = list(joined)
    size = max(q.element_size(), k.element_size())
    rows, tiles, tokens, splits, config = plan(
        B * H, Hq // H * L, D, T, size, bool(joined), capability(q)
    )
    if splits == 1 and len(joined) > PARTS:
        joined = [join.run(joined)]
    alone = splits == 1
    outs, lses, counts = join.stacks(joined if alone else [])
    out = q.new_empty((splits, B, Hq, L, D), dtype=dtype if alone and dtype else torch.float32)
    lse = q.new_empty((splits, B, Hq, L), dtype=torch.float32)
    mask = (0, 0, 0)
    if valid is not None:
        valid = valid.expand(B, H, T)
        mask = valid.stride()
    attend_dense_kernel[(B * H * tiles, splits)](
        q, k, v, valid, length, outs, lses, counts, sinks if alone else None, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask,
        T, tokens, H, scale, softcap or 0.0,
        G=Hq // H, L=L, D=D, DP=triton.next_power_of_2(D), ROWS=rows, TILE=config.tile,
        PAIRS=PAIRS, CAUSAL=causal and L > 1, SOFTCAP=bool(softcap),
        PRODUCT=product_type(q.dtype, k.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if alone:
        return Partial(out[0], lse[0])
    return join.run([Partial(out, lse), *joined], sinks=sinks, dtype=dtype)


def _nowhere(q: torch.Tensor) -> torch.Tensor:
    """The lse [B, Hq, L] of queries that see nothing."""
    return q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)


def plan(
    heads: int, share: int, D: int, T: int, itemsize: int, joins: bool, capability: int = 0
) -> Plan:
    """The launch for the `share` rows of each of B * H heads over T tokens.

    Args:
        heads: B * H.
        share: Queries of all query heads of a head.
        D: The head_dim.
        T: Tokens.
        itemsize: Bytes of a number of K and V.
        joins: Whether there are answers to join.
        capability: That of the device.
    """
    most, config = newest(TABLE, capability)[itemsize, max(64, triton.next_power_of_2(D))]
    rows = min(most, max(16, triton.next_power_of_2(share)))
    tiles = -(-share // rows)
    tokens = T if T <= SHORT else span(T, config.tile, heads * tiles, max(LEAST, 64 * share))
    splits = -(-T // tokens)
    if rows > 16 or (joins and splits == 1):
        config = config._replace(num_warps=MANY)
    return Plan(rows, tiles, tokens, splits, config)


def traffic(
    B: int, Hq: int, H: int, L: int, D: int, T: int, itemsize: int,
    *, joined: Sequence[int] = (), valid: bool = False, result: int = 4,
) -> Traffic:  # fmt: skip
    """Bytes of a call, its joins included.

    Args:
        B: Rows of the batch.
        Hq: Query heads.
        H: Heads of K and V.
        L: Queries.
        D: The head_dim.
        T: Tokens.
        itemsize: Bytes of a number of q, K and V.
        joined: How many answers each of the parts stacks that are joined.
        valid: Whether there is a mask for each head.
        result: Bytes of a number of the result.
    """
    _, tiles, _, splits, _ = plan(B * H, Hq // H * L, D, T, itemsize, bool(joined))
    rows, answer = B * Hq * L, (D + 1) * 4
    tokens = B * H * T * (2 * D * itemsize + valid)
    queries = rows * D * itemsize
    written = rows * (D * result + 4)
    others = rows * sum(joined) * answer
    touched = tiles * tokens + splits * queries
    if splits > 1:
        touched += splits * rows * answer
        touched += join.traffic(rows, D, splits + sum(joined), itemsize=result).touched
    else:
        touched += others + written
    return Traffic(touched, tokens + queries + others + written)


def variants() -> Iterator[Variant]:
    """Every row of the table: split, and alone with all that can be joined and masked."""
    for of_device in TABLE.values():
        for (itemsize, D), (most, _) in of_device.items():
            for rows in sorted({16, most}):
                yield _variant(itemsize, D, rows, SHORT)
                yield _variant(itemsize, D, rows, 64 * SHORT)


def _variant(itemsize: int, D: int, rows: int, T: int) -> Variant:
    """The kernel for T tokens and four queries of each query head, `rows` in all."""
    _, _, _, splits, config = plan(1, rows, D, T, itemsize, True)
    alone = splits == 1
    parts = PARTS if alone else 0
    tokens, product = {2: ("*bf16:16", tl.bfloat16), 4: ("*fp32:16", tl.float32)}[itemsize]
    strides = [f"{x}_{axis}" for x in ("k", "v") for axis in "bht"]
    strides += ["q_b", "q_h", "q_l", "valid_b", "valid_h"]
    signature = {
        **dict.fromkeys(("q", "k", "v"), tokens),
        **dict.fromkeys(strides, "i32:16"),
        "outs": ("*fp32:16",) * parts,
        "lses": ("*fp32:16",) * parts,
        "counts": ("i32",) * parts,
        "out": tokens if alone else "*fp32:16",
        "lse": "*fp32:16",
        **dict.fromkeys(("n", "span", "H"), "i32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
        **({"valid": "*i1:16", "length": "*i32:16", "sinks": tokens} if alone else {}),
    }
    constexprs = {
        "G": rows // 4,
        "L": 4,
        "D": D,
        "DP": D,
        "ROWS": rows,
        "TILE": config.tile,
        "PAIRS": PAIRS,
        "CAUSAL": alone,
        "SOFTCAP": alone,
        "PRODUCT": product,
        "valid_t": 1,
        **({} if alone else dict.fromkeys(("valid", "length", "sinks"))),
    }
    name = f"{itemsize}bytes-D{D}-rows{rows}-{'alone' if alone else 'split'}"
    return Variant(
        name, attend_dense_kernel, signature, constexprs, config.num_warps, config.num_stages
    )
