"""The bytes that a launch of `attend_coded` moves, told from shapes and sizes of elements alone."""

from __future__ import annotations

from typing import Any

import torch

from kvc.cuda_kernels import attend_coded_form as form
from kvc.cuda_kernels.attend_coded import Plan, least, plan
from kvc.cuda_kernels.launch import Traffic
from kvc.ops.past import Layout
from kvc.ops.quant import Role
from kvc.ops.scales import Dual


def traffic(q: torch.Tensor, k: Layout, v: Layout, valid: bool = False) -> Traffic:
    """Bytes of a call without outliers and originals; tensors may be of the device `meta`.

    Which entries are exact depends on values, and so do the bytes that finding them takes.
    """
    made = plan(q, k, v)
    B, H, D, n, blocks = form.shape(k)
    queries = q.numel() * q.element_size()
    answer = q[..., 0].numel() * (D + 1) * 4
    mask = B * H * n * blocks if valid else 0
    touched = made.splits * (queries + answer) + made.tiles * mask
    given = form.folded(k, "k") if made.folds else {}
    turned = bool(form.turned(k))
    if given.get("K_GROUP"):  # parts of q are read by themselves
        touched += made.splits * queries * (D // given["K_GROUP"] if turned else 1)
    if turned:
        touched += made.splits * queries
    touched += made.tiles * (_touched(k, "k", made) + _touched(v, "v", made))
    return Traffic(touched, queries + answer + mask + least(k) + least(v))


def _touched(layout: Layout, who: Role, made: Plan) -> int:
    """What the programs of all heads and splits read, for one tile of rows."""
    B, H, D, n, blocks = form.shape(layout)
    found = 0
    if layout.norm is not None:
        found += B * H * n * blocks * layout.norm.element_size()
    if layout.dense is not None:
        return found + layout.dense.numel() * layout.dense.element_size()
    size = made.config.tile
    per_block = -(-n // size)
    count = per_block * blocks
    share = made.splits * max(1, made.teams)
    span = -(-count // share) * max(1, made.teams)
    edges = [(at, min(at + span, count)) for at in range(0, count, span)]
    # a block that several programs have parts of is begun by each of them, and by all of its teams
    begun = sum(-(-stop // per_block) - at // per_block for at, stop in edges)
    code: Any = layout.runs[0].code
    d, fit = code.d, code.l
    found += sum(_bytes(x[:blocks]) for x in (d.codes, getattr(d, "r", None)) if x is not None)
    scales = d[1:]
    if isinstance(d, Dual):
        scales = [x for x in (d.mu, d.c, d.step, d.low) if x is not None]
    each = sum(x.element_size() for x in scales)  # of a group
    given = form.decoded(layout, who)
    tokens, channels = given[f"{who.upper()}_TOKENS"], given[f"{who.upper()}_CHANNELS"]
    if tokens == 1:
        found += B * H * n * blocks * (D // channels) * each
    elif not tokens:
        found += B * H * D * each * begun
    elif tokens % size:  # a step for an element
        found += B * H * D * each * count * len({i // tokens for i in range(size)})
    else:
        # teams read at once what they share; what is decoded is read a stretch of steps at a time
        rounds = edges
        if made.folds:
            rounds = [
                (x, min(x + made.teams, stop))
                for at, stop in edges
                for x in range(at, stop, made.teams)
            ]
        shared = sum((b - 1) * size // tokens - a * size // tokens + 1 for a, b in rounds)
        found += B * H * D * each * shared
    if fit is not None:
        found += _bytes(fit.a[:blocks])
        found += (count if D > 128 else begun) * _bytes(fit.c[0])  # the many for each tile
    return found


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
