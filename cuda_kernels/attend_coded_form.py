"""How K or V is handed to the kernel of `attend_coded`: which of its ways, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import triton

from kvc.ops.codec import Spec
from kvc.ops.past import Layout
from kvc.ops.quant import Role
from kvc.ops.scales import Dual

WIDTH = 8  # columns of a matrix at least, and half words of a row


@dataclass(frozen=True)
class Form:
    """One of the kernel's ways to read K or V, in the names of its constants.

    Of K: `channels` folds steps into q, `groups` into products of some channels, `elements` and
    `rows` decode in registers, a step for an element. Of V: `groups` folds steps into p, `dual`
    also into sums, `elements` decodes. Of both: `dense` takes directions that are not coded.
    """

    form: str
    bits: int = 16
    group: int = 0  # channels that a part, or V's parts of one group, take up
    span: int = 0  # tokens of K's steps, or of two-sided scales, 0 for a block's; else channels
    parts: int = 1
    n: int = 0  # width of a part
    all: bool = False  # heads share steps


def shape(layout: Layout) -> tuple[int, int, int, int, int]:
    """Sizes B, H, D, tokens of a block, and blocks."""
    if layout.dense is not None:
        B, H, T, D = layout.dense.shape
        return B, H, D, T, 1
    run = layout.runs[0]
    B, H = run.code.d.codes.shape[1:3]
    return B, H, run.spec.head_dim, run.spec.n, run.n


def why_not(layout: Layout | None, who: Role) -> str | None:
    """Why the kernel cannot take K (`k`) or V (`v`) that lies so, or None."""
    if layout is None:
        return f"takes {who} that lies in one way"
    if layout.dense is not None:
        return None
    if len(layout.runs) != 1:
        return f"takes one run of {who} at a time, not {len(layout.runs)}"
    spec, code = layout.runs[0].spec, layout.runs[0].code
    if spec.role != who and (isinstance(code.d, Dual) or code.l or code.s):
        return f"takes {who} in rows with steps alone"
    per = 16 // spec.bits
    if spec.role == "v" and not isinstance(code.d, Dual) and _group(spec) % per:
        return f"takes groups of {per} channels or a multiple, not of {spec.group_size}"
    if isinstance(code.d, Dual) and spec.n > spec.tile and spec.tile % 64:
        return f"takes two-sided scales of 64 tokens or a multiple, not of {spec.tile}"
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


def tile(layouts: tuple[Layout, Layout], size: int) -> int:
    """Tokens that a program takes at a time, at most `size`: they share the steps of a channel."""
    for spec in (layout.runs[0].spec for layout in layouts if layout.dense is None):
        if spec.scales and spec.n > spec.tile:
            size = gcd(size, spec.tile)
        elif spec.role == "k" and spec.backbone == "kivi" and spec.n > spec.group_size:
            share = gcd(size, spec.group_size)
            size = share if share * spec.bits >= WIDTH * 16 else size  # else steps of elements
    return size


def of(layout: Layout, who: Role, size: int, turned: bool) -> Form:
    """The way to read K or V in tiles of `size` tokens."""
    D = shape(layout)[2]
    if layout.dense is not None:
        return Form("dense", group=D, n=width(D))
    spec = layout.runs[0].spec
    bits, per, group = spec.bits, 16 // spec.bits, _group(spec)
    whole = spec.n <= (spec.tile if spec.scales else spec.group_size)
    least = 16 if turned or who == "k" else WIDTH
    words = power(D // per, least)
    if who == "v":
        if spec.scales:
            return Form("dual", bits, D, 0 if whole else spec.tile, per, words)
        own = power(group // per, least)
        # wider sums than that, and wider tokens, are shared out to warps by all their channels
        if D <= 128 and D // group * own * per <= 2 * width(D):
            shared = spec.backbone == "kcvt"
            return Form("groups", bits, group, group, D // group * per, own, shared)
        return Form("elements", bits, D, group, per, words)
    if spec.role == "v":
        return Form("rows", bits, D, group, per, words, spec.backbone == "kcvt")
    if spec.backbone == "token" and not spec.scales:
        return Form("groups", bits, group, group, D // group, power(group, 16))
    channels = Form("channels", bits, D, 0, 1, width(D))
    if spec.scales or spec.backbone == "kcvt" or whole:
        span = spec.tile if spec.scales and not whole else 0
        return replace(channels, span=span)
    form = "elements" if spec.group_size % size else "channels"
    return replace(channels, form=form, span=spec.group_size)


def _group(spec: Spec) -> int:
    """Channels of a token that share a step."""
    return spec.head_dim if spec.backbone == "kcvt" else spec.group_size


def power(n: int, least: int) -> int:
    """The power of two from n on, and from `least`."""
    return max(least, int(triton.next_power_of_2(n)))


def width(D: int) -> int:
    """Channels in registers."""
    return power(D, 16)


def half_words(n: int, bits: int) -> int:
    """Half words of a row of n codes."""
    return -(-n * bits // 32) * 2


def arguments(layout: Layout, form: Form, who: Role) -> dict[str, Any]:
    """What the kernel is given of K or V, by the names of its arguments."""
    _, H, D, _, _ = shape(layout)
    given: dict[str, Any] = dict.fromkeys(
        ("codes", "step", "low", "mu", "c", "r", "fit_a", "fit_c", "index", "delta", "norm",
         "places", "exact"),
    )  # fmt: skip
    given |= {"b": 0, "h": 0, "t": 0, "norm_b": 0, "norm_h": 0, "many": 0, "kept": 0}
    given |= {"gain": None if layout.gain == 1 else layout.gain, "RANK": 0, "VECTORS": 1, "W": D}
    given |= {"FORM": form.form, "BITS": form.bits, "GROUP": form.group, "SPAN": form.span}
    given |= {"PARTS": form.parts, "N": form.n, "ALL": form.all}
    if layout.dense is not None:
        x = _last(layout.dense)
        given |= {"codes": x, "b": x.stride(0), "h": x.stride(1), "t": x.stride(2)}
    else:
        code = layout.runs[0].code
        d, fit, far = code.d, code.l, code.s
        given |= {"codes": d.codes.contiguous().view(torch.int16), "step": d.step, "low": d.low}
        if isinstance(d, Dual):
            given |= {"mu": d.mu, "c": d.c, "r": d.r}
        if fit is not None:
            given |= {"fit_a": fit.a, "fit_c": fit.c, "RANK": fit.a.shape[-1]}
        if far is not None:
            given |= {"index": far.index, "delta": far.delta, "many": far.index.shape[-1]}
    if layout.norm is not None:
        norm = _last(layout.norm)
        given |= {"norm": norm, "norm_b": norm.stride(0)}
        given["norm_h"] = norm.stride(1) if norm.shape[1] > 1 else 0
    if layout.index is not None and layout.exact is not None:
        given |= {"places": layout.index, "exact": layout.exact, "kept": layout.index.shape[1]}
        given["W"] = layout.exact.shape[2]
        given["VECTORS"] = 1 if given["W"] > D else H
    own = ("codes", "norm")  # these may have strides
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and name not in own:
            given[name] = x.contiguous()
    prefix = {True: who, False: who.upper()}
    return {f"{prefix[name.islower()]}_{name}": x for name, x in given.items()}


def _last(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
