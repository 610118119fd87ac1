"""How K or V is handed to the kernels of `attend_coded`: where it lies, and what takes it."""

from __future__ import annotations

from typing import Any

import torch
import triton

from kvc.ops.codec import Spec
from kvc.ops.past import Layout
from kvc.ops.quant import Role
from kvc.ops.scales import Dual

NARROW = 16  # columns of a sum of values at least
WIDE = 128  # channels, and columns of all sums of values; more do not fit into registers
RANK = 16  # of a low-rank fit that fits into registers beside what is folded
RANKS = {2: 0, 4: 2, 8: RANK}  # the same by bits, beside more than 64 channels


def shape(layout: Layout) -> tuple[int, int, int, int, int]:
    """Sizes B, H, D, tokens of a block, and blocks."""
    if layout.dense is not None:
        B, H, T, D = layout.dense.shape
        return B, H, D, T, 1
    run = layout.runs[0]
    B, H = run.code.d.codes.shape[1:3]
    return B, H, run.spec.head_dim, run.spec.n, run.n


def why_not(layout: Layout | None, who: Role) -> str | None:
    """Why no kernel can take K (`k`) or V (`v`) that lies so, or None."""
    if layout is None:
        return f"takes {who} that lies in one way"
    if layout.dense is not None:
        return None
    if len(layout.runs) != 1:
        return f"takes one run of {who} at a time, not {len(layout.runs)}"
    spec, code = layout.runs[0].spec, layout.runs[0].code
    D = spec.head_dim
    if D > 128 and (isinstance(code.d, Dual) or code.s):  # do not fit into registers
        return f"takes outliers and two-sided scales of up to 128 channels, not of {D}"
    if spec.role != who and (isinstance(code.d, Dual) or code.l or code.s):
        return f"takes {who} in rows with steps alone"
    return None


def turned(layout: Layout) -> int:
    """The size of the blocks of the Hadamard matrix by which tokens are turned; 0 if they are not.

    The largest power of two that divides D.
    """
    if layout.dense is not None or not layout.runs[0].spec.rotate:
        return 0
    D = layout.runs[0].spec.head_dim
    return D & -D


def sparse(layout: Layout) -> bool:
    """Whether some entries or vectors are exact."""
    return layout.index is not None or bool(layout.runs and layout.runs[0].code.s is not None)


def fits(k: Layout, v: Layout) -> bool:
    """Whether there is a low-rank fit."""
    return any(x.runs[0].code.l is not None for x in (k, v))


def heavy(layout: Layout) -> bool:
    """Whether more goes with a token than its codes and their steps."""
    coded = bool(layout.runs) and layout.runs[0]
    return sparse(layout) or bool(coded and (coded.spec.scales or coded.code.l is not None))


def fold_tile(k: Layout, v: Layout) -> int:
    """Tokens of a tile whose steps can be folded; 0 if they cannot.

    A tile has eight half words of each channel of K, or more, and shares the channel's step.
    """
    for layout in (k, v):
        if layout.dense is not None or sparse(layout) or layout.norm is not None:
            return 0
        if layout.gain != 1 or layout.runs[0].spec.scales:
            return 0
        spec, fit = layout.runs[0].spec, layout.runs[0].code.l
        most = RANK if spec.head_dim <= 64 else RANKS[spec.bits]
        if fit is not None and fit.a.shape[-1] > most:
            return 0
    of_k, of_v = k.runs[0].spec, v.runs[0].spec
    if of_k.role != "k" or of_v.role != "v" or _group(of_v) % (16 // of_v.bits):
        return 0
    D = of_v.head_dim
    groups = D // _group(of_v)
    if D > WIDE or -(-groups // 2) * (16 // of_v.bits) * sum_width(of_v) > WIDE:
        return 0
    least = 128 // of_k.bits
    alone = k.runs[0].n == 1 and not fits(k, v)  # what else there is to read takes up registers
    tile = 2 * least if alone and of_k.bits > 2 and of_k.backbone != "token" else least
    if of_k.backbone == "token":
        group = of_k.group_size
        return tile if group >= 16 and group == triton.next_power_of_2(group) else 0
    if of_k.backbone == "kivi" and of_k.n > of_k.group_size:
        while of_k.group_size % tile:
            tile //= 2
    return tile if tile >= least else 0


def sum_width(spec: Spec) -> int:
    """Columns of a sum of values: half words of two groups, or of one where that is all."""
    group = _group(spec)
    words = min(2, spec.head_dim // group) * group // (16 // spec.bits)
    return max(NARROW, int(triton.next_power_of_2(words)))


def _group(spec: Spec) -> int:
    """Channels of a token that share a step."""
    return spec.head_dim if spec.backbone == "kcvt" else spec.group_size


def half_words(n: int, bits: int) -> int:
    """Half words of a row of n codes."""
    return -(-n * bits // 32) * 2


def _prefixed(given: dict[str, Any], who: Role) -> dict[str, Any]:
    """Arguments by their names in a kernel."""
    prefix = {True: who, False: who.upper()}
    return {f"{prefix[name.islower()]}_{name}": x for name, x in given.items()}


def _common(layout: Layout) -> dict[str, Any]:
    """What both kernels are given of a run."""
    code = layout.runs[0].code
    d, fit = code.d, code.l
    given = {"step": d.step, "low": d.low, "a": fit and fit.a, "c": fit and fit.c}
    found = {name: None if x is None else x.contiguous() for name, x in given.items()}
    return {
        **found,
        "codes": d.codes.contiguous().view(torch.int16),
        "RANK": 0 if fit is None else fit.a.shape[-1],
        "BITS": layout.runs[0].spec.bits,
    }


def folded(layout: Layout, who: Role) -> dict[str, Any]:
    """What `attend_folded_kernel` is given of K or V, by the names of its arguments."""
    given, spec = _common(layout), layout.runs[0].spec
    if who == "k":
        given |= {"GROUP": spec.group_size if spec.backbone == "token" else 0}
        given |= {"SPAN": spec.group_size if spec.backbone == "kivi" else 0}
    else:
        given |= {"GROUP": _group(spec), "ALL": spec.backbone == "kcvt", "N": sum_width(spec)}
    return _prefixed(given, who)


def decoded(layout: Layout, who: Role) -> dict[str, Any]:
    """What `attend_decoded_kernel` is given of K or V, by the names of its arguments."""
    _, H, D, _, _ = shape(layout)
    given: dict[str, Any] = dict.fromkeys(
        ("codes", "step", "low", "mu", "factor", "r", "a", "c", "index", "delta", "norm",
         "places", "exact"),
    )  # fmt: skip
    given |= {"b": 0, "h": 0, "t": 0, "norm_b": 0, "norm_h": 0, "many": 0, "kept": 0}
    given |= {"gain": None if layout.gain == 1 else layout.gain, "VECTORS": 1, "WIDTH": D}
    if layout.dense is not None:
        x = _last(layout.dense)
        given |= {"codes": x, "b": x.stride(0), "h": x.stride(1), "t": x.stride(2)}
        given |= {"BITS": 0, "ACROSS": False, "TOKENS": 1, "CHANNELS": D, "ALL": False, "RANK": 0}
    else:
        given |= _common(layout) | _steps(layout.runs[0].spec)
        code = layout.runs[0].code
        if isinstance(code.d, Dual):
            given |= {"mu": code.d.mu, "factor": code.d.c, "r": code.d.r}
        if code.s is not None:
            given |= {"index": code.s.index, "delta": code.s.delta}
            given["many"] = code.s.index.shape[-1]
    if layout.norm is not None:
        norm = _last(layout.norm)
        given |= {"norm": norm, "norm_b": norm.stride(0)}
        given["norm_h"] = norm.stride(1) if norm.shape[1] > 1 else 0
    if layout.index is not None and layout.exact is not None:
        given |= {"places": layout.index, "exact": layout.exact, "kept": layout.index.shape[1]}
        given["WIDTH"] = layout.exact.shape[2]
        given["VECTORS"] = 1 if given["WIDTH"] > D else H
    for name in ("mu", "factor", "r", "index", "delta", "places", "exact"):
        given[name] = None if given[name] is None else given[name].contiguous()
    return _prefixed(given, who)


def _steps(spec: Spec) -> dict[str, Any]:
    """Which codes share a half word, and which a step."""
    tokens, channels = 1, _group(spec)
    if spec.scales:
        tokens, channels = 0 if spec.n <= spec.tile else spec.tile, 1
    elif spec.role == "k" and spec.backbone != "token":
        whole = spec.backbone == "kcvt" or spec.n <= spec.group_size
        tokens, channels = 0 if whole else spec.group_size, 1
    every = spec.backbone == "kcvt" and spec.role == "v" and not spec.scales
    return {"ACROSS": spec.role == "k", "TOKENS": tokens, "CHANNELS": channels, "ALL": every}


def _last(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
