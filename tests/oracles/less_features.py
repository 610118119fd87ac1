"""LESS's feature maps of queries and keys. Dong et al. 2024, arXiv:2402.09398.

No biases anywhere; exact GELU. The outer absolute values keep every residual weight at 0 or more.
"""

from dataclasses import dataclass
from math import erf, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.attention import Array


def gelu(x: ArrayLike) -> Array:
    """Exact GELU, x (1 + erf(x / sqrt 2)) / 2, elementwise."""
    x = np.asarray(x, np.float64)
    return np.array([0.5 * t * (1 + erf(t / sqrt(2))) for t in x.ravel()]).reshape(x.shape)


def phi(q: Array, a1: Array, a2: Array) -> Array:
    """Query features |GELU(GELU(q A1) A2)|, q after RoPE and without 1/sqrt(D).

    Shapes: q [D]; a1 [D, M]; a2 [M, R]; returns [R].
    """
    return np.abs(gelu(gelu(q @ a1) @ a2))


def psi(k: Array, b1: Array, b2: Array, b3: Array, s1: Array, s2: Array) -> Array:
    """Key features |u + (u B3) s2|, u = |s1| GELU(GELU(k B1) B2).

    Shapes: k [D]; b1 [D, M]; b2 [M, R]; b3 [R, R]; s1, s2 [R]; returns [R].
    """
    u = np.abs(s1) * gelu(gelu(k @ b1) @ b2)
    return np.abs(u + (u @ b3) * s2)


class Features(Protocol):
    """A pair of non-negative feature maps: phi of a query head, psi of a key/value head."""

    @property
    def rank(self) -> int:
        """Features per head, R."""

    def phi(self, head: int, q: Array) -> Array:
        """Features of a query. Shapes: q [D]; returns [R]."""

    def psi(self, head: int, k: Array) -> Array:
        """Features of a key. Shapes: k [D]; returns [R]."""


@dataclass(frozen=True)
class Weights:
    """The learned maps of one layer: one query map per query head, one key map per key head."""

    a1: Array  # [Hq, D, M]
    a2: Array  # [Hq, M, R]
    b1: Array  # [H, D, M]
    b2: Array  # [H, M, R]
    b3: Array  # [H, R, R]
    s1: Array  # [H, R]
    s2: Array  # [H, R]

    @property
    def rank(self) -> int:
        """Features per head, R."""
        return int(self.a2.shape[2])

    def phi(self, head: int, q: Array) -> Array:
        """Features of a query. Shapes: q [D]; returns [R]."""
        return phi(q, self.a1[head], self.a2[head])

    def psi(self, head: int, k: Array) -> Array:
        """Features of a key. Shapes: k [D]; returns [R]."""
        return psi(k, self.b1[head], self.b2[head], self.b3[head], self.s1[head], self.s2[head])


def random_weights(
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    hidden: int,
    rank: int,
    seed: int = 0,
    s1: float = 1e-4,
    s2: float = 1e-4,
) -> Weights:
    """A1, B1 ~ U(+-sqrt(6/(D+M))); A2, B2 ~ U(+-sqrt(6/(M+R))); B3 ~ U(+-sqrt(3/R)); s1, s2."""
    rng = np.random.default_rng(seed)

    def uniform(bound: float, *shape: int) -> Array:
        return rng.uniform(-bound, bound, shape)

    first, second = sqrt(6 / (head_dim + hidden)), sqrt(6 / (hidden + rank))
    return Weights(
        a1=uniform(first, n_heads, head_dim, hidden),
        a2=uniform(second, n_heads, hidden, rank),
        b1=uniform(first, n_kv_heads, head_dim, hidden),
        b2=uniform(second, n_kv_heads, hidden, rank),
        b3=uniform(sqrt(3 / rank), n_kv_heads, rank, rank),
        s1=np.full((n_kv_heads, rank), s1),
        s2=np.full((n_kv_heads, rank), s2),
    )


def n_weights(n_heads: int, n_kv_heads: int, head_dim: int, hidden: int, rank: int) -> int:
    """Parameters of one layer's maps: Hq (D M + M R) + H (D M + M R + R R + 2 R)."""
    shared = head_dim * hidden + hidden * rank
    return n_heads * shared + n_kv_heads * (shared + rank * rank + 2 * rank)
