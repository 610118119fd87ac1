"""LESS: which tokens stay, and the recurrent state of those that go.

Dong et al. 2024, arXiv:2402.09398.

Departures: no floor under the denominator; a query whose features do not meet the state
(phi z = 0) sees the kept tokens alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kvc.backends.base import Array, ops_of
from kvc.ops.attention import Partial
from kvc.ops.dispatch import op


class Kernels(NamedTuple):
    """The learned maps of one layer: of queries per query head, of keys per key/value head."""

    a1: Array  # [Hq, D, M]
    a2: Array  # [Hq, M, R]
    b1: Array  # [H, D, M]
    b2: Array  # [H, M, R]
    b3: Array  # [H, R, R]
    s1: Array  # [H, R]
    s2: Array  # [H, R]


def phi(q: Array, kernels: Kernels, drop: Array | None = None) -> Array:
    """Query features |GELU(GELU(q A1) A2)|; q after RoPE, without 1 / sqrt(D).

    `drop` are dropout's factors of the hidden features before their GELU, in training.

    Shapes: q [B, Hq, L, D]; drop [B, Hq, 1, M]; returns [B, Hq, L, R].
    """
    xp = ops_of(q)
    q = xp.promote(q)
    a1, a2 = (xp.astype(a, q.dtype) for a in kernels[:2])
    hidden = q @ a1 if drop is None else q @ a1 * drop
    return xp.abs(xp.gelu(xp.gelu(hidden) @ a2))


def psi(k: Array, kernels: Kernels, drop: Array | None = None) -> Array:
    """Key features |u + (u B3) s2|, u = |s1| GELU(GELU(k B1) B2); `drop` as in `phi`.

    Shapes: k [B, H, T, D]; drop [B, H, 1, M]; returns [B, H, T, R].
    """
    xp = ops_of(k)
    k = xp.promote(k)
    b1, b2, b3, s1, s2 = (xp.astype(b, k.dtype) for b in kernels[2:])
    hidden = k @ b1 if drop is None else k @ b1 * drop
    u = xp.abs(s1)[:, None, :] * xp.gelu(xp.gelu(hidden) @ b2)
    return xp.abs(u + (u @ b3) * s2[:, None, :])


@op
def fold_evicted(
    state: Array, norm: Array, k: Array, v: Array, valid: Array, kernels: Kernels
) -> tuple[Array, Array]:
    """Each evicted token once: Hs += psi(k) v^T, z += psi(k). Whatever is not valid adds nothing.

    Shapes: state [B, H, R, D]; norm [B, H, R]; k, v [B, H, T, D]; valid bool [B, H or 1, T].
    """
    xp = ops_of(state)
    seen = valid[..., None]
    features = psi(xp.where(seen, xp.promote(k), 0.0), kernels)  # psi(0) = 0
    wide_v = xp.where(seen, xp.promote(v), 0.0)
    return (
        xp.astype(xp.promote(state) + features.swapaxes(-1, -2) @ wide_v, state.dtype),
        xp.astype(xp.promote(norm) + xp.sum(features, -2), norm.dtype),
    )


@op
def attend_state(q: Array, state: Array, norm: Array, kernels: Kernels) -> Partial:
    """What the evicted answer, to join with the kept: phi Hs / rho and log rho, rho = phi z.

    Shapes: q [B, Hq, L, D]; state [B, H, R, D]; norm [B, H, R].
    """
    xp = ops_of(q)
    B, Hq, L, D = q.shape
    H = state.shape[1]
    features = phi(q, kernels).reshape(B, H, Hq // H * L, -1)
    rho = features @ xp.astype(norm, features.dtype)[..., None]
    some = rho > 0
    safe = xp.where(some, rho, 1.0)
    out = (features @ xp.astype(state, features.dtype)) / safe
    lse = xp.where(some, xp.log(safe), -math.inf)
    return Partial(xp.where(some, out, 0.0).reshape(B, Hq, L, D), lse.reshape(B, Hq, L))


def admit(
    kept_pos: Array, kept_score: Array, leave_pos: Array, leave_score: Array
) -> tuple[Array, Array]:
    """Of the h kept and the L that leave the window, which h stay and which L go.

    The lowest scores go, of equal ones the newer; empty slots (position -1) go first. A token that
    stays keeps its slot; a freed slot takes the next survivor of those that leave the window.

    Shapes: positions and scores [B, H, h] and [B, H, L]; returns indices into the concatenation of
    both: source [B, H, h], evicted [B, H, L], lowest first.
    """
    xp = ops_of(kept_pos)
    h, L = kept_pos.shape[-1], leave_pos.shape[-1]
    pos = xp.concat([kept_pos, leave_pos], -1)
    score = xp.concat([xp.promote(kept_score), xp.promote(leave_score)], -1)
    index = xp.broadcast_to(xp.arange(h + L, pos), pos.shape)
    if h == 0 or L == 0:
        return index[..., :h], index[..., h:]
    score = xp.where(pos < 0, -math.inf, xp.maximum(score, -1e38))
    newest = xp.argsort(-pos, -1)
    lowest = xp.argsort(xp.take_along_axis(score, newest, -1), -1)
    evicted = xp.take_along_axis(newest, lowest, -1)[..., :L]
    gone = xp.put_along_axis(xp.zeros(pos.shape, evicted.dtype, pos), evicted, evicted * 0 + 1, -1)
    arriving = xp.argsort(gone[..., h:], -1) + h  # survivors first, in their order
    nth = xp.minimum(xp.maximum(xp.cumsum(gone[..., :h], -1) - 1, 0), L - 1)
    taken = xp.take_along_axis(arriving, xp.astype(nth, evicted.dtype), -1)
    return xp.where(gone[..., :h] > 0, taken, index[..., :h]), evicted
