"""What a store holds, by names that files have: one walk that writes it or reads it.

`layers.N` is a layer by the model's number; a slot's own values lie at its shallowest one. Of
several units of rows behind different padding the second and further ones lie at `layers.N.rowsI`.
What is in a buffer behind the live tokens is not part of a state.

    in_prompt, prompt_due, last, pads    the slot's phase; columns of padding in front of each row
    groups                               [[rows, tokens], ...] of units; [] while all is as it came
    k.tokens, v.tokens                   as they came [B, H, T, D]; then also `scores`, `watch`
    k.sink, k.window, k.runs, k.runI.*   of K (and V): sinks and newest tokens, and coded ones
    pair.k.*                             of a merged pair: directions or codes, norms, originals
    ring, fresh, k.ring, kept.*, state.* of evicting layers
    watch.*                              queries whose attention mass is not added yet
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvc.backends.base import Array, ops_of
from kvc.methods.gear import Gear
from kvc.ops.merge import Thresholds
from kvc.ops.quant import Role
from kvc.store.archive import Archive, Sizes
from kvc.store.coded import Coded
from kvc.store.evicting import Evicting
from kvc.store.merged import Merged, Originals
from kvc.store.pair import Half, Pair
from kvc.store.room import Room
from kvc.store.slot import Slot, Whole
from kvc.store.state_codes import walk_coded
from kvc.store.state_evicting import walk_evicting, walk_watch
from kvc.store.tokens import Series, Tokens
from kvc.store.unit import Unit
from kvc.store.watch import Watch

ROLES: tuple[Role, Role] = ("k", "v")


def walk_sizes(
    ar: Archive, slots: Sequence[Slot], names: Sequence[str]
) -> dict[int, tuple[int, int]]:
    """Heads, and channels of a head, of the layers that have tokens of their own.

    Args:
        ar: Of the whole store.
        slots: The store's.
        names: Of its layers.

    Raises:
        CacheFileError: If a file has no such numbers.
    """
    found: dict[int, tuple[int, int]] = {}
    for slot in slots:
        x = _keys_of(slot)
        if slot is slots[0] and x is not None:
            rows = sum(len(rows) for rows, _ in slot.groups) or x.shape[0]
            ar.begin(int(rows), ops_of(x).dtype_name(x))
        sizes = [] if x is None else [int(x.shape[1]), int(x.shape[3])]
        heads, head_dim = ar.at(names[slot.layers[0]]).numbers("size", sizes, 2, 1, 2**20)
        found |= dict.fromkeys(slot.layers, (heads, head_dim))
    return found


def _keys_of(slot: Slot) -> Array | None:
    """Keys of the shallowest layer that are as they came."""
    for k, _ in slot.whole.values():
        return k.x
    for _, unit in slot.groups:
        face: Any = unit.faces[0]
        return face.k if isinstance(unit, Evicting) else face.k.window.x
    return None


def walk_prompt(
    ar: Archive, prefill: str, lone_tail: bool, slots: Sequence[Slot]
) -> tuple[str, bool]:
    """How prompts are read, and whether their last token comes alone; the slots follow.

    Libraries differ in that. What a file's library says of a prompt that may go on is kept: one
    without lone tokens has ended it, where one with them would wait for another.

    Raises:
        CacheFileError: If a file does not say.
    """
    found = ar.value("prefill", prefill)
    if found not in ("exact", "stream"):
        ar.refuse("prefill", "exact or stream", found)
    theirs = ar.flag("lone_tail", lone_tail)
    for slot in slots if ar.reading else ():
        if slot.in_prompt and lone_tail and not theirs:
            slot.last = min(slot.last, 1)
    waits = theirs and any(slot.in_prompt and slot.last > 1 for slot in slots)
    return found, lone_tail or waits


def walk_slot(
    ar: Archive,
    x: Slot,
    all_names: Sequence[str],
    sizes: Mapping[int, tuple[int, int]],
    kept: int,
) -> Slot:
    """A slot with what an archive has of it; one that is read must be empty before.

    Args:
        ar: Of the whole store.
        x: The store's.
        all_names: Of the store's layers.
        sizes: Heads, and channels of a head, by layer.
        kept: Tokens that its method keeps beyond the newest, if it evicts.

    Raises:
        CacheFileError: If a file has none of that shape.
    """
    names, size = [all_names[layer] for layer in x.layers], sizes[x.layers[0]]
    own, T = ar.at(names[0]), ar.columns
    whole = Sizes(ar.rows, T, *size, ar.dtype)
    own.check_room("kept", math.prod((ar.rows, kept, *size)) // 2)  # of 2 bits, K and V
    new = replace(
        x,
        in_prompt=own.flag("in_prompt", x.in_prompt),
        prompt_due=own.flag("prompt_due", x.prompt_due),
        last=own.number("last", x.last, 0, T),
        whole={},
        groups=[],
    )
    groups = _groups(own, [[rows, _tokens_of(unit)] for rows, unit in x.groups])
    for i, (rows, n) in enumerate(groups):
        of = whole._replace(rows=len(rows), n=n)
        places = [ar.at(f"{name}.rows{i}" if i else name) for name in names]
        unit = x.groups[i][1] if x.groups else _blank(x, of)
        new.groups.append((rows, _walk_unit(places, unit, of)))
    if groups:
        return new
    new.pads = own.numbers("pads", x.pads, ar.rows, 0, T)
    for layer, name in zip(x.layers, names, strict=True):
        at, rooms = ar.at(name), x.whole.get(layer)
        k, v = (
            Room.of(at.array(f"{role}.tokens", rooms and rooms[i].tokens(), ar.dtype, _all(whole)))
            for i, role in enumerate(ROLES)
        )
        new.whole[layer] = (k, v)
    if x.policy in ("h2o", "tova"):
        if own.has("scores", x.mass):
            shape = (whole.rows, whole.heads, None)
            new.mass = own.array("scores", x.mass, whole.wide, shape)
            if new.mass.shape[2] > T:
                own.refuse("scores", f"those of {T} tokens at most", new.mass.shape)
        new.watch = walk_watch(own.at("watch"), x.watch, x.layers[0], whole)
    return new


def _all(of: Sizes) -> tuple[int, int, int, int]:
    return of.rows, of.heads, of.n, of.head_dim


def _groups(ar: Archive, x: list[Any]) -> list[tuple[list[int], int]]:
    """Rows and tokens of each unit: every row is in one of them, and none has more than all."""
    found = ar.value("groups", x)
    pairs = type(found) is list and all(type(g) is list and len(g) == 2 for g in found)
    if not pairs or not all(type(n) is int and 0 <= n <= ar.columns for _, n in found):
        ar.refuse("groups", f"[rows, tokens] with {ar.columns} tokens at most", found)
    rows: list[Any] = []
    for some, _ in found:
        rows += some if type(some) is list and some else [None]
    if found and (any(type(row) is not int for row in rows) or sorted(rows) != [*range(ar.rows)]):
        ar.refuse("groups", f"each of {ar.rows} rows once", found)
    return [(list(some), n) for some, n in found]


def _tokens_of(unit: Unit) -> int:
    face: Any = unit.faces[0]
    return int(face.seen if isinstance(unit, Evicting) else face.k.n)


def _blank(slot: Slot, of: Sizes) -> Unit:
    """A unit of no tokens with the settings of its layers."""
    nothing = np.zeros((of.rows, of.heads, 0, of.head_dim), np.dtype(of.wide))
    wholes: list[Whole] = [(Room.of(nothing), Room.of(nothing)) for _ in slot.layers]
    return slot.start(wholes, None, Watch())


def _walk_unit(places: Sequence[Archive], x: Unit, of: Sizes) -> Unit:
    if isinstance(x, Tokens):
        return _walk_tokens(places[0], x, of)
    if isinstance(x, Pair):
        return _walk_pair(places, x, of)
    assert isinstance(x, Evicting)
    return walk_evicting(places[0], x, of)


def _walk_tokens(ar: Archive, x: Tokens, of: Sizes) -> Tokens:
    k, v = (
        _walk_series(ar.at(role), series, x.codec, role, x.layer, of)
        for role, series in zip(ROLES, (x.k, x.v), strict=True)
    )
    return replace(x, k=k, v=v)


def _walk_series(
    ar: Archive, x: Series, codec: Gear | None, role: Role, layer: int, of: Sizes
) -> Series:
    if codec is None:
        return _walk_window(ar, x, 0, None, of)
    past = walk_coded(ar, x.past if isinstance(x.past, Coded) else None, codec, role, layer, of)
    sink = ar.number("sink", x.sink, 0, codec.sink)
    return _walk_window(ar, x, sink, past, of)


def _walk_window(ar: Archive, x: Series, sink: int, past: Any, of: Sizes) -> Series:
    """The tokens that are not in the past: as many as there are others."""
    n = of.n - (past.n if past else 0)
    if sink > n:
        ar.refuse("sink", f"{n} tokens at most", sink)
    shape = _all(of._replace(n=n))
    return Series(Room.of(ar.array("window", x.window.tokens(), of.dtype, shape)), sink, past)


def _walk_pair(places: Sequence[Archive], x: Pair, of: Sizes) -> Pair:
    own = places[0].at("pair")
    k, v = (
        _walk_merged(own.at(role), merged, x, role, of)
        for role, merged in zip(ROLES, (x.k, x.v), strict=True)
    )
    if (k and k.n) != (v and v.n):
        own.refuse("v", "as many tokens as k", v and v.n)
    sink = x.codec.sink if x.codec and k else 0
    tails = []
    for which, (ar, tail) in enumerate(zip(places, x.tails, strict=True)):
        a, b = (
            _walk_window(ar.at(role), series, sink, merged and Half(merged, which), of)
            for role, series, merged in zip(ROLES, (tail.k, tail.v), (k, v), strict=True)
        )
        tails.append(Tokens(a, b))
    return replace(x, tails=(tails[0], tails[1]), k=k, v=v)


def _walk_merged(ar: Archive, x: Merged | None, pair: Pair, role: Role, of: Sizes) -> Merged | None:
    method, B, H = pair.method, of.rows, of.heads
    directions: Room | Coded | None
    if pair.codec:
        coded = x.directions if x and isinstance(x.directions, Coded) else None
        directions = walk_coded(ar, coded, pair.codec, role, pair.layer, of)
        if directions is None:
            return None
        n = directions.n
    else:
        n = ar.number("n", x.n if x else 0, 0, of.n)
        if not n:
            return None
        room: Any = x and x.directions
        shape = _all(of._replace(n=n))
        directions = Room.of(ar.array("directions", room and room.tokens(), of.dtype, shape))
    G = H if method.granularity == "head" else 1
    new = Merged(method, directions)
    if method.how != "mean":
        rooms: Any = x and x.norms
        a, b = (
            Room.of(ar.array(f"norms_{z}", rooms and rooms[i].tokens(), of.dtype, (B, G, n)))
            for i, z in enumerate("ab")
        )
        new.norms = (a, b)
    kept: Any = x and x.originals and x.originals.fitted()
    index = ar.array("index", kept and kept.index, "int32", (B, None), bounds=(-1, n * G - 1))
    m = int(index.shape[1])
    shape_of = (B, m, H * of.head_dim // G)
    a, b = (ar.array(z, kept and getattr(kept, z), of.dtype, shape_of) for z in "ab")
    new.originals = Originals(index, a, b, m)
    if method.retention != "none":
        limits: Any = x and x.limits
        low, high = (
            ar.array(z, limits and getattr(limits, z), of.wide, (B,)) for z in ("low", "high")
        )
        new.limits = Thresholds(low, high)
    return new
