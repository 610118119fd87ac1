"""What layouts rest on: how far layers are apart, and which tokens two of them do not share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine, ops_of
from kvc.calibrate.kvsharer.distances import Mean, measure
from kvc.files import sharers
from kvc.measure.divergence import CHUNK
from kvc.measure.perplexity import feed
from kvc.methods import KVSharer, Method, MiniCache, parse
from kvc.ops.merge import merge_pair, retained

SENTENCE = 64  # tokens, over which KVSharer's distances are means
SENTENCES = 32
BUCKETS = 32  # of positions


def layer_distances(engine: Engine, ids: NDArray[Any], method: Method) -> dict[str, Any] | None:
    """KVSharer's distance of every two layers on pieces of rows [n, T], and the method's map.

    Layers are those that keep all their tokens, in the model's order; the map has the model's
    numbers. None for a method without a map.
    """
    shape = engine.shape
    layout = method.check(shape).layout
    if not isinstance(layout, KVSharer):
        return None
    size = min(SENTENCE, ids.shape[1])
    some = ids[:, : ids.shape[1] // size * size].reshape(-1, size)[:SENTENCES]
    cache = engine.make_cache(parse("none"))
    engine.logits(some, cache)
    mean = Mean()
    mean.add(engine.store(cache), shape.full_layers)
    place = {number: i for i, number in enumerate(shape.full_layers)}
    apart = np.zeros((len(place), len(place)))
    for (i, j), distance in measure(mean.states()).items():
        apart[place[i], place[j]] = apart[place[j], place[i]] = distance
    shared = sharers(layout.owners(shape.n_layers))
    return {"distances": apart.tolist(), "map": {str(i): owner for i, owner in shared.items()}}


def retained_shares(engine: Engine, ids: NDArray[Any], method: Method) -> dict[str, Any] | None:
    """The share of vectors that MiniCache keeps as they came, by pair and part of the positions.

    Of keys and values of a prompt [n, T]; None for a method that merges nothing.
    """
    shape = engine.shape
    layout = method.layout
    if not isinstance(layout, MiniCache):
        return None
    cache = engine.make_cache(parse("none"))
    for _ in feed(engine, cache, ids, ids.shape[1], 1, CHUNK):
        pass
    store, shares = engine.store(cache), []
    pairs = method.pairs(len(shape.full_layers))
    cuts = np.unique(np.linspace(0, ids.shape[1], BUCKETS + 1).round().astype(int))
    for a, b in pairs:
        kept = []
        for x, y in zip(store.dense(a) or (), store.dense(b) or (), strict=True):
            *_, angle = merge_pair(x, y, layout.t, layout.how, layout.granularity)
            keep = retained(angle, layout.retention, layout.gamma, None, layout.always_keep)
            kept.append(ops_of(keep).to_numpy(keep).astype(float).mean((0, 1)))
        share = np.mean(kept, 0)  # [T]
        parts = pairwise(cuts)
        shares.append([float(share[start:stop].mean()) for start, stop in parts])
    numbers = shape.full_layers
    return {"pairs": [[numbers[a], numbers[b]] for a, b in pairs], "retained": shares}
