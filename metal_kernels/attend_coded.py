"""Attention over coded tokens, read as they lie: one launch for a run of equal blocks."""

from __future__ import annotations

import mlx.core as mx

from kvc.metal_kernels import coded, join
from kvc.metal_kernels.coded import PIECE, Side, side
from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.attention import Partial
from kvc.ops.past import Layout, Past
from kvc.ops.scales import GRID_STEP

SIMDS = 4  # simdgroups of a threadgroup, which take a piece each at a time
SHORT = 512 // PIECE  # pieces of a split at least, so that it is worth an answer of its own
SPARSE = 1536 // PIECE  # the same where a split has to seek its first outliers in each channel
ROWS = 8  # queries that share a read; more of them do not fit into registers
FILL = 512  # threadgroups that fill a large GPU; more splits are only more to join
QUERIES = 8
GROUP = 16
BUFFERS = 31  # that Metal takes
OWN = 9  # of them are q, its shape and strides, four of sizes and numbers, out and lse


def why_not(
    q: mx.array,
    k: Past,
    v: Past,
    scale: float,
    *,
    softcap: float | None = None,
    valid: mx.array | None = None,
    length: mx.array | None = None,
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    _, Hq, L, D = q.shape
    if q.dtype not in DTYPES:
        return f"takes float16, bfloat16 or float32 queries, not {q.dtype}"
    if L > QUERIES:
        return f"takes up to {QUERIES} queries per step, not {L}"
    if length is not None:
        return "takes the tokens that there are, not room for more and a length"
    if reason := join.why_not_answers(D, (), None):
        return reason
    pieces = k.pieces(), v.pieces()
    if [piece.n for piece in pieces[0]] != [piece.n for piece in pieces[1]]:
        return "takes keys and values whose blocks are of the same tokens"
    for of_k, of_v in zip(*pieces, strict=True):
        in_k, in_v = of_k.layout(), of_v.layout()
        if in_k is None or in_v is None:
            return "takes tokens that lie in one way"
        if reason := coded.why_not(in_k, "k") or coded.why_not(in_v, "v"):
            return reason
        given = OWN + 2 * (valid is not None)
        if reason := _why_not_both(Hq, side(in_k, "k"), side(in_v, "v"), given):
            return reason
    return None


def _why_not_both(Hq: int, k: Side, v: Side, given: int) -> str | None:
    """Why keys and values cannot be read together."""
    if Hq > GROUP * k.heads:
        return f"takes up to {GROUP} query heads per head of K and V, not {Hq // k.heads}"
    if (k.n, k.blocks) != (v.n, v.blocks) or k.layout.start != v.layout.start:
        return "takes keys and values whose blocks are of the same tokens"
    if k.rank and v.rank and k.rank != v.rank:
        return f"takes one rank of keys and values, not {k.rank} and {v.rank}"
    if k.rotated != v.rotated:
        return "takes keys and values that are both rotated or both not"
    if not (k.bits or v.bits) and k.dtype != v.dtype:
        return f"takes K and V of one dtype, not {k.dtype} and {v.dtype}"
    buffers = given + k.buffers + v.buffers
    if buffers > BUFFERS:
        return f"takes up to {BUFFERS} buffers, not {buffers}"
    return None


def run(
    q: mx.array,
    k: Past,
    v: Past,
    scale: float,
    *,
    softcap: float | None = None,
    valid: mx.array | None = None,
    length: mx.array | None = None,
) -> Partial:
    """As `kvc.ops.attention.attend_coded`; the answers of splits are stacked, and those of runs."""
    parts, start = [], 0
    for of_k, of_v in zip(k.pieces(), v.pieces(), strict=True):
        stop = start + of_k.n
        some = None if valid is None else valid[:, :, start:stop]
        parts.append(_answer(q, of_k, of_v, scale, softcap, some))
        start = stop
    if len(parts) == 1:
        return parts[0]
    return Partial(*(mx.concatenate([part[i] for part in parts]) for i in (0, 1)))


def _answer(
    q: mx.array,
    k: Past,
    v: Past,
    scale: float,
    softcap: float | None,
    valid: mx.array | None,
) -> Partial:
    """The answer over one run."""
    in_k, in_v = _layout(k), _layout(v)
    of_k, of_v = side(in_k, "k"), side(in_v, "v")
    B, Hq, L, D = q.shape
    H = of_k.heads
    rows = Hq // H * L
    tiles = -(-rows // ROWS)
    pieces = of_k.blocks * -(-of_k.n // PIECE)
    sparse = "k_index" in of_k.inputs and of_k.blocks == 1
    span = _span(pieces, SPARSE if sparse else SHORT, B * H * tiles)
    S = -(-pieces // span)
    if valid is not None:  # of eight elements or more, however short it is
        valid = mx.broadcast_to(valid, (8, B, H, k.n))
    step = GRID_STEP[2]
    threads = PIECE * SIMDS
    out, lse = launch(
        "attend_coded",
        {
            "q": q,
            "valid": valid,
            # fewer than eight numbers each, so that they are constants
            "sizes": mx.array([H, of_k.n, pieces, span, in_k.start], mx.int32),
            "k_sizes": mx.array(of_k.sizes, mx.int32),
            "v_sizes": mx.array(of_v.sizes, mx.int32),
            "numbers": mx.array(
                [scale, softcap or 0.0, in_k.gain, in_v.gain, step, -1.5 * step], mx.float32
            ),
            **of_k.inputs,
            **of_v.inputs,
        },
        {"out": ((S, B, Hq, L, D), mx.float32), "lse": ((S, B, Hq, L), mx.float32)},
        template={
            "T": of_k.dtype if of_k.bits == 0 else of_v.dtype,
            "D": D,
            "ROWS": -(-rows // tiles),
            "SIMDS": SIMDS,
            "K_BITS": of_k.bits,
            "V_BITS": of_v.bits,
            "KEYS": of_k.kind,
            "K_GROUPS": of_k.groups,
            "V_WHOLE": of_v.whole,
            "RANK": of_k.rank or of_v.rank,
            "TURN": of_k.rotated,
        },
        grid=(threads * tiles, B * H, S),
        threadgroup=(threads, 1, 1),
        include=("softmax", "coded", "coded_rest", "coded_tile"),
    )
    return Partial(out, lse)


def _layout(past: Past) -> Layout:
    layout = past.layout()
    assert layout is not None  # as `why_not` has seen
    return layout


def _span(pieces: int, short: int, groups: int) -> int:
    """How many pieces a threadgroup takes, of `groups` threadgroups per split."""
    splits = max(1, min(pieces // short, -(-FILL // groups)))
    return -(-pieces // (splits * SIMDS)) * SIMDS
