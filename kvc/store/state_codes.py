"""The state of coded tokens: the arrays of each run, whose shapes follow from its `Spec`."""

from __future__ import annotations

from typing import Any

from kvc.backends.base import Array
from kvc.methods.gear import Gear
from kvc.ops.codec import Code, Spec, map_code
from kvc.ops.quant import Quantized, Role, n_words
from kvc.ops.residual import LowRank, Outliers, outlier_count
from kvc.ops.scales import GRID_STEP, Dual
from kvc.store.archive import Archive, Sizes
from kvc.store.coded import Coded, Run


def walk_coded(
    ar: Archive, x: Coded | None, codec: Gear, role: Role, layer: int, of: Sizes
) -> Coded | None:
    """All coded tokens of K or of V: `runs` as [blocks, tokens of a block, rank], and each run's.

    Args:
        ar: Where they are.
        x: What the store has, if it has some.
        codec: Of the layer.
        role: Of the tensor.
        layer: The store's number.
        of: Sizes of the layer; there can be no more tokens than it has.

    Raises:
        CacheFileError: If a file has none of that shape.
    """
    runs = x.runs if x else []
    counts = ar.value("runs", [[run.n, run.spec.n, _rank(run.code)] for run in runs])
    _check_runs(ar, counts, codec, role, of)
    if not counts:
        return None
    new = []
    for i, (blocks, size, rank) in enumerate(counts):
        spec = codec.spec(role, size, of.head_dim)
        live = map_code(lambda x: x[:blocks], runs[i].code) if runs else None  # noqa: B023
        lead = (blocks, of.rows)
        code = walk_code(ar.at(f"run{i}"), live, spec, lead, of, rank, codec.outliers)
        new.append(Run(code, spec, blocks))
    return Coded(codec, role, layer, new)


def _rank(code: Code) -> int:
    return int(code.l.a.shape[-1]) if code.l else 0


def _check_runs(ar: Archive, counts: Any, codec: Gear, role: Role, of: Sizes) -> None:
    """That runs can be: a prompt's block, and behind it blocks of a buffer each."""
    size_of = 1 if codec.value_window == "sliding" and role == "v" else codec.buffer
    total = 0
    if type(counts) is not list:
        ar.refuse("runs", "a list", counts)
    for run in counts:
        if type(run) is not list or len(run) != 3 or any(type(n) is not int for n in run):
            ar.refuse("runs", "[blocks, tokens, rank]", run)
        blocks, size, rank = run
        ranks = {min(r, size, of.head_dim) for r in (codec.prefill_rank, codec.rank)}
        if blocks < 1 or size < 1 or size % size_of or rank not in ranks:
            ar.refuse("runs", f"blocks of whole {size_of} tokens, of rank {sorted(ranks)}", run)
        total += blocks * size
    if total > of.n:
        ar.refuse("runs", f"{of.n} tokens at most", total)


def walk_code(
    ar: Archive,
    x: Code | None,
    spec: Spec,
    lead: tuple[int, ...],
    of: Sizes,
    rank: int,
    outliers: float,
) -> Code:
    """The arrays of one code, or of equal ones behind each other.

    Args:
        ar: Where they are.
        x: What the store has.
        spec: How each is coded.
        lead: The axes in front of the heads.
        of: Sizes of the layer.
        rank: Of the low-rank fit, 0 for none.
        outliers: Fraction that is kept exactly.
    """
    H, n, D = of.heads, spec.n, spec.head_dim
    scale, zero = spec.scale_dtype or of.dtype, spec.zero_dtype or of.dtype
    words = (D, n_words(n, spec.bits)) if spec.role == "k" else (n, n_words(D, spec.bits))
    d: Any = x and x.d
    codes = ar.array("codes", d and d.codes, "uint32", (*lead, H, *words), packed=True)

    def part(name: str, dtype: str, *shape: int) -> Array:
        return ar.array(name, d and getattr(d, name), dtype, (*lead, *shape))

    backbone: Quantized | Dual
    if spec.scales == "dual":
        tiles = (H, max(1, n // spec.tile), D)
        mu, c, r = part("mu", scale, *tiles), part("c", scale, *tiles), part("r", scale, H, n)
        step = low = None
        if spec.bits not in GRID_STEP:
            step, low = part("step", scale, *tiles), part("low", zero, *tiles)
        backbone = Dual(codes, mu, c, r, step, low)
    else:
        groups: tuple[int, ...] = (H, n, D // spec.group_size, 1)
        if spec.backbone == "kcvt":
            groups = (H, 1, 1, D) if spec.role == "k" else (1, n, 1, 1)
        elif spec.backbone == "kivi" and spec.role == "k":
            groups = (H, n // spec.group_size, 1, D)
        backbone = Quantized(codes, part("step", scale, *groups), part("low", zero, *groups))
    l: Any = x and x.l
    low_rank = None
    if rank:
        a = ar.array("a", l and l.a, of.dtype, (*lead, H, n, rank))
        low_rank = LowRank(a, ar.array("c_low_rank", l and l.c, of.dtype, (*lead, H, D, rank)))
    s: Any = x and x.s
    row = n if spec.role == "k" else H * D
    k = 2 * outlier_count(outliers, row)
    if not k:
        return Code(backbone, low_rank, None)
    places = (*lead, H, D, k) if spec.role == "k" else (*lead, n, k)
    kind = "int16" if row <= 2**16 else "int32"
    index = ar.array("index", s and s.index, kind, places, bounds=(0, row - 1))
    return Code(
        backbone, low_rank, Outliers(index, ar.array("delta", s and s.delta, of.dtype, places))
    )
