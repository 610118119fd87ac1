"""How much attention each key gets, in two launches and without a matrix of probabilities.

The first finds every query's log-sum-exp, if nobody has yet; the second makes each tile of scores
once more and sums its probabilities over the queries. Rows are in the order of time: row l G + g is
query l of query head g of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels.launch import (
    TYPES,
    Traffic,
    Variant,
    off_device,
    off_types,
    product_type,
    span,
)
from kvc.cuda_kernels.softmax import LN2, LOG2E, scores_of, take

KEYS = 64  # of a tile,
MANY = 128  # and of one with few queries, which are read again for each
DEPTH = 32  # channels of float32 that are taken at a time
WIDEST = 128  # and of other types
SHARE = 256  # keys of a program at least, where there are several for the same queries


@triton.jit
def numbers_of(x, at, there, d, D: tl.constexpr, TYPE: tl.constexpr):
    """Channels `d` of the vectors that begin at x + at, a row each."""
    mask = there[:, None] & (d < D)[None, :]
    return tl.load(x + at[:, None] + d[None, :], mask=mask, other=0.0).to(TYPE)


@triton.jit
def tile_of_scores(
    q, at_q, queries, row, k, valid, k_token, valid_token, t, scale, softcap, L, T,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    TYPE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores [ROWS, KEYS] of queries with keys `t`, -inf where they are not seen.

    Query l sees the tokens up to T - L + l. `queries` are those of q + at_q where they are held
    whole, else DEPTH channels are read at a time.
    """
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == TYPE else "tf32"
    at_k = t.to(tl.int64) * k_token
    if DEPTH == WIDTH:
        keys = numbers_of(k, at_k, t < T, tl.arange(0, WIDTH), D, TYPE)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    else:
        products = tl.zeros([row.shape[0], t.shape[0]], tl.float32)
        for start in tl.range(0, D, DEPTH):
            d = start + tl.arange(0, DEPTH)
            some = numbers_of(q, at_q, row < L * G, d, D, TYPE)
            keys = numbers_of(k, at_k, t < T, d, D, TYPE)
            products = tl.dot(some, tl.trans(keys), products, input_precision=PRECISION)
    seen = (t < T)[None, :] & (t[None, :] <= T - L + (row // G)[:, None])
    if valid is not None:
        seen = seen & (tl.load(valid + t * valid_token, mask=t < T, other=0) != 0)[None, :]
    return tl.where(seen, scores_of(products, scale, softcap, SOFTCAP), float("-inf"))


@triton.jit(do_not_specialize=["L", "T", "size"])
def sums(
    q, k, valid, lse, q_batch, q_head, q_token, k_batch, k_head, k_token,
    valid_batch, valid_head, valid_token, scale, softcap, L, T, size,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr, TYPE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Log of the sum of exponentials of ROWS queries over `size` keys.

    q [B, H G, L, D], k [B, H, T, D], valid [B, H or 1, T]; lse [splits, B, H G, L], -inf where
    nothing is seen
    """
    program = tl.program_id(2).to(tl.int64)
    b, h = program // H, program % H
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q += b * q_batch + h * G * q_head
    at_q = (row % G).to(tl.int64) * q_head + (row // G) * q_token
    queries = None
    if DEPTH == WIDTH:
        queries = numbers_of(q, at_q, row < L * G, tl.arange(0, WIDTH), D, TYPE)
    k += b * k_batch + h * k_head
    if valid is not None:
        valid += b * valid_batch + h * valid_head
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * size
    newest = tl.minimum(L, (tl.program_id(0) * ROWS + ROWS - 1) // G + 1)  # of the queries
    for at in tl.range(first, tl.minimum(first + size, T - L + newest), KEYS):
        t = at + tl.arange(0, KEYS)
        scores = tile_of_scores(
            q, at_q, queries, row, k, valid, k_token, valid_token, t, scale, softcap, L, T,
            G, D, WIDTH, DEPTH, TYPE, SOFTCAP,
        )  # fmt: skip
        top, total, _, _ = take(top, total, scores)
    some = total > 0
    found = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    to = (tl.program_id(1) * tl.num_programs(2) + program) * L * G + row % G * L + row // G
    tl.store(lse + to, found * LN2, mask=row < L * G)


@triton.jit(do_not_specialize=["L", "T", "splits"])
def shares(
    q, k, valid, lse, sinks, mass, q_batch, q_head, q_token, k_batch, k_head, k_token,
    valid_batch, valid_head, valid_token, scale, softcap, L, T, splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr, TYPE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Mass [B, H, T] of KEYS keys: exp(logit - lse), summed over the queries that count.

    The lse of a query is that of all splits and of its head's sink.
    """
    program = tl.program_id(1).to(tl.int64)
    b, h = program // H, program % H
    t = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    q += b * q_batch + h * G * q_head
    k += b * k_batch + h * k_head
    if valid is not None:
        valid += b * valid_batch + h * valid_head
    total = tl.zeros([KEYS], tl.float32)
    oldest = tl.maximum(0, tl.program_id(0) * KEYS - (T - L))  # of the queries that see the keys
    for start in tl.range(oldest * G // ROWS * ROWS, L * G, ROWS):
        row = start + tl.arange(0, ROWS)
        at_q = (row % G).to(tl.int64) * q_head + (row // G) * q_token
        queries = None
        if DEPTH == WIDTH:
            queries = numbers_of(q, at_q, row < L * G, tl.arange(0, WIDTH), D, TYPE)
        scores = tile_of_scores(
            q, at_q, queries, row, k, valid, k_token, valid_token, t, scale, softcap, L, T,
            G, D, WIDTH, DEPTH, TYPE, SOFTCAP,
        )  # fmt: skip
        top = tl.full([ROWS], float("-inf"), tl.float32)
        if sinks is not None:
            top = tl.load(sinks + h * G + row % G).to(tl.float32) * LOG2E
        for s in tl.range(0, splits):
            at = (s * tl.num_programs(1) + program) * L * G + row % G * L + row // G
            part = tl.load(lse + at, mask=row < L * G, other=float("-inf")) * LOG2E
            larger = tl.maximum(tl.maximum(top, part), -1e30)  # finite where nothing is seen
            both = tl.exp2(top - larger) + tl.exp2(part - larger)
            top = tl.where(both > 0, larger + tl.log2(tl.where(both > 0, both, 1.0)), top)
        own = T - L + row // G
        counts = (row < L * G) & (top > float("-inf")) & (own >= 0)
        if valid is not None:
            counts = counts & (tl.load(valid + own * valid_token, mask=counts, other=0) != 0)
        p = tl.exp2(scores - tl.where(counts, top, 0.0)[:, None])
        total += tl.sum(tl.where(counts[:, None], p, 0.0), 0)
    tl.store(mass + program * T + t, total, mask=t < T)


def why_not(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    *,
    valid: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    reason = off_device(q, k, valid, sinks, lse)
    reason = reason or off_types(q, k, *(x for x in (sinks, lse) if x is not None))
    D = q.shape[3]
    if reason is None and (D % 16 or not 16 <= D <= 256):
        reason = f"takes a head_dim that is a multiple of 16 up to 256, not {D}"
    return reason


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    *,
    valid: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mass of `attention_mass`, from the kernels."""
    (B, Hq, L, D), (_, H, T, _) = q.shape, k.shape
    G = Hq // H
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    flags = constants(H, G, L, D, product_type(q.dtype, k.dtype), bool(softcap))
    tiles = triton.cdiv(L * G, flags["ROWS"])
    mass = q.new_empty((B, H, T), dtype=torch.float32)
    of_valid = (0, 0, 0)
    if valid is not None:
        head = valid.stride(1) if valid.shape[1] > 1 else 0
        of_valid = (valid.stride(0), head, valid.stride(2))
    where = (*q.stride()[:3], *k.stride()[:3], *of_valid, float(scale), float(softcap or 0), L, T)
    if lse is None:
        size = span(T, flags["KEYS"], B * H * tiles, SHARE)
        splits = triton.cdiv(T, size)
        lse = q.new_empty((splits, B, Hq, L), dtype=torch.float32)
        sums[(tiles, splits, B * H)](
            q, k, valid, lse, *where, size, **flags, num_warps=warps(flags)
        )
    else:
        splits, sinks, lse = 1, None, lse.float().contiguous()  # the sinks are in it
    shares[(triton.cdiv(T, flags["KEYS"]), B * H)](
        q, k, valid, lse, sinks, mass, *where, splits, **flags, num_warps=warps(flags)
    )
    return mass


def constants(H: int, G: int, L: int, D: int, product: tl.dtype, softcap: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    width, few = triton.next_power_of_2(D), G * L <= 16
    return {
        "H": H, "G": G, "D": D, "WIDTH": width, "ROWS": 16 if few else 64,
        "KEYS": MANY if few and product != tl.float32 else KEYS,
        "DEPTH": min(width, DEPTH if product == tl.float32 else WIDEST), "TYPE": product,
        "SOFTCAP": softcap,
    }  # fmt: skip


def warps(flags: dict[str, Any]) -> int:
    """Warps of a program."""
    return 4 if flags["KEYS"] == MANY and flags["WIDTH"] <= 128 else 8


def traffic(
    B: int, Hq: int, H: int, L: int, D: int, T: int, itemsize: int, *, known: bool = True
) -> Traffic:
    """Bytes of a call without a mask and sinks; K and q have numbers of `itemsize` bytes.

    With an lse that is `known` each tile of keys is read for each tile of queries that sees it,
    without one twice.
    """
    G = Hq // H
    flags = constants(H, G, L, D, TYPES[torch.float32 if itemsize == 4 else torch.float16], False)
    rows, keys = flags["ROWS"], flags["KEYS"]
    number, tiles = D * itemsize, triton.cdiv(L * G, rows)
    size = span(T, keys, B * H * tiles, SHARE)
    splits = 1 if known else triton.cdiv(T, size)
    touched = 0
    for first in range(0, T, keys):  # of a program of `shares`
        oldest = max(0, first - (T - L)) * G // rows * rows
        seen = triton.cdiv(L * G - oldest, rows)
        some = min(keys, T - first)
        touched += (L * G - oldest) * (number + 4 * splits) + seen * some * number + 4 * some
    for start in () if known else range(0, L * G, rows):  # of programs of `sums`
        own, newest = min(rows, L * G - start), min(L, (start + rows - 1) // G + 1)
        for first in range(0, T, size):
            last = min(first + size, T - L + newest)
            read = min(max(0, triton.cdiv(last - first, keys)) * keys, T - first)
            whole = flags["DEPTH"] == flags["WIDTH"]
            times = 1 if whole else max(0, triton.cdiv(last - first, keys))
            touched += own * (number * times + 4) + read * number
    lse = 4 * L * G if known else 0
    return Traffic(B * H * touched, B * H * (T * (number + 4) + L * G * number + lse))


def variants() -> Iterator[Variant]:
    """One query, and a prompt's."""
    for D in (64, 128, 256):
        for L in (1, 64):
            for queries, keys, product in (
                ("bf16", "bf16", tl.bfloat16), ("bf16", "fp32", tl.float32)
            ):  # fmt: skip
                flags = constants(8, 4, L, D, product, True)
                strides = [f"{x}_{axis}" for x in "qk" for axis in ("batch", "head", "token")]
                common = {
                    "q": f"*{queries}:16",
                    "k": f"*{keys}:16",
                    "valid": "*i1",
                    "lse": "*fp32:16",
                    **dict.fromkeys(strides, "i32:16"),
                    **dict.fromkeys(("valid_batch", "valid_head", "valid_token"), "i32"),
                    "scale": "fp32",
                    "softcap": "fp32",
                    "L": "i32",
                    "T": "i32",
                }
                name = f"{D}-{'one' if L == 1 else 'many'}-{queries}-{keys}"
                some = {**common, "size": "i32"}
                yield Variant(f"sums-{name}", sums, some, flags, warps(flags), 3)
                more = {"sinks": f"*{queries}:16", "mass": "*fp32:16", "splits": "i32"}
                some = {**common, **more}
                yield Variant(f"shares-{name}", shares, some, flags, warps(flags), 3)
