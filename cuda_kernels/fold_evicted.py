"""LESS's evicted tokens into its state: features are made and added without being written.

A program takes a head and, of many tokens, some. What several programs have summed up is added in
their order, so that the same tokens always give the same state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels.launch import Traffic, Variant, off_device, off_types, product_type, span
from kvc.cuda_kernels.quantize_kernel import rounded
from kvc.ops.evict import Kernels

TOKENS = 16  # of a tile
DEPTH = 64  # channels of their keys that are taken at a time
WEIGHTS = 4096  # of the first map at a time
SHARE = 64  # tokens of a program at least, where there are several for a head
FEATURES = 32  # of a state
WARPS = 8


@triton.jit
def gelu(x):
    """X Phi(x), Phi the normal distribution's."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def plus_product(total, a, b, TYPE: tl.constexpr):
    """Total + A B, of numbers in TYPE; in float32 where A has one row or one column."""
    if a.shape[0] == 1:
        total += tl.sum(tl.trans(a).to(tl.float32) * b.to(tl.float32), 0, keep_dims=True)
    elif a.shape[1] == 1:
        total += a.to(tl.float32) * b.to(tl.float32)
    else:
        PRECISION: tl.constexpr = "tf32x3" if tl.float32 == TYPE else "tf32"
        total = tl.dot(a.to(TYPE), b.to(TYPE), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["n", "size"])
def fold(
    state, norm, k, v, valid, b1, b2, b3, s1, s2, new_state, new_norm,
    k_batch, k_head, k_token, v_batch, v_head, v_token, valid_batch, valid_head, valid_token,
    n, size, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr,
    DEPTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """State + psi(K)^T V and norm + sum psi(K) over `size` tokens; without state, the sums alone.

    k, v [B, H, n, D], any strides but the last; valid [B, H or 1, n]
    b1 [H, D, M], b2 [H, M, R], b3 [H, R, R], s1, s2 [H, R]
    new_state [splits, B, H, R, D], new_norm [splits, B, H, R]
    """
    program = tl.program_id(1).to(tl.int64)
    b, h = program // H, program % H
    i, d, r = tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDTH), tl.arange(0, RANKS)
    first = tl.program_id(0) * size
    last = tl.minimum(first + size, n)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    valid += b * valid_batch + h * valid_head
    scale_1 = tl.load(s1 + h * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    scale_2 = tl.load(s2 + h * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    at_b3 = (h * R + r[:, None]) * R + r[None, :]
    turn = tl.load(b3 + at_b3, mask=(r < R)[:, None] & (r < R)[None, :], other=0.0)

    total = tl.zeros([RANKS, WIDTH], tl.float32)
    features = tl.zeros([RANKS], tl.float32)
    for at in tl.range(first, last, TOKENS):
        t = at + i
        seen = tl.load(valid + t * valid_token, mask=t < last, other=0) != 0
        # u = |s1| GELU(GELU(k B1) B2),  psi = |u + (u B3) s2|
        u = tl.zeros([TOKENS, RANKS], tl.float32)
        for m0 in tl.range(0, M, HIDDEN):
            m = m0 + tl.arange(0, HIDDEN)
            hidden = tl.zeros([TOKENS, HIDDEN], tl.float32)
            for c0 in tl.range(0, D, DEPTH):
                c = c0 + tl.arange(0, DEPTH)
                some = seen & (c < D)[None, :]
                keys = tl.load(k + t * k_token + c[None, :], mask=some, other=0.0)
                some = (c < D)[:, None] & (m < M)[None, :]
                at_b1 = (h * D + c[:, None]) * M + m[None, :]
                hidden = plus_product(hidden, keys, tl.load(b1 + at_b1, mask=some, other=0.0), TYPE)
            some = (m < M)[:, None] & (r < R)[None, :]
            second_map = tl.load(b2 + (h * M + m[:, None]) * R + r[None, :], mask=some, other=0.0)
            u = plus_product(u, gelu(hidden), second_map, tl.float32)
        u = tl.abs(scale_1) * gelu(u)
        turned = plus_product(tl.zeros([TOKENS, RANKS], tl.float32), u, turn, tl.float32)
        psi = tl.abs(u + turned * scale_2)
        some = seen & (d < D)[None, :]
        values = tl.load(v + t * v_token + d[None, :], mask=some, other=0.0)
        total = plus_product(total, tl.trans(psi), values, tl.float32)
        features += tl.sum(psi, 0)

    to = (r[:, None] * D) + d[None, :]
    in_state = (r < R)[:, None] & (d < D)[None, :]
    if state is not None:
        old = tl.load(state + program * R * D + to, mask=in_state, other=0.0)
        total += old.to(tl.float32)
        features += tl.load(norm + program * R + r, mask=r < R, other=0.0).to(tl.float32)
    program += tl.program_id(0).to(tl.int64) * tl.num_programs(1)
    OF_STATE: tl.constexpr = new_state.dtype.element_ty
    OF_NORM: tl.constexpr = new_norm.dtype.element_ty
    tl.store(new_state + program * R * D + to, rounded(total, OF_STATE), mask=in_state)
    tl.store(new_norm + program * R + r, rounded(features, OF_NORM), mask=r < R)


@triton.jit(do_not_specialize=["splits"])
def add(old, parts, new, splits, N: tl.constexpr, BLOCK: tl.constexpr):
    """Old + the sum of parts [splits, all, N], of N numbers for each head."""
    i = tl.arange(0, BLOCK)
    head = tl.program_id(0).to(tl.int64) * N
    total = tl.load(old + head + i, mask=i < N, other=0.0).to(tl.float32)
    for s in tl.range(0, splits):
        at = s * tl.num_programs(0).to(tl.int64) * N + head
        total += tl.load(parts + at + i, mask=i < N, other=0.0)
    tl.store(new + head + i, rounded(total, new.dtype.element_ty), mask=i < N)


def why_not(
    state: torch.Tensor,
    norm: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor,
    kernels: Kernels,
) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    maps = kernels[2:]
    reason = off_device(state, norm, k, v, valid, *maps) or off_types(state, norm, k, v, *maps)
    R, D = state.shape[2:]
    if reason is None and (D % 16 or not 16 <= D <= 256):
        reason = f"takes a head_dim that is a multiple of 16 up to 256, not {D}"
    if reason is None and R > FEATURES:
        reason = f"takes up to {FEATURES} features, not {R}"
    return reason


def run(
    state: torch.Tensor,
    norm: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor,
    kernels: Kernels,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new state and norm of `fold_evicted`, from the kernel."""
    (B, H, R, D), n = state.shape, k.shape[2]
    new_state, new_norm = torch.empty_like(state), torch.empty_like(norm)
    state, norm = state.contiguous(), norm.contiguous()
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    maps = [x.contiguous() for x in kernels[2:]]
    of_valid = (valid.stride(0), valid.stride(1) if valid.shape[1] > 1 else 0, valid.stride(2))
    size = span(n, TOKENS, B * H, SHARE)
    splits = max(1, triton.cdiv(n, size))
    flags = constants(H, D, kernels.b2.shape[1], R, n, product_type(k.dtype, kernels.b1.dtype))

    def launch(old: tuple[Any, Any], to: tuple[Any, Any]) -> None:
        fold[(splits, B * H)](
            *old, k, v, valid, *maps, *to, *k.stride()[:3], *v.stride()[:3], *of_valid, n, size,
            **flags, num_warps=WARPS,
        )  # fmt: skip

    new_state, new_norm = new_state.contiguous(), new_norm.contiguous()
    if splits == 1:
        launch((state, norm), (new_state, new_norm))
        return new_state, new_norm
    parts = state.new_empty((splits, B, H, R, D), dtype=torch.float32)
    of_norm = norm.new_empty((splits, B, H, R), dtype=torch.float32)
    launch((None, None), (parts, of_norm))
    for old, some, new in ((state, parts, new_state), (norm, of_norm, new_norm)):
        N = old[0, 0].numel()
        add[(B * H,)](old, some, new, splits, N=N, BLOCK=triton.next_power_of_2(N), num_warps=WARPS)
    return new_state, new_norm


def constants(H: int, D: int, M: int, R: int, n: int, product: tl.dtype) -> dict[str, Any]:
    """What `fold` is compiled for; one token, as in decoding, takes no products of matrices."""
    width = triton.next_power_of_2(D)
    tokens, depth = (1, width) if n == 1 else (TOKENS, min(width, DEPTH))
    return {
        "H": H, "D": D, "M": M, "R": R, "WIDTH": width,
        "RANKS": max(16, triton.next_power_of_2(R)), "TOKENS": tokens,
        "HIDDEN": WEIGHTS // depth, "DEPTH": depth, "TYPE": product,
    }  # fmt: skip


def variants() -> Iterator[Variant]:
    """One program for a head, and several."""
    for D, M, R in ((64, 64, 8), (128, 512, 8), (256, 512, 32)):
        for keys, maps, product in (
            ("bf16", "bf16", tl.bfloat16),
            ("fp32", "fp16", tl.float32),
            ("fp32", "fp32", tl.float32),
        ):  # fmt: skip
            for name, n, missing in (
                ("token", 1, {}), ("one", 64, {}), ("several", 1024, {"state": None, "norm": None})
            ):  # fmt: skip
                arrays = ("state", "norm", "new_state", "new_norm")
                strides = [f"{x}_{axis}" for x in "kv" for axis in ("batch", "head", "token")]
                yield Variant(
                    f"{name}-{D}-{M}-{R}-{keys}-{maps}",
                    fold,
                    {
                        **{x: "*fp32:16" for x in arrays if x not in missing},
                        "k": f"*{keys}:16",
                        "v": f"*{keys}:16",
                        "valid": "*i1",
                        **dict.fromkeys(("b1", "b2", "b3", "s1", "s2"), f"*{maps}:16"),
                        **dict.fromkeys(strides, "i32:16"),
                        **dict.fromkeys(("valid_batch", "valid_head", "valid_token"), "i32"),
                        "n": "i32",
                        "size": "i32",
                    },
                    {**missing, **constants(8, D, M, R, n, product)},
                    WARPS,
                    3,
                )
    yield Variant(
        "add",
        add,
        {"old": "*fp32:16", "parts": "*fp32:16", "new": "*fp32:16", "splits": "i32"},
        {"N": 32 * 256, "BLOCK": 32 * 256},
        WARPS,
        3,
    )


def traffic(B: int, H: int, n: int, D: int, M: int, R: int, size: int, of_maps: int) -> Traffic:
    """With keys and values of `size` bytes a number, and maps of `of_maps`; the state is float32.

    Each tile of tokens reads the large maps, and each tile of the first map the keys.
    """
    flags = constants(H, D, M, R, n, tl.float32)
    splits = triton.cdiv(n, span(n, TOKENS, B * H, SHARE))
    large, small = H * (D * M + M * R) * of_maps, H * (R * R + 2 * R) * of_maps
    keys, state = B * H * n * D * size, 4 * B * H * R * (D + 1)
    least = 2 * keys + B * H * n + 2 * state + large + small
    again = triton.cdiv(M, flags["HIDDEN"]) - 1
    touched = least + again * keys + (B * triton.cdiv(n, flags["TOKENS"]) - 1) * large
    parts = 0 if splits == 1 else 2 * splits * state
    return Traffic(touched + (B * splits - 1) * small + parts, least)
