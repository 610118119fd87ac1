"""LESS's cache of one layer: the tokens that a policy keeps, and the state of those that go.

Dong et al. 2024, arXiv:2402.09398. Policies: H2O (arXiv:2306.14048), sink and recent
(arXiv:2309.17453), TOVA (arXiv:2401.06104).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvc.backends.base import ALONE, Array, Shard, ops_of
from kvc.errors import ConfigError
from kvc.methods.gear import Gear
from kvc.methods.less import Less
from kvc.ops.attention import Partial, attend_coded, attend_dense
from kvc.ops.evict import Kernels, admit, attend_state, fold_evicted
from kvc.ops.mass import log_probs
from kvc.store.kept import Kept, pick
from kvc.store.unit import Part, Query, check_finite
from kvc.store.watch import RECALL, Watch, mass

FOLD = 1024  # evicted tokens that are folded at a time; their hidden features are M wide


@dataclass(slots=True)
class Evicting:
    """A ring of the newest tokens, the kept ones before them, and the state of the evicted.

    A step's tokens enter the ring; when the next ones come, what is more than `recent` leaves it
    and competes with the kept tokens; who loses is folded into the state. So a step sees h + w
    tokens and its own, and its tokens can be taken back until the next one.
    """

    less: Less
    layer: int
    maps: Callable[[int], Kernels | None]  # a layer's learned maps
    k: Array  # [B, H, capacity, D], the ring: w + 1 tokens, more while a longer step is in it
    v: Array
    pos: Array  # int32 [B, H, capacity]
    score: Array | None  # float32 [B, H, capacity], of H2O alone
    kept: Kept
    state: Array | None = None  # float32 [B, H, R, D]
    norm: Array | None = None  # float32 [B, H, R]
    watch: Watch = field(default_factory=Watch)
    n: int = 0  # tokens in the ring
    start: int = 0  # where its oldest is
    seen: int = 0
    fresh: int = 0  # tokens of the newest append
    shard: Shard = ALONE  # the heads that they have

    @classmethod
    def of(
        cls,
        less: Less,
        codec: Gear | None,
        layer: int,
        maps: Callable[[int], Kernels | None],
        k: Array,
        v: Array,
        score: Array | None,
        watch: Watch,
        shard: Shard,
    ) -> Evicting:
        """The cache of a prompt [B, H, T, D] of which all is in the ring still.

        `score` and `watch` hold what H2O has summed up to now, and the queries that wait.
        """
        xp, wide = ops_of(k), ops_of(k).promote(k[:, :, :0]).dtype
        B, H, T, D = k.shape
        heavy = less.policy == "h2o"
        if heavy and score is None:
            score = xp.zeros((B, H, T), wide, k)
        pos = xp.copy(xp.broadcast_to(xp.arange(T, k), (B, H, T)))
        kept = Kept.empty(k, int(less.heavy), heavy, codec)
        unit = cls(less, layer, maps, k, v, pos, score, kept, watch=watch, n=T, seen=T, fresh=T)
        unit.shard = shard
        if own := maps(layer):
            R = own.b2.shape[-1]
            unit.state, unit.norm = xp.zeros((B, H, R, D), wide, k), xp.zeros((B, H, R), wide, k)
        return unit

    @property
    def faces(self) -> tuple[Evicting]:
        """The only layer's side."""
        return (self,)

    @property
    def held(self) -> int:
        """How many of the newest tokens can be forgotten: those of the last step.

        The mass of older queries than the watch holds is in the scores for good.
        """
        return self.fresh if self.less.policy == "sink" else min(self.fresh, RECALL)

    def append(self, k: Array, v: Array) -> None:
        """Adds tokens [B, H, L, D] to the ring."""
        xp, L, size = ops_of(k), k.shape[2], self.k.shape[2]
        self._account()
        if self.n + L > size or (L > 1 and self.start):
            self._unroll(max(size, self.n + L))
        at = (self.start + self.n) % self.k.shape[2]
        pos = xp.broadcast_to(xp.arange(L, k) + self.seen, (*k.shape[:2], L))
        self.k, self.v = xp.write(self.k, at, k, 2), xp.write(self.v, at, v, 2)
        self.pos = xp.write(self.pos, at, pos, 2)
        if self.score is not None:
            self.score = xp.write(self.score, at, xp.zeros(pos.shape, self.score.dtype, k), 2)
        self.n, self.seen, self.fresh = self.n + L, self.seen + L, L

    def _unroll(self, capacity: int) -> None:
        """Puts the ring in order of time, in buffers for `capacity` tokens."""

        def unroll(x: Array) -> Array:
            xp = ops_of(x)
            begin, end = self.start, self.start + self.n
            live = [x[:, :, begin:end], x[:, :, : max(0, end - x.shape[2])]]
            room = (*x.shape[:2], capacity - self.n, *x.shape[3:])
            return xp.concat([*live, xp.zeros(room, x.dtype, x)], 2)

        self.k, self.v, self.pos = unroll(self.k), unroll(self.v), unroll(self.pos)
        self.score = None if self.score is None else unroll(self.score)
        self.start = 0

    def fitted(self) -> Evicting:
        """The same with the ring in order of time, in buffers that it fills."""
        new = replace(self)
        new._unroll(self.n)
        return new

    def _live(self, x: Array) -> Array:
        """The ring's tokens; in order of time unless it is full."""
        return x if self.n == x.shape[2] else x[:, :, self.start : self.start + self.n]

    def settle(self, prompt: bool) -> None:
        """Adds the last step's attention mass, and lets go what is over the budget.

        Raises:
            KVCError: if a prompt's K or V hold NaN or infinity, naming the layer.
        """
        if prompt:  # later tokens are not looked at: it would stall the device
            check_finite(self.layer, self.k, self.v)
        transient = self._latest() if self.less.policy == "tova" else None
        self._account()
        recent = int(self.less.recent)
        leaving = self.n - recent
        if leaving > 0:
            if self.start + leaving > self.k.shape[2]:
                self._unroll(self.k.shape[2])
            self._let_go(leaving, transient)
            self.start, self.n = (self.start + leaving) % self.k.shape[2], self.n - leaving
        if prompt or self.k.shape[2] != recent + 1:
            self._unroll(recent + 1)
        self.fresh = 0

    def _account(self) -> None:
        """Adds the mass of the queries that wait to H2O's scores."""
        if self.watch.query is not None and self.less.policy == "h2o":
            self._add(self.watch.query, self.n)
        self.watch.query = None

    def _latest(self) -> tuple[Array, Array] | None:
        """TOVA's scores of kept tokens and ring: log of the newest query's mean probabilities.

        They are the same for all heads, so that all heads keep the same tokens.
        """
        query = self.watch.query
        if query is None:
            return None
        xp, h = ops_of(query.q), self.kept.n
        k, valid = self._keys(self.n)
        found = log_probs(
            query.q[:, :, -1:], k, query.scale,
            valid=valid, softcap=query.softcap, sinks=query.sinks, shard=self.shard,
        )  # fmt: skip
        found = xp.broadcast_to(found[:, None], k.shape[:3])
        return found[..., :h], found[..., h:]

    def _keys(self, n: int) -> tuple[Array, Array]:
        """Keys of the kept tokens and of the first `n` in the ring, and which of them there are."""
        xp = ops_of(self.k)
        ring = xp.promote(self._live(self.k)[:, :, :n])
        pos = xp.concat([self.kept.pos, self._live(self.pos)[:, :, :n]], 2)
        return xp.concat([xp.promote(self.kept.tokens()[0]), ring], 2), pos >= 0

    def _add(self, query: Query, n: int) -> None:
        """Adds the mass of queries that are the newest of the first `n` in the ring."""
        xp, kept = ops_of(self.k), self.kept
        score: Any = self.score
        found = xp.astype(mass(query, *self._keys(n)), score.dtype)
        kept.score = kept.score + found[..., : kept.n]
        at = 0 if self.n == self.k.shape[2] else self.start
        self.score = xp.write(score, at, score[:, :, at : at + n] + found[..., kept.n :], 2)

    def _let_go(self, n: int, transient: tuple[Array, Array] | None) -> None:
        """Lets the ring's oldest `n` compete with the kept tokens, and folds who loses."""
        kept, span = self.kept, slice(self.start, self.start + n)
        k, v, pos = self.k[:, :, span], self.v[:, :, span], self.pos[:, :, span]
        score = None if self.score is None else self.score[:, :, span]
        if self.less.policy == "sink" and self.seen - self.n >= kept.n:
            self._fold(k, v, pos >= 0)  # the first tokens are kept, and stay for ever
            return
        if self.less.policy == "sink":
            ranks = (-kept.pos, -pos)
        elif transient is not None:
            ranks = (transient[0], transient[1][:, :, :n])
        else:
            ranks = self._ranks(kept.score, kept.pos), self._ranks(score, pos)
        source, evicted = admit(kept.pos, ranks[0], pos, ranks[1])
        if self.state is not None:
            xp = ops_of(k)
            old_k, old_v = (xp.promote(x) for x in kept.tokens())
            for start in range(0, n, FOLD):
                some = evicted[..., start : start + FOLD]
                gone_k, gone_v = pick(old_k, xp.promote(k), some), pick(old_v, xp.promote(v), some)
                self._fold(gone_k, gone_v, pick(kept.pos, pos, some) >= 0)
        kept.take(k, v, pos, score, source)

    def _ranks(self, score: Array, pos: Array) -> Array:
        """H2O's scores, or those for each query that could see the token."""
        if not self.less.normalize:
            return score
        return score / ops_of(pos).astype(self.seen - pos, score.dtype)

    def _fold(self, k: Array, v: Array, valid: Array) -> None:
        if (maps := self.maps(self.layer)) and self.state is not None:
            self.state, self.norm = fold_evicted(self.state, self.norm, k, v, valid, maps)

    def attend(self, query: Query) -> Partial:
        """The answer of ring, kept tokens and state; the newest L are the queries' own."""
        noted = query.reader == self.layer and self.less.policy != "sink" and self.fresh > 0
        if noted:
            own = query.q.shape[2] - self.fresh  # queries before it are padding's
            early = self.watch.see(query._replace(q=query.q[:, :, max(0, own) :]))
            if early is not None and self.less.policy == "h2o":
                self._add(early, self.n - RECALL)
        q, scale, softcap, parts = query.q, query.scale, query.softcap, []
        if self.kept.n:
            valid = self.kept.pos >= 0
            if self.kept.codec:
                kept = self.kept.pasts()
                parts.append(attend_coded(q, *kept, scale, softcap=softcap, valid=valid))
            else:
                k, v = self.kept.tokens()
                parts.append(attend_dense(q, k, v, scale, softcap=softcap, valid=valid))
        if (maps := self.maps(query.reader)) and self.state is not None:
            parts.append(attend_state(q, self.state, self.norm, maps))
        answer = attend_dense(
            q, self._live(self.k), self._live(self.v), scale,
            causal=True, softcap=softcap, joined=parts, sinks=query.sinks, dtype=q.dtype,
        )  # fmt: skip
        waiting = self.watch.query
        if noted and waiting and self.less.policy == "h2o" and self.state is None:
            newest = answer.lse[:, :, q.shape[2] - waiting.q.shape[2] :]
            self.watch.query = waiting._replace(lse=ops_of(newest).copy(newest))
        return answer

    def read(self) -> tuple[Array, Array]:
        """Not to be had: most tokens are gone, and the heads keep different ones.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"less: a cache that evicts by {self.less.policy} has no dense keys and values; "
            "let attention read it, or use a method that only compresses"
        )

    def trim(self, n: int) -> None:
        """Forgets the newest `n` tokens, at most `held`."""
        if self.start:
            self._unroll(self.k.shape[2])
        self.n, self.seen, self.fresh = self.n - n, self.seen - n, self.fresh - n
        self.watch.trim(n)

    def rows(self, rows: Sequence[int]) -> Evicting:
        """Some of the rows, which may repeat."""

        def take(x: Array | None) -> Array | None:
            return None if x is None else ops_of(x).take(x, rows, 0)

        names = ("k", "v", "pos", "score", "state", "norm")
        taken: dict[str, Any] = {name: take(getattr(self, name)) for name in names}
        return replace(self, **taken, kept=self.kept.rows(rows), watch=self.watch.rows(rows))

    def parts(self) -> Iterator[Part]:
        """Every array that is held."""
        ring = {"window": (self.k, self.v), "positions": (self.pos,), "scores": (self.score,)}
        for name, arrays in ring.items():
            for x in arrays:
                if x is not None:
                    yield name, x, x.nbytes // max(1, x.shape[2]) * (x.shape[2] - self.n)
        yield from self.kept.parts()
        yield from self.watch.parts()
        if self.state is not None:
            yield from (("state", x, 0) for x in (self.state, self.norm))

    def shared(self) -> Iterator[Part]:
        """Nothing: there is one layer."""
        return iter(())
