"""How far apart the layers of a model are, by their keys and values averaged over sentences.

KVSharer, Yang et al. 2024, arXiv:2410.18517, section 3.1. The paper says of the distance that it is
the Euclidean one of flattened caches (`flat`), the authors' code takes it for each head and
position (`positionwise`). Both are ruled by layers with large keys; `normalized` is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kvc.backends.base import ops_of
from kvc.store.store import KVStore

DISTANCES = ("positionwise", "flat", "normalized")
ORDERS = ("dissimilar", "similar", "random")

Vectors = np.ndarray[Any, Any]  # float64 [H, T, D]
Distances = dict[tuple[int, int], float]  # of layers (i, j), i > j


class States(NamedTuple):
    """The keys and values of one layer, averaged over sentences."""

    k: Vectors
    v: Vectors


class Mean:
    """The average over all sentences, of which a few come at a time. Sums are float64."""

    def __init__(self) -> None:
        self.n, self.sums = 0, dict[int, States]()

    def add(self, store: KVStore, numbers: tuple[int, ...]) -> None:
        """Takes the tokens of a store's layers, which the model numbers so; none is compressed."""
        n = 0
        for place, number in enumerate(numbers):
            dense = store.dense(place)
            assert dense is not None
            xp = ops_of(dense[0])
            found = [xp.to_numpy(xp.sum(xp.promote(x), 0)).astype(np.float64) for x in dense]
            if number in self.sums:
                found = [a + b for a, b in zip(self.sums[number], found, strict=True)]
            self.sums[number], n = States(*found), dense[0].shape[0]
        self.n += n

    def states(self) -> dict[int, States]:
        """The averages, by the model's number of the layer."""
        return {i: States(k / self.n, v / self.n) for i, (k, v) in self.sums.items()}


def measure(states: Mapping[int, States], how: str = "positionwise") -> Distances:
    """The distance of every two layers with equal shapes, rounded to six significant digits.

    positionwise: the mean of |K_i - K_j| over heads and positions, averaged with V's.
    normalized: the same of vectors divided by the mean norm of their layer.
    flat: |(K_i + V_i) / 2 - (K_j + V_j) / 2| of all numbers together.

    Rounding lets float32 and float64 rank layers alike, so that the last bits decide nothing.
    """
    if how == "normalized":
        states = {i: States(_scaled(k), _scaled(v)) for i, (k, v) in states.items()}
    if how == "flat":
        flat = {i: ((k + v) / 2).reshape(1, 1, -1) for i, (k, v) in states.items()}
        states = {i: States(x, x) for i, x in flat.items()}
    return {
        (i, j): float(f"{(_apart(a.k, b.k) + _apart(a.v, b.v)) / 2:.5e}")
        for i, a in states.items()
        for j, b in states.items()
        if i > j and a.k.shape == b.k.shape and a.v.shape == b.v.shape
    }


def ranked(distances: Distances, order: str = "dissimilar", seed: int = 0) -> Distances:
    """The same pairs in the order in which they are tried.

    dissimilar: the most distant first; similar: the nearest first; random: as `seed` has it. Equal
    ones: the smaller i first, then the smaller j.
    """
    pairs = sorted(distances)
    if order == "random":
        places = np.random.default_rng(seed).permutation(len(pairs))
        pairs = [pairs[place] for place in places]
    else:
        sign = -1 if order == "dissimilar" else 1
        pairs.sort(key=lambda pair: sign * distances[pair])
    return {pair: distances[pair] for pair in pairs}


def _apart(a: Vectors, b: Vectors) -> float:
    """Mean over heads and positions of |a - b|."""
    return float(np.linalg.norm(a - b, axis=-1).mean())


def _scaled(x: Vectors) -> Vectors:
    """Vectors over the mean of their norms."""
    return x / max(float(np.linalg.norm(x, axis=-1).mean()), np.finfo(np.float64).tiny)
