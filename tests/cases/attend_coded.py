"""Cases of `attend_coded`: codecs, blocks, and what else holds tokens in codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal
from zlib import crc32

import numpy as np

from kvc.backends.base import Array
from kvc.methods import parse
from kvc.methods.gear import Gear
from kvc.methods.minicache import MiniCache
from kvc.ops.codec import map_code
from kvc.ops.past import Past
from kvc.store.coded import Coded, Run
from kvc.store.kept import Kept
from kvc.store.merged import Merged, Originals
from kvc.store.pair import Half
from kvc.store.room import Room
from tests.cases import DTYPES, GROUPS, HEAD_DIMS, TOKENS, label


@dataclass(frozen=True)
class Case:
    """Sizes of a call, and how its tokens are held."""

    method: str = "kivi"  # a codec, or empty for merged tokens that are not coded
    settings: tuple[tuple[str, Any], ...] = ()  # of the codec
    blocks: tuple[int, ...] = (128,)  # tokens that are coded, or merged, together
    # by themselves, as slots that an eviction policy keeps, or as one of two layers' merged tokens
    held: Literal["coded", "kept", "merged"] = "coded"
    dtype: str = "float16"
    B: int = 1
    H: int = 2
    G: int = 1  # query heads of a head
    L: int = 1
    D: int = 64
    softcap: float | None = None
    loud: float = 1.0  # how much larger the queries are; scores that exp cannot take
    merge: tuple[tuple[str, Any], ...] = ()  # settings of the merge
    layer: int = 1  # which of the two merged ones asks

    @property
    def id(self) -> str:
        return label(self).replace("'", "").replace(" ", "")

    @property
    def codec(self) -> Gear | None:
        """The codec of the tokens."""
        return parse(self.method, dict(self.settings)).codec if self.method else None


def args(case: Case) -> dict[str, Any]:
    """q, blocks of k and v, those of another layer, scale and options, in float32."""
    rng = np.random.default_rng(crc32(case.id.encode()))
    B, H, D = case.B, case.H, case.D
    channels = 1 + 5 * (rng.random((2, H, 1, D)) < 0.05)  # some are much larger than the rest

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    def tokens(role: int) -> list[np.ndarray[Any, Any]]:
        return [(draw(B, H, n, D) * channels[role]).astype(np.float32) for n in case.blocks]

    k, v = tokens(0), tokens(1)
    return {
        "q": case.loud * draw(B, H * case.G, case.L, D),
        "k": k,
        "v": v,
        "other_k": [x + 0.5 * draw(*x.shape) for x in k],
        "other_v": [x + 0.5 * draw(*x.shape) for x in v],
        "pos": rng.integers(-1, 3, (B, H, case.blocks[0])).astype(np.int32),
        "scale": D**-0.5,
        "softcap": case.softcap,
    }


def pasts(case: Case, to: Callable[[Any], Array]) -> tuple[Past, Past, Array | None]:
    """K and V as a cache holds them, and which tokens are valid; `to` puts NumPy on a backend."""
    given = args(case)
    if case.held == "kept":
        return _kept(case, given, to)
    if case.held == "merged":
        both = [_merged(case, role, given, to) for role in ("k", "v")]
        return Half(both[0], case.layer), Half(both[1], case.layer), None
    codec, found = case.codec, []
    assert codec is not None
    for role in ("k", "v"):
        coded = Coded(codec, role, 0)
        for i, x in enumerate(given[role]):
            coded.append(to(x), codec.rank if i else codec.prefill_rank)
        found.append(coded)
    return found[0], found[1], None


def _kept(
    case: Case, given: dict[str, Any], to: Callable[[Any], Array]
) -> tuple[Past, Past, Array | None]:
    k, v, pos = to(given["k"][0]), to(given["v"][0]), to(given["pos"])
    n = case.blocks[0]
    kept = Kept.empty(k, n, False, case.codec)
    every = np.broadcast_to(np.arange(n, 2 * n, dtype=np.int32), (case.B, case.H, n))
    kept.take(k, v, pos, None, to(np.ascontiguousarray(every)))
    return *kept.pasts(), kept.pos >= 0


def _merged(case: Case, role: Any, given: dict[str, Any], to: Callable[[Any], Array]) -> Merged:
    codec = case.codec
    a, b = given[role], given[f"other_{role}"]
    directions = Coded(codec, role, 0) if codec else Room.of(to(a[0][:, :, :0]))
    merged = Merged(MiniCache(**dict(case.merge)), directions)
    for i in range(len(a)):
        rank = 0 if codec is None else codec.rank if i else codec.prefill_rank
        merged.append(to(a[i]), to(b[i]), rank)
    return merged


def in_float64(past: Past, exact: Callable[[Array], Any]) -> Past:
    """The same tokens in NumPy; `exact` gives an array's numbers, in float64 if they are floats."""
    if isinstance(past, Coded):
        runs = [Run(map_code(exact, run.code), run.spec, run.n) for run in past.runs]
        return Coded(past.codec, past.role, past.layer, runs)
    assert isinstance(past, Half)
    merged = past.merged
    held, kept = merged.directions, merged.originals
    if isinstance(held, Coded):
        directions: Any = in_float64(held, exact)
    else:
        directions = Room(exact(held.x), held.n)
    wide = replace(
        merged,
        directions=directions,
        norms=merged.norms and tuple(Room(exact(room.x), room.n) for room in merged.norms),
        originals=kept and Originals(exact(kept.index), exact(kept.a), exact(kept.b), kept.bound),
        limits=None,
    )
    return Half(wide, past.which)


def _settings(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


# a method, its settings, and blocks that make one run
HELD: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("kivi", {"group_size": 16}, (176,)),
    ("gear-l", {"group_size": 16, "rank": 4}, (64,) * 3),
    ("gear", {"group_size": 8, "outliers": 0.05, "buffer": 8}, (200,)),
    ("kcvt", {}, (20,) * 7),
    ("token", {}, (45, 45)),
    ("gear2", {"buffer": 64, "outliers": 0.04, "window": 0, "sink": 0}, (128,)),
)


def _held(i: int, bits: int, D: int, **sizes: Any) -> Case:
    method, settings, blocks = HELD[i % len(HELD)]
    more = {"k_bits": bits, "v_bits": (2, 4, 8)[i % 3]} if method == "gear2" else {"bits": bits}
    if method == "token":
        more["group_size"] = D // 2
    return Case(method, _settings(**settings, **more), blocks, D=D, **sizes)


CASES = [
    *(
        _held(i + j + m, bits, dtype=dtype, D=D, G=GROUPS[(i + 2 * j + m) % 4], B=1 + (j + m) % 2)
        for i, dtype in enumerate(DTYPES)
        for j, D in enumerate(HEAD_DIMS)
        for m, bits in enumerate((2, 4, 8))
    ),
    *(
        Case(method, _settings(bits=bits), (T,), H=1 if T == 1000 else 2, G=4)
        for method, bits in (("kcvt", 8), ("token", 4))
        for T in TOKENS
    ),
    # blocks shorter than a piece, longer than a tile, and those that tiles cut
    *(Case("kcvt", _settings(bits=8), (n,) * 5, G=4) for n in (1, 3, 30, 33, 160)),
    *(
        Case("gear", _settings(group_size=8, buffer=8, outliers=0.1, rank=4), (n,) * 4, G=2, B=2)
        for n in (24, 104, 160, 296)
    ),
    # several splits, the prompt's and later runs, and rows of several tiles
    Case("gear", _settings(outliers=0.05), (3200,), H=1),
    Case("gear-l", _settings(bits=4), (1152, 64, 64), H=1, G=4),
    Case("gear2", (), (1152,), H=1, G=4),
    *(Case("kivi", _settings(bits=4), (192,), B=2, G=3, L=n, softcap=2.0) for n in (2, 3, 5, 8)),
    Case("gear", _settings(bits=4, scale_dtype="float32", zero_dtype="float32"), (64,) * 3),
    Case("gear", _settings(k_bits=8, v_bits=4, v_group=16), (128,), dtype="bfloat16", D=16),
    Case("gear", _settings(backbone="kcvt", bits=4, outliers=0.05), (300,), G=4),
    Case("gear", _settings(backbone="token", group_size=32, outliers=0.05), (100, 100), G=4),
    Case("kivi", (), (192,), G=4, loud=25.0),
    Case("kivi", _settings(v_group=32, k_group=64), (192,), H=1, D=128, G=4),
    *(Case("token", _settings(bits=4), (n,), "kept", B=2, G=4) for n in (1, 40, 300)),
    Case("token", _settings(bits=2, group_size=16), (70,), "kept", "float32", G=8, D=80),
    Case("token", _settings(bits=8), (70,), "kept", "bfloat16", G=3, D=128, softcap=2.0),
    *(
        Case("", (), blocks, "merged", dtype, B=2, H=4, G=2, merge=_settings(granularity=grain))
        for dtype, grain in (("float16", "head"), ("bfloat16", "token"), ("float32", "head"))
        for blocks in ((2,), (100, 1, 1), (600,))
    ),
    Case("", (), (40,), "merged", G=2, D=80, merge=_settings(gamma=1.0)),  # all are retained
    *(
        Case(method, (), blocks, "merged", B=2, G=4, merge=merge, layer=layer)
        for method, blocks in (("gear", (128, 64, 64)), ("kcvt", (45, 45)))
        for merge in ((), _settings(how="mean", granularity="token", retention="none"))
        for layer in (0, 1)
    ),
    Case("gear2", (), (256,), "merged", G=4, merge=_settings(retention="none", always_keep=0)),
]
