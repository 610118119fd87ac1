"""GEAR's streaming cache of one layer and one row, and its bytes by part.

Kang et al. 2024, arXiv:2403.05527; sliding values: KIVI, arXiv:2402.02750.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.attention import Array, attend
from tests.oracles.codes import Role, n_words
from tests.oracles.gear import VARIANTS, Chunk, Settings, compress, outlier_count

PARTS = ("codes", "k_meta", "v_meta", "lowrank", "sparse", "buffer")


@dataclass
class GearCache:
    """One layer's streaming cache: sinks, compressed chunks, and the newest tokens dense.

    Prefill: with S tokens, n0 = floor((S - sink - window) / n_b) n_b of them, from the sinks on,
    form chunk 0 at rank r_p. Decode: append, attend at full precision over what is dense; when
    sink + window + n_b tokens are dense, the oldest n_b behind the sinks become a chunk at rank
    r_d. Old chunks are never compressed again. Sliding value window: the last n_b values (and the
    sinks) stay dense and one value is quantized per step, after the step's output.
    """

    settings: Settings
    k: Array = field(default_factory=lambda: np.zeros((0, 0, 0)))  # [H, n, D], exact, all tokens
    v: Array = field(default_factory=lambda: np.zeros((0, 0, 0)))
    k_chunks: list[Chunk] = field(default_factory=list)
    v_chunks: list[Chunk] = field(default_factory=list)

    def prefill(self, k: ArrayLike, v: ArrayLike, q: ArrayLike | None = None) -> Array | None:
        """Store a prompt; with q given, return its exact causal attention.

        Shapes: k, v [H, S, D]; q [Hq, S, D]; returns [Hq, S, D].
        """
        s = self.settings
        self.k, self.v = np.array(k, np.float64), np.array(v, np.float64)
        n = self.k.shape[1]
        whole = max(0, n - s.sink - s.window) // s.buffer * s.buffer
        self._compress("k", whole, s.prefill_rank)
        self._compress("v", self._slid() if s.value_window == "sliding" else whole, s.prefill_rank)
        return None if q is None else attend(q, k, v, s.scale, causal=True).out

    def step(self, k: ArrayLike, v: ArrayLike, q: ArrayLike) -> Array:
        """Append one token, attend over X^ and the dense tokens; compress if the buffer is full.

        Shapes: k, v [H, D]; q [Hq, D]; returns [Hq, D].
        """
        s = self.settings
        k, v = np.asarray(k, np.float64)[:, None], np.asarray(v, np.float64)[:, None]
        self.k = np.concatenate([self.k, k], axis=1) if self.k.size else k
        self.v = np.concatenate([self.v, v], axis=1) if self.v.size else v
        out = attend(np.asarray(q)[:, None], self.keys(), self.values(), s.scale).out[:, 0]
        full = self.n - s.sink - s.window - self.compressed("k") >= s.buffer
        self._compress("k", s.buffer if full else 0, s.rank)
        if s.value_window == "sliding":
            self._compress("v", self._slid() - self.compressed("v"), s.rank)
        else:
            self._compress("v", s.buffer if full else 0, s.rank)
        return out

    @property
    def n(self) -> int:
        """Tokens seen."""
        return int(self.k.shape[1])

    def chunks(self, role: Role) -> list[Chunk]:
        """The chunks of K or of V, oldest first."""
        return self.k_chunks if role == "k" else self.v_chunks

    def compressed(self, role: Role) -> int:
        """Tokens in chunks."""
        return sum(chunk.n for chunk in self.chunks(role))

    def dense(self, role: Role) -> int:
        """Tokens at full precision, sinks included."""
        return self.n - self.compressed(role)

    def keys(self) -> Array:
        """What a query reads, in order of time. Shapes: [H, n, D]."""
        return self._read("k", self.k)

    def values(self) -> Array:
        """What a query reads, in order of time. Shapes: [H, n, D]."""
        return self._read("v", self.v)

    def _slid(self) -> int:
        """Values that a sliding window has left behind."""
        return max(0, self.n - self.settings.sink - self.settings.buffer)

    def _compress(self, role: Role, n: int, rank: int) -> None:
        if n:
            begin = self.settings.sink + self.compressed(role)
            x = (self.k if role == "k" else self.v)[:, begin : begin + n]
            chunks = self.chunks(role)
            chunks.append(compress(x, role, self.settings, rank, len(chunks)))

    def _read(self, role: Role, exact: Array) -> Array:
        sink = self.settings.sink
        coded = [chunk.x for chunk in self.chunks(role)]
        rest = exact[:, sink + self.compressed(role) :]
        return np.concatenate([exact[:, :sink], *coded, rest], axis=1)


def role_bytes(
    role: Role,
    n: int,
    n_kv_heads: int,
    head_dim: int,
    s: Settings,
    rank: int,
    e: int = 2,
    es: int = 2,
    ez: int | None = None,
) -> dict[str, int]:
    """Bytes of one chunk of K or of V: codes, meta, lowrank, sparse.

    Every packed row of codes is rounded up to whole 32-bit words.
    codes: K has H D rows of n codes, V has H n rows of D codes.
    meta: (es + ez) per group; dual scales: mu and c per channel and r per token, (n + 2 D) es per
    head and tile, and from 4 bits on m and step per channel beside them.
    lowrank: H e (n + D) r'. sparse: 2 k values and indices per row; indices of 2 bytes while the
    row is no longer than 65536, else 4.
    """
    ez = es if ez is None else ez
    bits = s.bits(role)
    channels = n_kv_heads * head_dim
    low_rank, sparse = VARIANTS[s.variant]
    if role == "k":
        codes, rows, row_length = channels * n_words(n, bits) * 4, channels, n
    else:
        codes, rows, row_length = n_kv_heads * n * n_words(head_dim, bits) * 4, n, channels
    if s.scales == "dual":
        tiles = -(-n // (s.tile or n))
        meta = n_kv_heads * (n + 2 * head_dim * tiles) * es
        if bits >= 4:
            meta += channels * tiles * (es + ez)
    elif s.backbone == "kcvt":
        meta = (es + ez) * (channels if role == "k" else n)
    else:
        meta = (es + ez) * channels * n // (s.k_group if role == "k" else s.v_group)
    r = min(rank, n, head_dim) if low_rank else 0
    k = outlier_count(s.outliers, row_length) if sparse else 0
    index = 2 if row_length <= 65536 else 4
    return {
        "codes": codes,
        "meta": meta,
        "lowrank": n_kv_heads * e * (n + head_dim) * r,
        "sparse": rows * 2 * k * (e + index),
    }


def cache_bytes(
    n_kv_heads: int,
    head_dim: int,
    s: Settings,
    k_chunks: Iterable[tuple[int, int]],
    v_chunks: Iterable[tuple[int, int]],
    k_dense: int,
    v_dense: int,
    e: int = 2,
    es: int = 2,
    ez: int | None = None,
) -> dict[str, int]:
    """Sum of `role_bytes` over chunks (n, rank), and dense tokens of K and V: H D e each."""
    total = dict.fromkeys(PARTS, 0)
    total["buffer"] = n_kv_heads * head_dim * (k_dense + v_dense) * e
    listed: list[tuple[Role, Iterable[tuple[int, int]]]] = [("k", k_chunks), ("v", v_chunks)]
    for role, chunks in listed:
        for n, rank in chunks:
            part = role_bytes(role, n, n_kv_heads, head_dim, s, rank, e, es, ez)
            total["codes"] += part["codes"]
            total[f"{role}_meta"] += part["meta"]
            total["lowrank"] += part["lowrank"]
            total["sparse"] += part["sparse"]
    return total


def nbytes(
    cache: GearCache, allocated: bool = False, e: int = 2, es: int = 2, ez: int | None = None
) -> dict[str, int]:
    """Bytes of a cache as it stands; allocated: the buffer has all its slots, not those in use.

    Slots: sink + window + n_b, and one more for the values of a sliding window, which hold n_b
    tokens and the one that came in.
    """
    s = cache.settings
    slots = s.sink + s.window + s.buffer
    return cache_bytes(
        cache.k.shape[0],
        cache.k.shape[2],
        s,
        [(chunk.n, chunk.rank) for chunk in cache.k_chunks],
        [(chunk.n, chunk.rank) for chunk in cache.v_chunks],
        slots if allocated else cache.dense("k"),
        slots + (s.value_window == "sliding") if allocated else cache.dense("v"),
        e,
        es,
        ez,
    )
