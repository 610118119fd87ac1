"""One tensor's coded tokens: equal blocks lie behind each other in one buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kvc.backends.base import ALONE, Array, Shard, ops_of
from kvc.methods.gear import Gear
from kvc.ops import folded
from kvc.ops.codec import (
    Code,
    Spec,
    arrays,
    decode,
    encode,
    map_code,
    own_heads,
    spans_heads,
    turn,
)
from kvc.ops.past import Layout, Past
from kvc.ops.quant import Role
from kvc.ops.residual import Seed
from kvc.store.unit import Part

GROWTH = 8  # full buffers grow by one part in so many


@dataclass(slots=True)
class Run:
    """Blocks coded alike: the first `n` of buffers [capacity, B, ...]."""

    code: Code
    spec: Spec
    n: int

    @property
    def tokens(self) -> int:
        """How many tokens the blocks hold together."""
        return self.n * self.spec.n

    def append(self, code: Code) -> None:
        """Adds a block; full buffers grow by one block at least."""

        def put(buffer: Array, new: Array) -> Array:
            xp = ops_of(new)
            if self.n == buffer.shape[0]:
                room = xp.zeros((max(1, self.n // GROWTH), *new.shape), new.dtype, new)
                buffer = xp.concat([buffer, room], 0)
            return xp.write(buffer, self.n, new[None], 0)

        self.code = map_code(put, self.code, code)
        self.n += 1

    def read(self, start: int, stop: int) -> Array:
        """Tokens of the run, decoded: of a long block, or of whole short ones, only what it takes.

        Shapes: returns [B, H, stop - start, D].
        """
        size = self.spec.n
        first, last = start // size, -(-stop // size)
        if last - first == 1:
            block = map_code(lambda x: x[first], self.code)
            return decode(block, self.spec, start - first * size, stop - first * size)

        x = decode(self._merged(first, last), self.spec)
        _, H, n, D = x.shape
        x = x.reshape(last - first, -1, H, n, D).swapaxes(0, 1).swapaxes(1, 2)
        x = x.reshape(x.shape[0], H, (last - first) * n, D)
        return x[:, :, start - first * size : stop - first * size]

    def scores(self, q: Array, start: int, stop: int) -> Array:
        """Products [B, H, R, stop - start] of q [B, H, R, D] with tokens of the run."""
        size = self.spec.n
        first, last = start // size, -(-stop // size)
        if last - first == 1:
            block = map_code(lambda x: x[first], self.code)
            return folded.scores(q, block, self.spec, start - first * size, stop - first * size)
        B, H, R, D = q.shape
        each = ops_of(q).broadcast_to(q, (last - first, B, H, R, D)).reshape(-1, H, R, D)
        found = folded.scores(each, self._merged(first, last), self.spec, 0, size)
        found = found.reshape(last - first, B, H, R, size).swapaxes(0, 1).swapaxes(1, 2)
        found = found.swapaxes(2, 3).reshape(B, H, R, (last - first) * size)
        return found[..., start - first * size : stop - first * size]

    def sums(self, p: Array, start: int, stop: int) -> Array:
        """Sums [B, H, R, D] of tokens of the run weighted by p [B, H, R, stop - start]."""
        size = self.spec.n
        first, last = start // size, -(-stop // size)
        if last - first == 1:
            block = map_code(lambda x: x[first], self.code)
            return folded.sums(p, block, self.spec, start - first * size, stop - first * size)
        if start > first * size or stop < last * size:
            return p @ self.read(start, stop)
        B, H, R, _ = p.shape
        each = p.reshape(B, H, R, last - first, size).swapaxes(2, 3).swapaxes(1, 2).swapaxes(0, 1)
        each = each.reshape(-1, H, R, size)
        found = folded.sums(each, self._merged(first, last), self.spec, 0, size)
        return ops_of(p).sum(found.reshape(last - first, B, H, R, -1), 0)

    def _merged(self, first: int, last: int) -> Code:
        """Some of the blocks as one with as many more rows."""
        return map_code(lambda x: x[first:last].reshape(-1, *x.shape[2:]), self.code)


@dataclass(slots=True)
class Coded(Past):
    """All coded tokens of K or of V of one layer, oldest first; a block is never coded again."""

    codec: Gear
    role: Role
    layer: int
    runs: list[Run] = field(default_factory=list)
    shard: Shard = ALONE  # the heads that they have

    @property
    def n(self) -> int:
        """How many tokens there are."""
        return sum(run.tokens for run in self.runs)

    @property
    def n_kv_heads(self) -> int:
        """How many heads they have."""
        return int(self.runs[0].code.d.codes.shape[2])

    def append(self, x: Array, rank: int) -> None:
        """Codes a block of finite tokens [B, H, n, D] with a low-rank fit of `rank`."""
        codec, count = self.codec, sum(run.n for run in self.runs)
        spec = codec.spec(self.role, x.shape[2], x.shape[3])
        shard, (_, heads, _, head_dim) = self.shard, x.shape
        joint = shard.count > 1 and spans_heads(spec, codec.outliers, heads * shard.count)
        if joint:  # every process codes all heads and keeps its own
            x = shard.whole(x)
        of = (0, 1) if joint else (shard.index, shard.count)
        seed = Seed(codec.seed, self.layer, count, of)
        code = encode(x, spec, rank=rank, outliers=codec.outliers, n_iter=codec.n_iter, seed=seed)
        if joint:
            code = own_heads(code, shard, heads * head_dim)
        if self.runs and self.runs[-1].spec == spec and _alike(self.runs[-1].code, code):
            self.runs[-1].append(code)
        else:
            # a copy, as libraries may hand over arrays with their axes in another order
            self.runs.append(Run(map_code(lambda x: ops_of(x).copy(x[None]), code), spec, 1))

    def read(self, start: int, stop: int) -> Array:
        """Tokens start to stop, decoded, in the coordinates they are stored in."""
        pieces = [run.read(*span) for run, *span in self._runs(start, stop)]
        return pieces[0] if len(pieces) == 1 else ops_of(pieces[0]).concat(pieces, 2)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[Run, int, int]]:
        """The runs that tokens start to stop lie in, and which of each run's tokens those are."""
        at = 0
        for run in self.runs:
            begin, end = max(start - at, 0), min(stop - at, run.tokens)
            if begin < end:
                yield run, begin, end
            at += run.tokens

    def scores(self, q: Array, start: int, stop: int) -> Array:
        """Products [B, H, R, stop - start] of q [B, H, R, D] with tokens, which stay coded."""
        found = [run.scores(q, *span) for run, *span in self._runs(start, stop)]
        return found[0] if len(found) == 1 else ops_of(q).concat(found, -1)

    def sums(self, p: Array, start: int, stop: int) -> Array:
        """Sums [B, H, R, D] weighted by p [B, H, R, stop - start] of tokens, which stay coded."""
        at, total = 0, None
        for run, begin, end in self._runs(start, stop):
            found = run.sums(p[..., at : at + end - begin], begin, end)
            total = found if total is None else total + found
            at += end - begin
        return total

    def turn(self, x: Array) -> Array:
        """`x` [..., D] into the coordinates that tokens are stored in, or back."""
        return turn(x, self.runs[0].spec) if self.runs else x

    def layout(self) -> Layout:
        """Its runs."""
        return Layout(runs=self.runs)

    def pieces(self) -> Sequence[Coded]:
        """Each run by itself."""
        return [replace(self, runs=[run]) for run in self.runs]

    def roomy(self) -> Iterator[tuple[Coded, bool]]:
        """Each run by itself; the last, which grows and is told by true, with all its room."""
        *done, last = self.runs
        for run in done:
            yield replace(self, runs=[run]), False
        capacity = last.code.d.codes.shape[0]
        yield replace(self, runs=[replace(last, n=capacity)]), True

    def rows(self, rows: Sequence[int]) -> Coded:
        """Some of the rows, which may repeat."""

        def take(x: Array) -> Array:
            return ops_of(x).take(x, rows, 1)

        runs = [Run(map_code(take, run.code), run.spec, run.n) for run in self.runs]
        return replace(self, runs=runs)

    def parts(self) -> Iterator[Part]:
        """Every array that is held."""
        for run in self.runs:
            for name, x in arrays(run.code):
                yield name, x, x.nbytes // x.shape[0] * (x.shape[0] - run.n)


def _alike(buffers: Code, code: Code) -> bool:
    """Whether a block has arrays of the shapes that the blocks in the buffers have."""
    shapes = [tuple(x.shape[1:]) for _, x in arrays(buffers)]
    return shapes == [tuple(x.shape) for _, x in arrays(code)]
