"""Attention over coded tokens, read as they lie; split over the GPU.

Two kernels: `attend_coded_folded` for codecs whose steps can be folded into the other factor of a
product, and `attend_coded_decoded` for all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from kvc.cuda_kernels import attend_coded_form as form
from kvc.cuda_kernels.attend_coded_decoded import attend_decoded_kernel
from kvc.cuda_kernels.attend_coded_folded import attend_folded_kernel
from kvc.cuda_kernels.launch import (
    FILL,
    Config,
    Variant,
    capability,
    interpreted,
    newest,
    off_device,
    off_shape,
    off_types,
)
from kvc.ops.attention import Partial
from kvc.ops.codec import arrays
from kvc.ops.past import Layout, Past

ROWS = 8  # (query head, query) of a program, that share a read
SPARE = 40  # a split's own bytes are at most this part of those of tokens

# By compute capability: warps, which have tiles of their own, and tiles on their way at a time.
TEAMS: dict[int, tuple[int, int]] = {80: (8, 2)}
FEW = 2  # warps where blocks are of few tiles, and many
# By compute capability, of tokens that are decoded: plain ones, and those with more than 128
# channels, outliers, fits, or two-sided scales.
TABLE: dict[int, tuple[Config, Config]] = {80: (Config(32, 8, 1), Config(16, 8, 1))}


class Plan(NamedTuple):
    """How a launch is shared out and compiled."""

    folds: bool  # which kernel
    flat: bool  # whether tiles of several blocks are taken at a time
    teams: int  # warps that take tiles by themselves
    tiles: int  # programs that share the rows of a head
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
    length: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    of_k, of_v = k.layout(), v.layout()
    reason = off_device(q, valid, length) or form.why_not(of_k, "k") or form.why_not(of_v, "v")
    if reason or of_k is None or of_v is None:
        return reason
    if form.shape(of_k) != form.shape(of_v):
        return "takes K and V in blocks of the same tokens"
    if form.turned(of_k) != form.turned(of_v):
        return "takes K and V of which both are turned or none"
    if length is not None and not (of_k.runs and of_v.runs):
        return "takes a length of coded tokens alone"
    return off_types(q) or off_shape(q, form.shape(of_k)[1])


def run(
    q: torch.Tensor,
    k: Past,
    v: Past,
    scale: float,
    *,
    softcap: float | None = None,
    valid: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
) -> Partial:
    """As `kvc.ops.attention.attend_coded`; the answers of the splits are not joined.

    How many there are depends on the room for tokens, not on `length`, which only the device reads.
    """
    of_k: Any = k.layout()
    of_v: Any = v.layout()
    made = plan(q, of_k, of_v)
    B, Hq, L, D = q.shape
    given = arguments(q, of_k, of_v, made, scale, softcap, valid, length)
    out = q.new_empty((made.splits, B, Hq, L, D), dtype=torch.float32)
    lse = q.new_empty((made.splits, B, Hq, L), dtype=torch.float32)
    kernel(made)[(B * given["H"] * made.tiles, made.splits)](
        out=out, lse=lse, **given,
        num_warps=made.config.num_warps, num_stages=made.config.num_stages,
    )  # fmt: skip
    return Partial(out, lse)


def kernel(made: Plan) -> Any:
    """The kernel of a launch."""
    return attend_folded_kernel if made.folds else attend_decoded_kernel


def arguments(
    q: torch.Tensor,
    k: Layout,
    v: Layout,
    made: Plan,
    scale: float,
    softcap: float | None,
    valid: torch.Tensor | None,
    length: torch.Tensor | None,
) -> dict[str, Any]:
    """What the kernel is given, by the names of its arguments, without what it returns."""
    B, H, D, n, blocks = form.shape(k)
    L, size = q.shape[2], made.config.tile
    q = q if q.stride(-1) == 1 else q.contiguous()
    mask = (0, 0)
    if valid is not None:
        valid = valid.expand(B, H, n * blocks)
        valid = valid if valid.stride(-1) == 1 else valid.contiguous()
        mask = valid.stride()[:2]
    given = {
        **dict(zip(("q_b", "q_h", "q_l"), q.stride()[:3], strict=True)),
        **dict(zip(("valid_b", "valid_h"), mask, strict=True)),
        "q": q,
        "valid": valid,
        "length": length,
        "n": n,
        "blocks": blocks,
        "B": B,
        "scale": scale,
        "softcap": softcap or 0.0,
        "SOFTCAP": bool(softcap),
        "H": H,
        "SHARE": q.shape[1] // H * L,
        "L": L,
        "D": D,
        "DP": triton.next_power_of_2(D),
        "TILE": size,
        "BLOCK": form.turned(k),
    }
    if not made.folds:
        of_k, of_v = form.decoded(k, "k"), form.decoded(v, "v")
        stretch = next((x for x in (of_k["K_TOKENS"], of_v["V_TOKENS"]) if x and x % size == 0), n)
        own = {"start": k.start, "stretch": stretch, "WIDE": q.dtype == torch.float32}
        return {**given, **own, **of_k, **of_v}
    return {
        **given,
        **form.folded(k, "k"),
        **form.folded(v, "v"),
        "W": made.teams,
        "FLAT": made.flat,
        "FULL": n % size == 0,
        "ALIGNED": form.half_words(n, k.runs[0].spec.bits) % 8 == 0,
        "STAGES": made.config.num_stages,
        "PACKED": not interpreted(),
    }


def plan(q: torch.Tensor, k: Layout, v: Layout) -> Plan:
    """The launch for these queries.

    As many splits as fill the GPU, if each has tiles for all its warps, and if what it reads and
    writes for itself is little: its answer, in float32, the queries, and what is read again of a
    block that two splits share. At batch 1 the two are at odds: few splits leave multiprocessors
    idle, many move more bytes than the tokens do. So a split is many warps with tiles of their own
    and one answer, and the bytes decide.
    """
    B, H, D, n, blocks = form.shape(k)
    share = q.shape[1] // H * q.shape[2]
    tiles = -(-share // ROWS)
    size = form.fold_tile(k, v) if q.dtype != torch.float32 else 0
    flat = teams = 0
    if size:
        warps, stages = newest(TEAMS, capability(q))
        per_block = -(-n // size)
        few = blocks > 1 and per_block <= warps // 2
        flat = few and not _of_blocks(k, v)
        teams = min(FEW, per_block) if few and not flat else warps
        most = form.fits(k, v) or k.runs[0].spec.bits == 8  # of registers
        config = Config(size, teams, 1 if most else stages)
    else:
        config = newest(TABLE, capability(q))[D > 128 or form.heavy(k) or form.heavy(v)]
    count = -(-n // config.tile) * blocks
    fill = -(-FILL * 4 // (max(teams, 4) * B * H * tiles))
    own = share * (D * (q.element_size() + 4) + 4) + tiles * again(k, v) // (B * H)
    afford = sum(map(least, (k, v))) // (B * H) // (SPARE * own)
    splits = max(1, min(fill, count // max(1, teams), afford))
    return Plan(bool(size), bool(flat), teams, tiles, splits, config)


def _of_blocks(k: Layout, v: Layout) -> bool:
    """Whether something is read that goes with a whole block."""
    spec = k.runs[0].spec
    return form.fits(k, v) or spec.backbone == "kcvt"


def again(k: Layout, v: Layout) -> int:
    """Bytes of what goes with a block or a group of tokens, and is read by each split of it."""
    found = 0
    for layout in (k, v):
        if layout.runs:
            code, spec = layout.runs[0].code, layout.runs[0].spec
            of_channels = spec.scales or (layout is k and spec.backbone != "token")
            some = [x[0, :, :, 0] for x in code.d[1:] if of_channels and x is not None]
            some += [code.l.c[0]] if code.l else []
            found += sum(x.numel() * x.element_size() for x in some)
    return found


def variants() -> Iterator[Variant]:
    """The kernels as they are compiled for GPUs."""
    from kvc.cuda_kernels import attend_coded_variants  # which makes launches of this module

    return attend_coded_variants.variants()


def least(layout: Layout) -> int:
    """Bytes of every array once."""
    some = [layout.dense, layout.norm, layout.index, layout.exact]
    if layout.runs:
        some += [x[: layout.runs[0].n] for _, x in arrays(layout.runs[0].code)]
    return sum(x.numel() * x.element_size() for x in some if x is not None)
