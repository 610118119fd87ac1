"""The bytes that a launch of `attend_coded` moves, told from shapes and sizes of elements alone."""

from __future__ import annotations

from typing import Any

import torch

from kvc.cuda_kernels import attend_coded_form as form
from kvc.cuda_kernels.attend_coded import Plan, plan
from kvc.cuda_kernels.launch import Traffic
from kvc.ops.codec import arrays
from kvc.ops.past import Layout
from kvc.ops.quant import Role


def traffic(q: torch.Tensor, k: Layout, v: Layout, valid: bool = False) -> Traffic:
    """Bytes of a call without outliers and originals; tensors may be of the device `meta`.

    Which entries are exact depends on values, and so do the bytes that finding them takes.
    """
    made = plan(q, k, v)
    B, H, D, n, blocks = form.shape(k)
    queries, answer = _bytes(q), q[..., 0].numel() * (D + 1) * 4
    mask = B * H * n * blocks if valid else 0
    touched = made.splits * (queries + answer) + made.tiles * mask
    least = queries + answer + mask
    turned = bool(form.turned(k))
    own = form.of(k, "k", made.config.tile, turned)
    if own.parts > 1 or turned:  # parts of q are read by themselves
        touched += made.splits * queries * (own.parts if turned else 1)
    touched += made.tiles * (_touched(k, "k", made) + _touched(v, "v", made))
    return Traffic(touched, least + _least(k) + _least(v))


def _bytes(*arrays: torch.Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in arrays if x is not None)


def _least(layout: Layout) -> int:
    """Every array once."""
    if layout.dense is not None:
        return _bytes(layout.dense, layout.norm)
    run = layout.runs[0]
    return _bytes(layout.norm) + sum(_bytes(x[: run.n]) for _, x in arrays(run.code))


def _touched(layout: Layout, who: Role, made: Plan) -> int:
    """What the programs of all heads and splits read, for one tile of rows."""
    B, H, D, n, blocks = form.shape(layout)
    found = 0
    if layout.norm is not None:
        found += B * H * n * blocks * layout.norm.element_size()
    if layout.dense is not None:
        return found + _bytes(layout.dense)
    code: Any = layout.runs[0].code
    d, size = code.d, made.config.tile
    own = form.of(layout, who, size, bool(form.turned(layout)))
    per_block = -(-n // size)
    count = per_block * blocks
    starts = range(0, count, made.span)
    # a block that several programs have parts of is begun by each of them
    begun = sum(-(-min(at + made.span, count) // per_block) - at // per_block for at in starts)
    found += _bytes(d.codes[:blocks])
    scales = [x for x in (d.step, d.low, *d[1:3]) if x is not None] if hasattr(d, "r") else d[1:]
    each = sum(x.element_size() for x in scales)  # of a channel or group
    if hasattr(d, "r"):
        found += _bytes(d.r[:blocks])
    if own.form in ("channels", "dual"):
        once = own.form == "channels" and not own.span
        found += B * H * D * each * (begun if once else count)
    elif who == "k" and own.form == "elements":
        groups = len({token // own.span for token in range(size)})
        found += B * H * D * each * count * groups * (16 // own.bits)
    else:
        found += B * H * n * blocks * (D // own.span) * each
    if code.l is not None:
        a, c = code.l
        found += _bytes(a[:blocks]) + begun * _bytes(c[0])
    return found
