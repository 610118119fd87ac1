"""MiniCache's merge in one pass: a program reads some pairs of vectors and writes their merger."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels.launch import Traffic, Variant, off_device, off_types
from kvc.ops.merge import EPS_ANGLE, EPS_ANTIPODAL, Granularity, How, Merged

ENTRIES = 4096  # of each layer that a program takes
WIDEST = 16384  # numbers of a vector
HOW = get_args(How)


@triton.jit
def arctan2(y, x):
    """The angle of (x, y) for x, y >= 0, within 2e-7 of it; 0 at the origin."""
    top, bottom = tl.minimum(x, y), tl.maximum(x, y)
    z = top / tl.where(bottom > 0, bottom, 1.0)
    # arctan z = pi / 4 + arctan((z - 1) / (z + 1)), and below tan(pi / 8) a polynomial
    large = z > 0.41421356
    z = tl.where(large, (z - 1) / (z + 1), z)
    s = z * z
    tail = ((8.05374449538e-2 * s - 1.38776856032e-1) * s + 1.99777106478e-1) * s
    angle = z + z * s * (tail - 3.33329491539e-1) + tl.where(large, 0.7853981633974483, 0.0)
    return tl.where(y > x, 1.5707963267948966 - angle, angle)


@triton.jit
def sine(x):
    """Sin x for x in 0 to pi, within 1e-7."""
    x = tl.minimum(x, (3.1415927410125732 - x) - 8.742277657347586e-08)
    s = x * x
    tail = ((-2.5052108e-8 * s + 2.7557319e-6) * s - 1.9841270e-4) * s + 8.3333333e-3
    return x + x * s * (tail * s - 0.16666667)


@triton.jit
def length(x):
    """The norms [ROWS, 1] of vectors."""
    return tl.sqrt(tl.sum(x * x, 1, keep_dims=True))


@triton.jit(do_not_specialize=["n"])
def merge(
    xa, xb, e, norm_a, norm_b, angle, a_batch, a_head, a_token, b_batch, b_head, b_token,
    t, n, H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HOW: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """ROWS tokens' vectors of W numbers: a head's D, or all H D of a token.

    xa, xb [B, H, n, D] of strides batch, head, token, 1; e [B, H, n, D]; norms, angle [B, G, n],
    G = H D / W
    """
    G: tl.constexpr = H * D // W
    b, plane = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    there = (row < n) & (i < W)
    h, d = plane + i // D, i % D
    a = tl.load(
        xa + b * a_batch + h * a_head + row * a_token + d, mask=there, other=0.0
    ).to(tl.float32)  # fmt: skip
    b_ = tl.load(
        xb + b * b_batch + h * b_head + row * b_token + d, mask=there, other=0.0
    ).to(tl.float32)  # fmt: skip
    of_a, of_b = length(a), length(b_)
    no_a, no_b = of_a == 0, of_b == 0
    ua, ub = a / tl.where(no_a, 1.0, of_a), b_ / tl.where(no_b, 1.0, of_b)
    # a zero vector takes the other's direction; two of them the first axis
    ua = tl.where(no_a, tl.where(no_b, tl.where(i == 0, 1.0, 0.0), ub), ua)
    ub = tl.where(no_b, ua, ub)
    w = 2 * arctan2(length(ua - ub), length(ua + ub))
    if HOW == "mean":
        merged = (a + b_) / 2
        of_a, of_b = tl.full([ROWS, 1], 1.0, tl.float32), tl.full([ROWS, 1], 1.0, tl.float32)
    elif HOW == "max-norm":
        merged = tl.where(of_a > of_b, ua, ub)
    else:  # sin((1 - t) w) ua + sin(t w) ub, and what it is divided by, sin w, is in its length
        near, far = w < EPS, w > FAR
        share_a = tl.where(near, 1 - t, tl.where(far, 0.0, sine((1 - t) * w)))
        share_b = tl.where(near, t, tl.where(far, 1.0, sine(t * w)))
        merged = share_a * ua + share_b * ub
        size = length(merged)
        merged = merged / tl.where(size > 0, size, 1.0)
    tl.store(e + ((b * H + h) * n + row) * D + d, merged, mask=there)
    to = (b * G + plane) * n + row
    tl.store(norm_a + to, of_a, mask=row < n)
    tl.store(norm_b + to, of_b, mask=row < n)
    tl.store(angle + to, w, mask=row < n)


def why_not(
    xa: torch.Tensor,
    xb: torch.Tensor,
    t: float,
    how: How = "slerp",
    granularity: Granularity = "head",
) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    reason = off_device(xa, xb) or off_types(xa, xb)
    _, H, _, D = xa.shape
    if reason is None and granularity == "token" and H * D > WIDEST:
        reason = f"takes tokens of up to {WIDEST} numbers, not {H * D}"
    if reason is None and not 0 <= t <= 1:
        reason = f"takes a t in 0 to 1, not {t}"
    if reason is None and (how not in HOW or granularity not in get_args(Granularity)):
        reason = f"knows no {how} by {granularity}"  # the definition says what there is
    return reason


def run(
    xa: torch.Tensor,
    xb: torch.Tensor,
    t: float,
    how: How = "slerp",
    granularity: Granularity = "head",
) -> Merged:
    """The vectors of `merge_pair`, from the kernel."""
    B, H, n, D = xa.shape
    W = D if granularity == "head" else H * D
    xa, xb = (x if x.stride(3) == 1 else x.contiguous() for x in (xa, xb))
    e = xa.new_empty(xa.shape, dtype=torch.float32)
    norm_a, norm_b, angle = (
        xa.new_empty((B, H * D // W, n), dtype=torch.float32) for _ in range(3)
    )
    flags = constants(H, D, W, how)
    if n:
        merge[(triton.cdiv(n, flags["ROWS"]), B * H * D // W)](
            xa, xb, e, norm_a, norm_b, angle, *xa.stride()[:3], *xb.stride()[:3], float(t), n,
            **flags, num_warps=warps(flags),
        )  # fmt: skip
    return Merged(e, norm_a, norm_b, angle)


def constants(H: int, D: int, W: int, how: str) -> dict[str, Any]:
    """What `merge` is compiled for."""
    width = triton.next_power_of_2(W)
    return {
        "H": H, "D": D, "W": W, "HOW": how, "ROWS": max(1, ENTRIES // width), "WIDTH": width,
        "EPS": EPS_ANGLE, "FAR": math.pi - EPS_ANTIPODAL,
    }  # fmt: skip


def warps(flags: dict[str, Any]) -> int:
    """Warps of a program: 16 entries of each layer for each thread."""
    return min(16, int(flags["ROWS"] * flags["WIDTH"] // 512))


def traffic(
    B: int, H: int, n: int, D: int, size: int, granularity: Granularity = "head"
) -> Traffic:
    """Both layers' vectors once, of `size` bytes a number, and what is made of them."""
    G = H if granularity == "head" else 1
    least = 2 * B * H * n * D * size + 4 * B * n * (H * D + 3 * G)
    return Traffic(least, least)


def variants() -> Iterator[Variant]:
    """All kinds, heads and whole tokens."""
    for name, H, D, W in (("head", 8, 128, 128), ("head", 4, 256, 256), ("token", 40, 128, 5120)):
        for how in HOW:
            for dtype in ("bf16", "fp32"):
                strides = [f"{x}_{axis}" for x in "ab" for axis in ("batch", "head", "token")]
                flags = constants(H, D, W, how)
                yield Variant(
                    f"{how}-{name}-{W}-{dtype}",
                    merge,
                    {
                        "xa": f"*{dtype}:16",
                        "xb": f"*{dtype}:16",
                        **dict.fromkeys(("e", "norm_a", "norm_b", "angle"), "*fp32:16"),
                        **dict.fromkeys(strides, "i32:16"),
                        "t": "fp32",
                        "n": "i32",
                    },
                    flags,
                    warps(flags),
                    3,
                )
