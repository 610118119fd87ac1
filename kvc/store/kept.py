"""The tokens that an eviction policy keeps beyond the newest, as they came or coded one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvc.backends.base import Array, ops_of
from kvc.methods.gear import Gear
from kvc.ops.codec import Code, Spec, arrays, decode, encode, map_code
from kvc.ops.quant import Role
from kvc.ops.residual import Seed
from kvc.store.coded import Coded, Run
from kvc.store.unit import Part


@dataclass(slots=True)
class Kept:
    """The h kept tokens of each head; a slot is used again when its token goes."""

    k: Array | Code  # [B, H, h, D], or codes of it
    v: Array | Code
    pos: Array  # int32 [B, H, h], -1 where a slot is empty
    score: Array | None  # float32 [B, H, h], of H2O alone
    codec: Gear | None
    head_dim: int

    @classmethod
    def empty(cls, k: Array, n: int, scored: bool, codec: Gear | None) -> Kept:
        """`n` slots for tokens like `k` [B, H, T, D], with room for scores or without."""
        xp = ops_of(k)
        B, H, _, D = k.shape
        nothing: Any = xp.zeros((B, H, n, D), k.dtype, k)
        pos = xp.zeros((B, H, n), xp.dtype("int32"), k) - 1
        score = xp.zeros((B, H, n), xp.promote(k[:, :, :0]).dtype, k) if scored else None
        kept = cls(nothing, nothing, pos, score, codec, D)
        kept.k, kept.v = kept._stored(nothing, nothing)
        return kept

    @property
    def n(self) -> int:
        """How many slots there are."""
        return int(self.pos.shape[2])

    def tokens(self) -> tuple[Array, Array]:
        """K and V [B, H, h, D]."""
        if self.codec is None:
            return self.k, self.v
        k, v = specs_of(self.codec, self.n, self.head_dim)
        return decode(self.k, k), decode(self.v, v)

    def pasts(self) -> tuple[Coded, Coded]:
        """K and V where they are coded, for attention to read."""
        codec: Any = self.codec
        specs, pasts = specs_of(codec, self.n, self.head_dim), []
        roles: tuple[Role, Role] = ("k", "v")
        for role, code, spec in zip(roles, (self.k, self.v), specs, strict=True):
            run = Run(map_code(lambda x: x[None], code), spec, 1)
            pasts.append(Coded(codec, role, 0, [run]))
        return pasts[0], pasts[1]

    def take(self, k: Array, v: Array, pos: Array, score: Array | None, source: Array) -> None:
        """Fills the slots by `source` [B, H, h]: from the slots, and behind them the leaving.

        Shapes: k, v [B, H, n, D]; pos, score [B, H, n].
        """

        def chosen(kept: Array, leaving: Array) -> Array:
            if leaving.shape[2] > 1:
                return pick(kept, leaving, source)
            # In decoding one token leaves, and it takes one slot or none: no gather is needed.
            taken = source.reshape(*source.shape, *[1] * (kept.ndim - 3)) == self.n
            return ops_of(kept).where(taken, leaving, kept)

        stored = self._stored(k, v)
        if self.codec is None:
            self.k, self.v = chosen(self.k, stored[0]), chosen(self.v, stored[1])
        else:
            self.k, self.v = (
                map_code(chosen, self.k, stored[0]),
                map_code(chosen, self.v, stored[1]),
            )
        self.pos = chosen(self.pos, pos)
        if self.score is not None:
            self.score = chosen(self.score, score)

    def _stored(self, k: Array, v: Array) -> tuple[Array | Code, Array | Code]:
        """Tokens as slots hold them."""
        if self.codec is None:
            return k, v
        plain: Any = {"rank": 0, "outliers": 0.0, "n_iter": 1, "seed": Seed(0, 0, 0)}
        of_k, of_v = specs_of(self.codec, k.shape[2], self.head_dim)
        return encode(k, of_k, **plain), encode(v, of_v, **plain)

    def rows(self, rows: Sequence[int]) -> Kept:
        """Some of the rows, which may repeat."""

        def take(x: Any) -> Any:
            if isinstance(x, Code):
                return map_code(take, x)
            return None if x is None else ops_of(x).take(x, rows, 0)

        names = ("k", "v", "pos", "score")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def parts(self) -> Iterator[Part]:
        """Every array that is held."""
        for kept in (self.k, self.v):
            named = arrays(kept) if isinstance(kept, Code) else [("kept", kept)]
            yield from ((name, x, 0) for name, x in named)
        yield "positions", self.pos, 0
        if self.score is not None:
            yield "scores", self.score, 0


def pick(kept: Array, leaving: Array, source: Array) -> Array:
    """Entries of the kept and the leaving, one behind the other, by index along axis 2."""
    xp = ops_of(kept)
    both = xp.concat([kept, leaving], 2)
    index = source.reshape(*source.shape, *[1] * (both.ndim - 3))
    return xp.take_along_axis(both, xp.broadcast_to(index, (*source.shape, *both.shape[3:])), 2)


def specs_of(codec: Gear, n: int, head_dim: int) -> tuple[Spec, Spec]:
    """How K and V of `n` slots are coded: both laid out as V is, a row for a token."""
    return replace(codec.spec("k", n, head_dim), role="v"), codec.spec("v", n, head_dim)
