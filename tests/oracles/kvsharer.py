"""KVSharer: maps of layers to owners, the ranking of pairs, and the greedy search.

Yang et al. 2024, arXiv:2410.18517. m(i) <= i and m(m(i)) = m(i); owner: m(i) = i; sharer: m(i) < i.
"""

from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.attention import Array

Map = tuple[int, ...]


def why_invalid(m: Sequence[int], max_shared: int | None = None) -> str | None:
    """What is wrong with a map, or None."""
    for i, owner in enumerate(m):
        if not 0 <= owner <= i:
            return f"layer {i} reads layer {owner}, which is not at or below it"
        if m[owner] != owner:
            return f"layer {i} reads layer {owner}, which is itself a sharer"
    if max_shared is not None and len(sharers(m)) > max_shared:
        return f"{len(sharers(m))} layers share, at most {max_shared} may"
    return None


def sharers(m: Sequence[int]) -> list[int]:
    """Layers with m(i) < i."""
    return [i for i, owner in enumerate(m) if owner != i]


def compress_paths(m: Sequence[int]) -> Map:
    """In ascending layer order m(k) := m(m(k)), for maps with m(k) <= k: 5 -> 3 -> 1 gives 1."""
    out = list(m)
    for k in range(len(out)):
        out[k] = out[out[k]]
    return tuple(out)


def share(m: Sequence[int], i: int, j: int) -> Map:
    """The map m with m(i) = j, paths compressed."""
    out = list(m)
    out[i] = j
    return compress_paths(out)


def share_count(fraction: float | str, n_layers: int) -> int:
    """C = round half up of fraction x L, in decimal arithmetic, at most L - 1."""
    exact = Decimal(str(fraction)) * n_layers
    return min(int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP)), n_layers - 1)


def mean_states(sentences: Sequence[ArrayLike]) -> Array:
    """Average over sentences. Shapes: each [L, H, T, D]; returns [L, H, T, D]."""
    total = np.zeros(np.shape(sentences[0]))
    for sentence in sentences:
        x = np.asarray(sentence, np.float64)
        if x.shape != total.shape:
            raise ValueError(f"every sentence is as long as the first: {total.shape}, {x.shape}")
        total += x
    return total / len(sentences)


def distance(k: ArrayLike, v: ArrayLike, i: int, j: int, how: str = "positionwise") -> float:
    """Distance d(i, j) of two layers' mean states.

    positionwise: half the mean over (head, position) of ||K_i - K_j|| along D, and the same of V.
    flat: ||(flat(K_i) + flat(V_i)) / 2 - (flat(K_j) + flat(V_j)) / 2||.

    Shapes: k, v [L, H, T, D].
    """
    k, v = np.asarray(k, np.float64), np.asarray(v, np.float64)
    if how == "flat":
        one = (k[i].ravel() + v[i].ravel()) / 2
        other = (k[j].ravel() + v[j].ravel()) / 2
        return float(np.sqrt(np.sum((one - other) ** 2)))
    if how != "positionwise":
        raise ValueError(f"how: expected positionwise or flat, got {how}")
    n_heads, n = int(k.shape[1]), int(k.shape[2])
    total = 0.0
    for h in range(n_heads):
        for t in range(n):
            total += float(np.sqrt(np.sum((k[i, h, t] - k[j, h, t]) ** 2)))
            total += float(np.sqrt(np.sum((v[i, h, t] - v[j, h, t]) ** 2)))
    return total / (2 * n_heads * n)


def distances(k: ArrayLike, v: ArrayLike, how: str = "positionwise") -> Array:
    """Symmetric, 0 on the diagonal. Shapes: k, v [L, H, T, D]; returns [L, L]."""
    n_layers = int(np.shape(k)[0])
    d = np.zeros((n_layers, n_layers))
    for i in range(n_layers):
        for j in range(i):
            d[i, j] = d[j, i] = distance(k, v, i, j, how)
    return d


def rank_pairs(d: ArrayLike, order: str = "descending") -> list[tuple[int, int]]:
    """All (i, j), i > j, most distant first, by d rounded to 6 significant digits, then (i, j).

    order "ascending" (for ablation): the most similar first, with the same tie-break.
    Shapes: d [L, L].
    """
    d = np.asarray(d, np.float64)
    sign = {"descending": -1, "ascending": 1}[order]
    every = [(i, j) for i in range(len(d)) for j in range(i)]
    return sorted(every, key=lambda at: (sign * float(f"{float(d[at]):.5e}"), at))


def cosine(x: ArrayLike, y: ArrayLike) -> float:
    """Cosine x.y / (||x|| ||y||) of two tensors, flattened."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def similarity(
    full: Sequence[ArrayLike], shared: Sequence[ArrayLike], how: str = "per_sentence"
) -> float:
    """Likeness of the last hidden states with and without sharing.

    per_sentence: mean of cos(flat(h_full), flat(h_shared)). mean_repr: the cosine of the
    sentence-averaged states.

    Shapes: a [T, d_model] per sentence.
    """
    if how == "per_sentence":
        each = [cosine(a, b) for a, b in zip(full, shared, strict=True)]
        return sum(each) / len(each)
    if how == "mean_repr":
        return cosine(mean_states(full), mean_states(shared))
    raise ValueError(f"how: expected per_sentence or mean_repr, got {how}")


class Search(NamedTuple):
    """What the greedy search found."""

    map: Map
    accepted: list[tuple[int, int]]
    tried: list[tuple[int, int]]  # each cost one call of the similarity
    complete: bool  # whether C layers share


def greedy(
    ranked: Sequence[tuple[int, int]],
    n_layers: int,
    count: int,
    similarity: Callable[[Map], float],
    threshold: float = 0.5,
) -> Search:
    """Down the ranking: accept (i, j) where similarity > T strictly, until C layers share.

    A layer that shares already is passed over; fewer than C is a partial result, not an error.
    """
    if not 0 <= count <= n_layers - 1:
        raise ValueError(f"{count} of {n_layers} layers cannot share")
    m: Map = tuple(range(n_layers))
    accepted: list[tuple[int, int]] = []
    tried: list[tuple[int, int]] = []
    shared: set[int] = set()
    for i, j in ranked:
        if len(shared) == count:
            break
        if i in shared:
            continue
        tried.append((i, j))
        candidate = share(m, i, j)
        if similarity(candidate) > threshold:
            m = candidate
            shared.add(i)
            accepted.append((i, j))
    return Search(m, accepted, tried, len(shared) == count)


def cache_bytes(
    n_layers: int, n_shared: int, n_kv_heads: int, head_dim: int, n: int, e: int = 2, batch: int = 1
) -> int:
    """(L - |shared|) 2 B H n D e; the map is not counted."""
    return (n_layers - n_shared) * 2 * batch * n_kv_heads * n * head_dim * e
