"""The state of layers that evict tokens, and of the queries that they watch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvc.backends.base import Array
from kvc.ops.codec import Code
from kvc.store.archive import FLOATS, Archive, Sizes
from kvc.store.evicting import Evicting
from kvc.store.kept import Kept, specs_of
from kvc.store.state_codes import walk_code
from kvc.store.unit import Query
from kvc.store.watch import RECALL, Watch


def walk_evicting(ar: Archive, x: Evicting, of: Sizes) -> Evicting:
    """Ring, kept tokens and state of rows of one length.

    Args:
        ar: Where they are.
        x: The store's; one of no tokens, with its settings, where they are read.
        of: Sizes of the layer.

    Raises:
        CacheFileError: If a file has none of that shape.
    """
    live, D = x.fitted(), of.head_dim
    n = ar.number("ring", x.n, 0, of.n)
    new = replace(x, n=n, start=0, seen=of.n, fresh=ar.number("fresh", x.fresh, 0, n))
    shape = (of.rows, of.heads, n)
    new.k = ar.array("k.ring", live.k, of.dtype, (*shape, D))
    new.v = ar.array("v.ring", live.v, of.dtype, (*shape, D))
    new.pos = ar.array("ring.positions", live.pos, "int32", shape, bounds=(0, of.n - 1))
    if x.score is not None:
        new.score = ar.array("ring.scores", live.score, of.wide, shape)
    new.kept = _walk_kept(ar.at("kept"), x.kept, of)
    if x.state is not None and x.norm is not None:
        R = x.norm.shape[2]
        new.state = ar.array("state.h", x.state, of.wide, (of.rows, of.heads, R, D))
        new.norm = ar.array("state.z", x.norm, of.wide, (of.rows, of.heads, R))
    new.watch = walk_watch(ar.at("watch"), x.watch, x.layer, of)
    return new


def _walk_kept(ar: Archive, x: Kept, of: Sizes) -> Kept:
    shape = (of.rows, of.heads, x.n)
    k: Array | Code
    v: Array | Code
    if x.codec is None:
        k, v = (ar.array(z, getattr(x, z), of.dtype, (*shape, of.head_dim)) for z in "kv")
    else:
        specs = specs_of(x.codec, x.n, of.head_dim)
        k, v = (
            walk_code(ar.at(z), getattr(x, z), spec, (of.rows,), of, 0, 0.0)
            for z, spec in zip("kv", specs, strict=True)
        )
    pos = ar.array("positions", x.pos, "int32", shape, bounds=(-1, of.n - 1))
    score = None if x.score is None else ar.array("scores", x.score, of.wide, shape)
    return Kept(k, v, pos, score, x.codec, of.head_dim)


def walk_watch(ar: Archive, x: Watch, reader: int, of: Sizes) -> Watch:
    """The queries that wait.

    Args:
        ar: Where they are.
        x: What the store has.
        reader: The layer itself: of those that share its cache none but it is watched.
        of: Sizes of the layer.

    Raises:
        CacheFileError: If a file has others than it can have.
    """
    query: Any = x.query
    if not ar.has("q", query and query.q):
        return Watch()
    q = ar.array("q", query and query.q, FLOATS, (of.rows, None, None, of.head_dim))
    Hq, L = q.shape[1:3]
    if not Hq or Hq % of.heads or not 0 < L <= min(RECALL, of.n):
        ar.refuse("q", f"queries of {of.heads} groups and the newest tokens", list(q.shape))
    scale, cap = (query.scale, query.softcap) if query else (None, None)
    scale = ar.real("scale", scale)
    softcap = None if ar.value("softcap", cap) is None else ar.real("softcap", cap)
    sinks = lse = None
    if ar.has("sinks", query and query.sinks):
        sinks = ar.array("sinks", query and query.sinks, FLOATS, (Hq,))
    if ar.has("lse", query and query.lse):
        lse = ar.array("lse", query and query.lse, of.wide, (of.rows, Hq, L))
    return Watch(Query(q, scale, softcap, sinks, reader, lse))
