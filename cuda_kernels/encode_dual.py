"""Codes with two-sided scales: a program finds the factors of a tile and codes it.

Also the rotation of channels, which is a product with signs that are made where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels.launch import Variant, product_type
from kvc.cuda_kernels.quantize_kernel import code_of, packed, rounded
from kvc.ops.codec import Spec
from kvc.ops.quant import n_words, pack_tokens
from kvc.ops.scales import EPS, GRID_STEP, ROUNDS, Dual

TILE = 4096  # entries that a program takes at a time,
MOST = 32  # of so many tokens
CHANNELS = 32  # of x that are rotated at a time


@triton.jit
def turned(x, t, there, token, D: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
           TYPE: tl.constexpr):  # fmt: skip
    """X Hd [TOKENS, WIDTH] of rows `t` of x, with Hd[i, j] = (-1)^|i & j| / sqrt(size).

    |.| is the number of ones; size is the largest power of two that divides D, and Hd is zero
    between different blocks of so many channels.
    """
    SIZE: tl.constexpr = D & -D
    # signs are exact in tf32, so that three products of its kind have float32's precision
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == TYPE else "tf32"
    j = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([t.shape[0], WIDTH], tl.float32)
    for first in tl.range(0, D, CHANNELS):
        i = first + tl.arange(0, CHANNELS)
        some = tl.load(x + t * token + i[None, :], mask=there & (i < D)[None, :], other=0.0)
        i = i[:, None]
        ones = i & j & (SIZE - 1)
        for shift in tl.static_range(3, -1, -1):
            ones = ones ^ (ones >> (1 << shift))
        signs = tl.where(i // SIZE == j // SIZE, 1 - 2 * (ones & 1), 0)
        total = tl.dot(some.to(TYPE), signs.to(TYPE), total, input_precision=PRECISION)
    return total * (SIZE**-0.5)


@triton.jit(do_not_specialize=["n"])
def rotate(
    x, out, batch, head, token, n, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """X Hd into out [B, H, n, D]."""
    plane = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    x += plane // H * batch + plane % H * head
    y = turned(x, t, t < n, token, D, WIDTH, CHANNELS, TYPE)
    tl.store(out + (plane * n + t) * D + d, y, mask=(t < n) & (d < D))


@triton.jit(do_not_specialize=["n", "size"])
def scale_tile(
    x, codes, mu, c, r, step, low, y, batch, head, token, n, size,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    BITS: tl.constexpr, GRID: tl.constexpr, KEYS: tl.constexpr, LOOSE: tl.constexpr,
    TURN: tl.constexpr,
    CHANNELS: tl.constexpr, TYPE: tl.constexpr, ROUNDS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Codes of `size` tokens of one head of x [B, H, n, D], which TURN rotates first.

    codes: KEYS [B, H, D, words of n], else [B, H, n, words of D]; LOOSE [B, H, n, D], no words
    r [B, H, n]; mu, c, step, low [B, H, n / size, D], without step and low levels of a fixed GRID
    y [B, H, n, D]: the program's notes, and in the end what the codes leave of x

    It reads TOKENS at a time from y, which its caches hold, once for each round.
    """
    PER: tl.constexpr = 32 // BITS
    TOP: tl.constexpr = (1 << BITS) - 1
    tile, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, d = tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDTH)[None, :]
    x += plane // H * batch + plane % H * head
    x, y, r = (
        x + tile * size * token,
        y + (plane * n + tile * size) * D,
        r + plane * n + tile * size,
    )

    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for at in tl.range(0, size, TOKENS):
        t = at + i
        there = (t < size) & (d < D)
        if TURN:
            value = turned(x, t, t < size, token, D, WIDTH, CHANNELS, TYPE)
        else:
            value = tl.load(x + t * token + d, mask=there, other=0.0).to(tl.float32)
        tl.store(y + t * D + d, value, mask=there)
        total += tl.where(there, value, 0.0)
    tl.debug_barrier()  # from here on each thread reads what others have written
    mean = tl.sum(total, 0, keep_dims=True) / size
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for at in tl.range(0, size, TOKENS):
        there = (at + i < size) & (d < D)
        value = tl.load(y + (at + i) * D + d, mask=there, other=0.0)
        total += tl.where(there, value - mean, 0.0)
    mean += tl.sum(total, 0, keep_dims=True) / size

    # c = std_t(y / r), r = std_d(y / c), where y = x - mu; in the first round r = 1
    of_channel = tl.full([1, WIDTH], 1.0, tl.float32)
    for k in tl.range(0, ROUNDS):
        total = tl.zeros([TOKENS, WIDTH], tl.float32)
        squares = tl.zeros([TOKENS, WIDTH], tl.float32)
        for at in tl.range(0, size, TOKENS):
            there = (at + i < size) & (d < D)
            value = tl.load(y + (at + i) * D + d, mask=there, other=0.0)
            value = tl.where(there, value - mean, 0.0)
            of_token = tl.where(k == 0, 1.0, token_factor(value, of_channel, d, D, EPS))
            value = value * (1 / of_token)
            total += value
            squares += value * value
        # y has mean 0, so that of y / r is small beside its deviation
        share = tl.sum(total, 0, keep_dims=True) / size
        square = tl.sum(squares, 0, keep_dims=True) / size - share * share
        of_channel = tl.maximum(tl.sqrt(tl.maximum(square, 0.0)), EPS)

    # z = (x - mu) / (r c), all as stored
    S: tl.constexpr = mu.dtype.element_ty
    of_tile = (plane * tl.num_programs(0) + tile) * D + d
    stored_mean, stored_c = rounded(mean, S), rounded(of_channel, S)
    tl.store(mu + of_tile, stored_mean, mask=d < D)
    tl.store(c + of_tile, stored_c, mask=d < D)
    wide_mean, wide_c = stored_mean.to(tl.float32), stored_c.to(tl.float32)
    least = tl.full([TOKENS, WIDTH], float("inf"), tl.float32)
    most = tl.full([TOKENS, WIDTH], float("-inf"), tl.float32)
    for at in tl.range(0, size, TOKENS):
        there = (at + i < size) & (d < D)
        value = tl.load(y + (at + i) * D + d, mask=there, other=0.0)
        of_token = token_factor(tl.where(there, value - mean, 0.0), of_channel, d, D, EPS)
        stored_r = rounded(of_token, S)
        tl.store(r + at + i, stored_r, mask=at + i < size)
        if step is not None:
            z = standard(value - wide_mean, stored_r.to(tl.float32) * wide_c)
            least = tl.minimum(least, tl.where(there, z, float("inf")))
            most = tl.maximum(most, tl.where(there, z, float("-inf")))
    tl.debug_barrier()
    if step is None:  # level = (code - top / 2) GRID
        lowest, wide, constant = -0.5 * TOP * GRID, GRID, False
    else:
        lowest = tl.where(d < D, tl.min(least, 0, keep_dims=True), 0.0)
        highest = tl.where(d < D, tl.max(most, 0, keep_dims=True), 0.0)
        wide = tl.div_rn(highest - lowest, tl.full([1, WIDTH], TOP, tl.float32))
        wide = rounded(wide, S).to(tl.float32)
        constant = wide == 0
        wide = tl.where(constant, 1.0, wide)
        stored_low = rounded(lowest, low.dtype.element_ty)
        tl.store(step + of_tile, wide.to(S), mask=d < D)
        tl.store(low + of_tile, stored_low, mask=d < D)
        lowest = stored_low.to(tl.float32)
    for at in tl.range(0, size, TOKENS):
        t = at + i
        there = (t < size) & (d < D)
        value = tl.load(y + t * D + d, mask=there, other=0.0) - wide_mean
        of_token = tl.load(r + t, mask=t < size, other=0.0).to(tl.float32)
        code = code_of(standard(value, of_token * wide_c), lowest, wide, constant, TOP)
        left = value - (code * wide + lowest) * of_token * wide_c
        tl.debug_barrier()  # all have read before one writes
        tl.store(y + t * D + d, left, mask=there)
        code = tl.where(there, code, 0.0).to(tl.int32)
        if LOOSE:
            tl.store(codes + (plane * n + tile * size + t) * D + d, code, mask=there)
        elif KEYS:
            w = at // PER + tl.arange(0, TOKENS // PER)[:, None]
            to = (plane * D + d) * ((n + PER - 1) // PER) + tile * size // PER + w
            tl.store(codes + to, packed(code, BITS, 0), mask=(w * PER < size) & (d < D))
        else:
            w = tl.arange(0, WIDTH // PER)[None, :]
            to = (plane * n + tile * size + t) * (D // PER) + w
            tl.store(codes + to, packed(code, BITS, 1), mask=(t < size) & (w * PER < D))


@triton.jit
def token_factor(y, of_channel, d, D: tl.constexpr, EPS: tl.constexpr):
    """The deviation [TOKENS, 1] of y / c over the channels."""
    x = y * (1 / of_channel)
    x = tl.where(d < D, x - tl.sum(x, 1, keep_dims=True) / D, 0.0)
    return tl.maximum(tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / D), EPS)


@triton.jit
def standard(y, factor):
    """Z = y / (r c); 0 where a factor is too small for the type that it is stored in."""
    return tl.where(factor > 0, y / tl.where(factor > 0, factor, 1.0), 0.0)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """X Hd, float32 [B, H, n, D]."""
    B, H, n, D = x.shape
    out = x.new_empty(x.shape, dtype=torch.float32)
    width = triton.next_power_of_2(D)
    tokens = min(MOST, TILE // width)
    rotate[(triton.cdiv(n, tokens), B * H)](
        x, out, *x.stride()[:3], n, H=H, D=D, WIDTH=width, TOKENS=tokens, CHANNELS=CHANNELS,
        TYPE=product_type(x.dtype), num_warps=8,
    )  # fmt: skip
    return out


def code_dual(
    x: torch.Tensor, spec: Spec, scale: torch.dtype, zero: torch.dtype
) -> tuple[Dual, torch.Tensor]:
    """The codes of x [B, H, n, D], rotated as `spec` says, and what they leave, in float32."""
    B, H, n, D = x.shape
    size, bits = min(spec.tile, n), spec.bits
    words = (D, n_words(n, bits)) if spec.role == "k" else (n, n_words(D, bits))
    # words that lie across tiles are put together afterwards
    loose = spec.role == "k" and size < n and size % (32 // bits) > 0
    codes = x.new_empty(x.shape if loose else (B, H, *words), dtype=torch.int32)
    mu, c = (x.new_empty((B, H, n // size, D), dtype=scale) for _ in range(2))
    r = x.new_empty((B, H, n), dtype=scale)
    step = low = None
    if bits not in GRID_STEP:
        step, low = torch.empty_like(mu), torch.empty_like(mu, dtype=zero)
    left = x.new_empty(x.shape, dtype=torch.float32)
    scale_tile[(n // size, B * H)](
        x, codes, mu, c, r, step, low, left, *x.stride()[:3], n, size,
        H=H, TYPE=product_type(x.dtype), LOOSE=loose, **constants(spec, D), num_warps=16,
    )  # fmt: skip
    codes = pack_tokens(codes, bits, spec.role) if loose else codes
    return Dual(codes, mu, c, r, step, low), left


def constants(spec: Spec, D: int) -> dict[str, object]:
    """What `scale_tile` is compiled for."""
    width = triton.next_power_of_2(D)
    return {
        "D": D, "WIDTH": width, "TOKENS": min(MOST, TILE // width), "BITS": spec.bits,
        "GRID": GRID_STEP.get(spec.bits), "KEYS": spec.role == "k", "TURN": bool(spec.rotate),
        "CHANNELS": CHANNELS, "ROUNDS": ROUNDS, "EPS": EPS,
    }  # fmt: skip


def variants() -> Iterator[Variant]:
    """gear2's keys and values, with and without rotation, and the rotation alone."""
    for dtype, kind in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        strides = {**dict.fromkeys(("batch", "head", "token"), "i32:16"), "n": "i32"}
        for D in (64, 128, 256):
            for role, bits, turn in (("k", 4, "hadamard"), ("v", 2, "hadamard"), ("k", 8, "")):
                spec = Spec(role, bits, "kivi", 64, 128, D, turn, "dual", 128)  # type: ignore[arg-type]
                missing = {"step": None, "low": None} if bits in GRID_STEP else {}
                arrays = ("x", "mu", "c", "r", "step", "low")
                yield Variant(
                    f"dual-{role}{bits}-{D}-{turn or 'plain'}-{dtype}",
                    scale_tile,
                    {
                        **{name: f"*{dtype}:16" for name in arrays if name not in missing},
                        "codes": "*i32:16",
                        "y": "*fp32:16",
                        **strides,
                        "size": "i32",
                    },
                    {**missing, "H": 8, "TYPE": kind, "LOOSE": False, **constants(spec, D)},
                    16,
                    3,
                )
            flags = {
                "H": 8,
                "D": D,
                "WIDTH": D,
                "TOKENS": min(MOST, TILE // D),
                "CHANNELS": CHANNELS,
            }
            yield Variant(
                f"rotate-{D}-{dtype}",
                rotate,
                {"x": f"*{dtype}:16", "out": "*fp32:16", **strides},
                {**flags, "TYPE": kind},
                8,
                3,
            )
