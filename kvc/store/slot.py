"""The cache of one layer, or of a pair that shares one, through its phases.

While nothing is compressed a slot holds the tokens as they came, padding and all, so that the
library's own attention can run on them. Then rows behind different padding are kept apart, in
units of rows of one length, so that padding can change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvc.backends.base import Array, ops_of
from kvc.errors import ShapeError
from kvc.store.room import Room
from kvc.store.unit import Part, Query, Unit
from kvc.store.watch import RECALL, Watch, mass

Whole = tuple[Room, Room]  # K and V of one layer, of all rows
# Makes the unit of rows of one length, from each layer's tokens, H2O's scores and late queries.
Start = Callable[[list[Whole], Array | None, Watch], Unit]


@dataclass(slots=True)
class Slot:
    """Tokens of `layers`, compressed by the units that `start` makes."""

    layers: tuple[int, ...]
    start: Start
    policy: str = ""  # of eviction: H2O sums up attention mass, TOVA asks the newest query
    whole: dict[int, Whole] = field(default_factory=dict)
    pads: list[int] = field(default_factory=list)  # columns of padding in front of each row
    groups: list[tuple[list[int], Unit]] = field(default_factory=list)
    mass: Array | None = None  # [B, H, T] of the tokens as they came
    watch: Watch = field(default_factory=Watch)
    last: int = 0  # tokens of the newest append
    in_prompt: bool = True
    prompt_due: bool = True  # the prompt is not compressed yet

    def append(self, layer: int, k: Array, v: Array, pads: Sequence[int] | None) -> None:
        """Adds tokens [B, H, L, D] of a layer; `pads` counts the padding in front of each row.

        Raises:
            ShapeError: if the tokens do not fit those before.
        """
        first = layer == self.layers[0]
        if self.groups:
            if first and pads and any(pads):
                self._split_rows(pads)
            for rows, unit in self.groups:
                pad = pads[rows[0]] if pads else 0
                if pad < k.shape[2]:
                    face = unit.faces[self.layers.index(layer)]
                    face.append(_rows(k, rows)[:, :, pad:], _rows(v, rows)[:, :, pad:])
            return
        held = self.whole.get(layer)
        if held is None:
            self.whole[layer] = (Room.of(k), Room.of(v))
            if first:
                self.pads = list(pads or [0] * k.shape[0])
            return
        old = held[0].x
        if old.shape[:2] != k.shape[:2] or old.shape[3] != k.shape[3]:
            raise ShapeError(
                f"layer {layer}: expected tokens like {tuple(old.shape)}, got {tuple(k.shape)}"
            )
        self._account()
        for row, pad in enumerate(pads or ()):
            if first and self.pads[row] == held[0].n:
                self.pads[row] += pad
        held[0].append(k)
        held[1].append(v)

    def _split_rows(self, pads: Sequence[int]) -> None:
        """Parts rows that were nothing but padding by the padding that still comes."""
        groups = []
        for rows, unit in self.groups:
            by_pad: dict[int, list[int]] = {}
            for place, row in enumerate(rows):
                by_pad.setdefault(pads[row], []).append(place)
            for places in by_pad.values():
                alike = unit if len(by_pad) == 1 else unit.rows(places)
                groups.append(([rows[place] for place in places], alike))
        self.groups = groups

    def settle(self, prompt: bool) -> None:
        """Compresses what is due of all layers."""
        if self.whole:
            self._account()
        groups = self.units()
        for _, unit in groups:
            unit.settle(prompt)
        if self.whole and any(name != "window" for _, unit in groups for name, *_ in _parts(unit)):
            self.groups, self.whole, self.mass, self.watch = groups, {}, None, Watch()

    def units(self) -> list[tuple[list[int], Unit]]:
        """The rows that each unit holds; of the tokens as they came, where there are none yet."""
        if self.groups:
            return self.groups
        by_pad: dict[int, list[int]] = {}
        for row, pad in enumerate(self.pads):
            by_pad.setdefault(pad, []).append(row)
        if by_pad.keys() == {0}:
            wholes = [self.whole[layer] for layer in self.layers if layer in self.whole]
            return [(by_pad[0], self.start(wholes, self.mass, self.watch))]
        return [(rows, self._cut(rows, pad)) for pad, rows in by_pad.items()]

    def _cut(self, rows: list[int], pad: int) -> Unit:
        """The unit of rows behind so much padding."""
        wholes = []
        for layer in (layer for layer in self.layers if layer in self.whole):
            k, v = self.whole[layer]
            wholes.append((k.rows(rows, pad), v.rows(rows, pad)))
        score = self.mass
        if score is not None:
            score = ops_of(score).take(score, rows, 0)[:, :, pad:]
        return self.start(wholes, score, self.watch.rows(rows).newest(wholes[0][0].n))

    def observe(self, query: Query) -> None:
        """Takes note of queries that the library attended for itself, over the tokens as they came.

        The mass of the newest is added late, so that they can be taken back.
        """
        if self.policy not in ("h2o", "tova") or query.reader != self.layers[0]:
            return
        early = self.watch.see(query)
        if early is not None and self.policy == "h2o":
            self._add(early, self.whole[self.layers[0]][0].n - RECALL)

    def _account(self) -> None:
        """Adds the mass of the queries that wait."""
        if self.watch.query is not None and self.policy == "h2o":
            self._add(self.watch.query, self.whole[self.layers[0]][0].n)
            self.watch = Watch()

    def _add(self, query: Query, n: int) -> None:
        """Adds the mass of queries that are the newest of the first `n` tokens."""
        k = self.whole[self.layers[0]][0].tokens(0, n)
        xp = ops_of(k)
        valid = None
        if any(self.pads):
            left = [xp.arange(n, k).reshape(1, 1, n) >= pad for pad in self.pads]
            valid = xp.concat(left, 0)
        found = mass(query, k, valid)
        if self.mass is None:
            self.mass = found
            return
        room = xp.zeros((*found.shape[:2], n - self.mass.shape[2]), found.dtype, found)
        self.mass = found + xp.concat([self.mass, room], 2)

    def attend(self, layer: int, query: Query) -> Array:
        """Attention over all tokens of a layer. Shapes: returns [B, Hq, L, D]."""
        if self.whole:
            self.observe(query)
        pieces, which = [], self.layers.index(layer)
        for rows, unit in self.units():
            part = query._replace(q=_rows(query.q, rows))
            pieces.append((rows, unit.faces[which].attend(part).out))
        return _in_order(pieces)

    def read(self, layer: int, n: int) -> tuple[Array, Array]:
        """K and V [B, H, n, D] as attention sees them; padding reads as zeros."""
        which = self.layers.index(layer)
        ks: list[tuple[list[int], Array]] = []
        vs: list[tuple[list[int], Array]] = []
        for rows, unit in self.units():
            for x, into in zip(unit.faces[which].read(), (ks, vs), strict=True):
                pad = ops_of(x).zeros((*x.shape[:2], n - x.shape[2], x.shape[3]), x.dtype, x)
                into.append((rows, ops_of(x).concat([pad, x], 2)))
        return _in_order(ks), _in_order(vs)

    @property
    def held(self) -> int:
        """How many of the newest tokens can be forgotten."""
        if not self.whole:
            return min((face.held for _, unit in self.groups for face in unit.faces), default=0)
        if self.policy in ("h2o", "tova"):  # older queries cannot be asked again
            waiting = self.watch.query.q.shape[2] if self.watch.query else 0
            return max(0, waiting - (self.policy == "tova"))
        return min(k.n for k, _ in self.whole.values())

    def trim(self, n: int) -> None:
        """Forgets the newest `n` tokens."""
        for k, v in self.whole.values():
            k.n -= n
            v.n -= n
        for _, unit in self.groups:
            for face in unit.faces:
                face.trim(n)
        self.watch.trim(n)
        self.last, self.in_prompt = min(self.last, max(1, self.last - n)), False
        if self.whole and all(k.n == 0 for k, _ in self.whole.values()):
            self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.whole, self.groups, self.pads, self.mass, self.watch = {}, [], [], None, Watch()
        self.last, self.in_prompt, self.prompt_due = 0, True, True

    def reorder(self, rows: list[int]) -> None:
        """Makes row i what row `rows[i]` was."""
        for layer, (k, v) in self.whole.items():
            self.whole[layer] = (k.rows(rows), v.rows(rows))
        self.pads = [self.pads[row] for row in rows] if self.pads else []
        if self.mass is not None:
            self.mass = ops_of(self.mass).take(self.mass, rows, 0)
        self.watch = self.watch.rows(rows)
        groups = []
        for held, unit in self.groups:
            places = [i for i, row in enumerate(rows) if row in held]
            if places:
                groups.append((places, unit.rows([held.index(rows[i]) for i in places])))
        self.groups = groups

    def parts(self) -> Iterator[tuple[int, Part]]:
        """Every array with the layer that it counts for; what a pair shares, for the shallower."""
        for layer, rooms in self.whole.items():
            yield from ((layer, ("window", room.x, room.slack)) for room in rooms)
        if self.mass is not None:
            yield self.layers[0], ("scores", self.mass, 0)
        yield from ((self.layers[0], part) for part in self.watch.parts())
        for _, unit in self.groups:
            yield from ((self.layers[0], part) for part in unit.shared())
            for layer, face in zip(self.layers, unit.faces, strict=True):
                yield from ((layer, part) for part in face.parts())


def _parts(unit: Unit) -> Iterator[Part]:
    yield from unit.shared()
    for face in unit.faces:
        yield from face.parts()


def _rows(x: Array, rows: list[int]) -> Array:
    return x if rows == list(range(x.shape[0])) else ops_of(x).take(x, rows, 0)


def _in_order(pieces: Sequence[tuple[list[int], Array]]) -> Array:
    """Rows of several units, back in the order of the batch."""
    if len(pieces) == 1:
        return pieces[0][1]
    xp = ops_of(pieces[0][1])
    order = [row for rows, _ in pieces for row in rows]
    places = sorted(range(len(order)), key=order.__getitem__)
    return xp.take(xp.concat([x for _, x in pieces], 0), places, 0)
