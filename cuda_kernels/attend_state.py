"""The answer of LESS's state in one launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels.launch import (
    Traffic,
    Variant,
    off_device,
    off_shape,
    off_types,
    product_type,
)
from kvc.ops.attention import Partial
from kvc.ops.evict import Kernels

FEATURES = 64  # of a query, at most
ROWS = 16  # that share a read of the maps
TILES = {2: 8192, 4: 4096}  # numbers of A1 taken at a time, by bytes of a number in products
WARPS = 8
STAGES = 3  # tiles on their way at a time


class Plan(NamedTuple):
    """How a launch is shared out."""

    batch: int  # batch rows of a program
    rows: int  # their queries, and padding
    programs: int  # for each query head
    tile: int  # hidden features at a time


@triton.jit
def gelu(x):
    """The exact one: x (1 + erf(x / sqrt(2))) / 2."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def product(x, y):
    """X Y in float32; of one row as a sum, since products of matrices have 16."""
    if x.shape[0] == 1:
        z = tl.sum(tl.trans(x).to(tl.float32) * y.to(tl.float32), 0)[None, :]
    else:
        z = tl.dot(x, y, input_precision="ieee")
    return z


@triton.jit(do_not_specialize=["B"])
def attend_state_kernel(
    q, a1, a2, state, norm, out, lse,
    q_b, q_h, q_l, state_b, state_h, state_r, norm_b, norm_h, norm_r, B, Hq,
    G: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """phi(q) Hs / rho and log rho, rho = phi(q) z, phi(q) = |gelu(gelu(q A1) A2)|.

    A program has a query head and the L queries of BATCH batch rows, which share a read of its
    maps: most of the bytes are A1. q [B, Hq, L, D], state [B, H, R, D], norm [B, H, R]: strides as
    named, D contiguous; a1 [Hq, D, M], a2 [Hq, M, R], out [B, Hq, L, D], lse [B, Hq, L],
    contiguous. DP and RP are D and R or the next power of two.
    """
    head = tl.program_id(0)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    r = tl.arange(0, RP)
    b = (tl.program_id(1) * BATCH + row // L).to(tl.int64)
    query = row % L
    mine = (row < BATCH * L) & (b < B)
    numbers = mine[:, None] & (d < D)[None, :]
    x = tl.load(
        q + (b * q_b + head * q_h + query * q_l)[:, None] + d[None, :], mask=numbers, other=0.0
    ).to(PRODUCT)
    a1 += head.to(tl.int64) * D * M
    a2 += head.to(tl.int64) * M * R
    hidden = tl.zeros([ROWS, RP], tl.float32)  # gelu(q A1) A2
    for start in tl.range(0, M, TILE, num_stages=STAGES):
        m = start + tl.arange(0, TILE)
        inside = (d < D)[:, None] & (m < M)[None, :]
        first = tl.load(a1 + d[:, None] * M + m[None, :], mask=inside, other=0.0)
        inside = (m < M)[:, None] & (r < R)[None, :]
        second = tl.load(a2 + m[:, None] * R + r[None, :], mask=inside, other=0.0)
        hidden += product(gelu(product(x, first.to(PRODUCT))), second.to(tl.float32))
    features = tl.abs(gelu(hidden))

    h = (head // G).to(tl.int64)
    there = mine[:, None] & (r < R)[None, :]
    z = tl.load(norm + (b * norm_b + h * norm_h)[:, None] + r[None, :] * norm_r, there, other=0.0)
    rho = tl.sum(features * z.to(tl.float32), 1)
    state += h * state_h
    if ROWS == 1:
        inside = (r < R)[:, None] & (d < D)[None, :]
        some = state + tl.program_id(1).to(tl.int64) * state_b
        sums = product(features, tl.load(some + r[:, None] * state_r + d[None, :], inside, 0.0))
    else:  # every batch row has a state of its own
        sums = tl.zeros([ROWS, DP], tl.float32)
        for i in tl.range(0, R, num_stages=STAGES):
            feature = tl.sum(tl.where(r[None, :] == i, features, 0.0), 1)
            value = tl.load(state + (b * state_b)[:, None] + d[None, :], numbers, other=0.0)
            sums += feature[:, None] * value.to(tl.float32)
            state += state_r

    some = rho > 0
    safe = tl.where(some, rho, 1.0)
    answer = tl.where(some[:, None], sums / safe[:, None], 0.0)
    at = (b * Hq + head) * L + query
    tl.store(out + at[:, None] * D + d[None, :], answer, mask=numbers)
    tl.store(lse + at, tl.where(some, tl.log(safe), float("-inf")), mask=mine)


def why_not(
    q: torch.Tensor, state: torch.Tensor, norm: torch.Tensor, kernels: Kernels
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    R = state.shape[2]
    if R > FEATURES:
        return f"takes up to {FEATURES} features, not {R}"
    return (
        off_device(q, state, norm, kernels.a1, kernels.a2)
        or off_types(q, state, norm, kernels.a1, kernels.a2)
        or off_shape(q, state.shape[1])
    )


def run(q: torch.Tensor, state: torch.Tensor, norm: torch.Tensor, kernels: Kernels) -> Partial:
    """As `kvc.ops.evict.attend_state`."""
    B, Hq, L, D = q.shape
    M, R = kernels.a2.shape[1:]
    q, state = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, state))
    itemsize = max(q.element_size(), kernels.a1.element_size())
    batch, rows, programs, tile = plan(B, L, D, M, itemsize)
    out = q.new_empty((B, Hq, L, D), dtype=torch.float32)
    lse = q.new_empty((B, Hq, L), dtype=torch.float32)
    attend_state_kernel[(Hq, programs)](
        q, kernels.a1.contiguous(), kernels.a2.contiguous(), state, norm, out, lse,
        *q.stride()[:3], *state.stride()[:3], *norm.stride(), B, Hq,
        G=Hq // state.shape[1], L=L, D=D, DP=triton.next_power_of_2(D), M=M, R=R,
        RP=max(16, triton.next_power_of_2(R)), BATCH=batch, ROWS=rows, TILE=tile,
        STAGES=STAGES, PRODUCT=product_type(q.dtype, kernels.a1.dtype), num_warps=WARPS,
    )  # fmt: skip
    return Partial(out, lse)


def plan(B: int, L: int, D: int, M: int, itemsize: int) -> Plan:
    """The launch for B rows of L queries; `itemsize` is that of numbers in products."""
    batch = max(1, min(B, ROWS // L))
    rows = 1 if batch * L == 1 else max(16, triton.next_power_of_2(batch * L))
    tile = TILES[itemsize] // max(64, triton.next_power_of_2(D))
    return Plan(batch, rows, -(-B // batch), max(16, min(tile, triton.next_power_of_2(M))))


def traffic(
    B: int, Hq: int, H: int, L: int, D: int, M: int, R: int, itemsize: int, maps: int
) -> Traffic:
    """Bytes of a call; the state is read for every query head, which caches may serve.

    Args:
        B: Rows of the batch.
        Hq: Query heads.
        H: Heads of K and V.
        L: Queries.
        D: The head_dim.
        M: Hidden features.
        R: Features.
        itemsize: Bytes of a number of q.
        maps: Bytes of a number of the maps; the state is float32.
    """
    programs = plan(B, L, D, M, max(itemsize, maps)).programs
    read = Hq * (D * M + M * R) * maps
    states = B * R * (D + 1) * 4
    others = B * Hq * L * (D * itemsize + (D + 1) * 4)
    return Traffic(programs * read + Hq * states + others, read + H * states + others)


def variants() -> Iterator[Variant]:
    """One query, and as many as share a read of the maps, for every width."""
    types = {2: ("*bf16:16", tl.bfloat16), 4: ("*fp32:16", tl.float32)}
    for itemsize, (maps, product_of) in types.items():
        for D in (64, 128, 256):
            for B in (1, ROWS):
                M, R = 512, 8
                batch, rows, _, tile = plan(B, 1, D, M, itemsize)
                strides = [f"{x}_{axis}" for x in ("state", "norm") for axis in "bhr"]
                strides.remove("norm_r")
                yield Variant(
                    f"{itemsize}bytes-D{D}-rows{rows}",
                    attend_state_kernel,
                    {
                        **dict.fromkeys(("q", "a1", "a2"), maps),
                        **dict.fromkeys(("state", "norm", "out", "lse"), "*fp32:16"),
                        **dict.fromkeys((*strides, "q_b", "q_h", "q_l"), "i32:16"),
                        **dict.fromkeys(("B", "Hq"), "i32"),
                    },
                    {
                        "G": 4,
                        "L": 1,
                        "D": D,
                        "DP": D,
                        "M": M,
                        "R": R,
                        "RP": 16,
                        "BATCH": batch,
                        "ROWS": rows,
                        "TILE": tile,
                        "STAGES": STAGES,
                        "PRODUCT": product_of,
                        "norm_r": 1,
                    },
                    WARPS,
                    STAGES,
                )
