"""Attention over coded tokens, which are decoded nowhere but in registers; split over the GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from kvc.cuda_kernels import attend_coded_form as form
from kvc.cuda_kernels.attend_coded_kernel import attend_coded_kernel
from kvc.cuda_kernels.launch import (
    FILL,
    Config,
    capability,
    interpreted,
    newest,
    off_device,
    off_shape,
    off_types,
)
from kvc.ops.attention import Partial
from kvc.ops.past import Layout, Past

LEAST = 4  # tiles of a split

# By compute capability, then by width of a token (a power of two) and bits of a code: of blocks
# of more than 64 tokens, of shorter ones, and of both again with a low-rank fit. Products are so
# narrow that several warps would mostly do the same work.
TABLE: dict[int, dict[tuple[int, int], tuple[Config, Config, Config, Config]]] = {
    80: {
        (64, 2): (Config(64, 1, 2),) * 4,
        (64, 4): (Config(64, 1, 2),) * 4,
        (64, 8): (Config(64, 2, 2), Config(64, 2, 2), Config(64, 2, 1), Config(64, 2, 2)),
        (128, 2): (Config(64, 1, 2),) * 4,
        (128, 4): (Config(32, 1, 2), Config(64, 1, 2), Config(32, 1, 2), Config(32, 2, 1)),
        (128, 8): (Config(64, 2, 2), Config(64, 2, 2), Config(64, 2, 2), Config(64, 4, 2)),
        (256, 2): (Config(64, 8, 1),) * 4,
        (256, 4): (Config(64, 8, 1),) * 4,
        (256, 8): (Config(64, 8, 1),) * 4,
    },
}
DUAL = Config(64, 2, 1)  # of two-sided scales
EXACT = Config(32, 8, 1)  # of directions, and with outliers or originals
WIDE = Config(32, 4, 1)  # of products in float32


class Plan(NamedTuple):
    """How a launch is shared out and compiled."""

    rows: int  # (query head, query) that a program has of a head of K and V; padding is behind them
    tiles: int  # programs that share the rows of a head
    span: int  # tiles of tokens of a program
    splits: int
    config: Config


def why_not(
    q: torch.Tensor,
    k: Past,
    v: Past,
    scale: float,
    *,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    of_k, of_v = k.layout(), v.layout()
    reason = off_device(q, valid) or form.why_not(of_k, "k") or form.why_not(of_v, "v")
    if reason or of_k is None or of_v is None:
        return reason
    if form.shape(of_k) != form.shape(of_v):
        return "takes K and V in blocks of the same tokens"
    if form.turned(of_k) != form.turned(of_v):
        return "takes K and V of which both are turned or none"
    return off_types(q) or off_shape(q, form.shape(of_k)[1])


def run(
    q: torch.Tensor,
    k: Past,
    v: Past,
    scale: float,
    *,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
) -> Partial:
    """As `kvc.ops.attention.attend_coded`; the answers of the splits are not joined."""
    of_k: Any = k.layout()
    of_v: Any = v.layout()
    made = plan(q, of_k, of_v)
    tiles, _, splits, config = made[1:]
    B, Hq, L, D = q.shape
    given = arguments(q, of_k, of_v, made, scale, softcap, valid)
    out = q.new_empty((splits, B, Hq, L, D), dtype=torch.float32)
    lse = q.new_empty((splits, B, Hq, L), dtype=torch.float32)
    attend_coded_kernel[(B * given["H"] * tiles, splits)](
        out=out, lse=lse, **given, num_warps=config.num_warps, num_stages=config.num_stages
    )
    return Partial(out, lse)


def arguments(
    q: torch.Tensor,
    k: Layout,
    v: Layout,
    made: Plan,
    scale: float,
    softcap: float | None,
    valid: torch.Tensor | None,
) -> dict[str, Any]:
    """What the kernel is given, by the names of its arguments, without what it returns."""
    B, H, D, n, blocks = form.shape(k)
    L, size, block = q.shape[2], made.config.tile, form.turned(k)
    q = q if q.stride(-1) == 1 else q.contiguous()
    mask = (0, 0)
    if valid is not None:
        valid = valid.expand(B, H, n * blocks)
        valid = valid if valid.stride(-1) == 1 else valid.contiguous()
        mask = valid.stride()[:2]
    of_k = form.of(k, "k", size, bool(block))
    given = form.arguments(k, of_k, "k")
    width = form.power(given["K_RANK"], 1)
    return {
        **given,
        **form.arguments(v, form.of(v, "v", size, bool(block)), "v"),
        **dict(zip(("q_b", "q_h", "q_l"), q.stride()[:3], strict=True)),
        **dict(zip(("valid_b", "valid_h"), mask, strict=True)),
        "q": q,
        "valid": valid,
        "n": n,
        "blocks": blocks,
        "span": made.span,
        "start": k.start,
        "B": B,
        "scale": scale,
        "softcap": softcap or 0.0,
        "SOFTCAP": bool(softcap),
        "H": H,
        "SHARE": q.shape[1] // H * L,
        "L": L,
        "D": D,
        "DP": form.width(D),
        "ROWS": made.rows,
        "TILE": size,
        "SHORT": n <= size,
        "FULL": n % size == 0,
        "BLOCK": block,
        "ALIGNED": form.half_words(n, of_k.bits) % 8 == 0,
        "K_WIDTH": width,
        "FIT": max(16, width),
        "PRODUCT": tl.float32 if q.dtype == torch.float32 else tl.float16,
        "PACKED": not interpreted(),
    }


def plan(q: torch.Tensor, k: Layout, v: Layout) -> Plan:
    """The launch for these queries."""
    B, H, _, n, blocks = form.shape(k)
    share = q.shape[1] // H * q.shape[2]
    config = _config(q, k, v)
    config = config._replace(tile=form.tile((k, v), config.tile))
    rows = 16
    if share > rows:  # twice as many, and warps that share them
        rows, config = 32, config._replace(num_warps=2 * config.num_warps)
    tiles = -(-share // rows)
    count = -(-n // config.tile) * blocks
    # a program of one warp is a quarter of what `FILL` counts, and twice as many are in flight
    splits = max(1, min(count // LEAST, -(-FILL * 2 // (B * H * tiles))))
    span = -(-count // splits)
    return Plan(rows, tiles, span, -(-count // span), config)


def _config(q: torch.Tensor, k: Layout, v: Layout) -> Config:
    """How the kernel is compiled for up to 16 rows."""
    if q.dtype == torch.float32:
        return WIDE
    both = (k, v)
    if any(form.sparse(x) or x.dense is not None for x in both):
        return EXACT
    if any(x.runs[0].spec.scales for x in both):
        return DUAL
    bits = max(x.runs[0].spec.bits for x in both)
    row = newest(TABLE, capability(q))[max(64, form.width(q.shape[3])), bits]
    fit = any(x.runs[0].code.l is not None for x in both)
    return row[2 * fit + (form.shape(k)[3] <= 64)]
