"""The cache of one MiniCache pair and one row, prefill and decode, and its bytes.

Liu et al. 2024, arXiv:2405.14366.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.attention import Array, attend
from tests.oracles.minicache import Block, Thresholds, merge_block, restore, thresholds

# Directions [n, G, W] of one block -> what is read back; also given: "k" or "v", and its index.
Codec = Callable[[Array, str, int], Array]
POLICIES = ("frozen", "keep", "buffer")


class Layer(NamedTuple):
    """Exact tokens of one layer. Shapes: [H, n, D]."""

    k: Array
    v: Array


@dataclass
class MiniCachePair:
    """Layers a and b = a + 1: merged blocks, then the newest tokens exact in both layers.

    Decode tokens: frozen: merged one by one, retained by the thresholds of the first merged
    block; keep: never merged; buffer: merged n_b at a time, by the same frozen thresholds. With a
    codec of directions (or whole_blocks) only whole blocks of n_b are merged at prefill too.
    """

    t: float = 0.6
    how: str = "slerp"
    rule: str = "angle"
    gamma: float = 0.05
    granularity: str = "head"
    always_keep: int = 1
    decode_policy: str = "frozen"
    buffer: int = 64  # n_b
    codec: Codec | None = None
    whole_blocks: bool = False
    direction_dtype: str | None = None
    norm_dtype: str | None = None
    scale: float | None = None
    n_merged: int = 0
    tail: dict[str, Layer] = field(default_factory=dict)  # layer name -> exact tokens
    blocks: dict[str, list[Block]] = field(default_factory=lambda: {"k": [], "v": []})
    limits: dict[str, Thresholds] = field(default_factory=dict)  # of K and of V

    def __post_init__(self) -> None:
        """Refuse what the method cannot mean."""
        if self.decode_policy not in POLICIES:
            raise ValueError(f"decode_policy: expected one of {POLICIES}")
        if self.codec is not None:
            self.whole_blocks = True
        if self.whole_blocks and self.decode_policy == "frozen":
            raise ValueError("whole blocks cannot be merged one decode token at a time")

    def prefill(self, ka: ArrayLike, va: ArrayLike, kb: ArrayLike, vb: ArrayLike) -> None:
        """Take both layers' prompts, over which attention was exact, and merge.

        Shapes: [H, n, D] each.
        """
        self.tail["a"] = Layer(np.array(ka, np.float64), np.array(va, np.float64))
        self.tail["b"] = Layer(np.array(kb, np.float64), np.array(vb, np.float64))
        n = self.tail["a"].k.shape[1]
        self._merge(n // self.buffer * self.buffer if self.whole_blocks else n)

    def step(
        self,
        qa: ArrayLike,
        ka: ArrayLike,
        va: ArrayLike,
        qb: ArrayLike,
        kb: ArrayLike,
        vb: ArrayLike,
    ) -> tuple[Array, Array]:
        """Each layer attends to its restored past and its own exact new token; then they merge.

        Shapes: q [Hq, D]; k, v [H, D]; returns two [Hq, D].
        """
        outs = []
        for name, q, k, v in (("a", qa, ka, va), ("b", qb, kb, vb)):
            k, v = np.asarray(k, np.float64)[:, None], np.asarray(v, np.float64)[:, None]
            old = self.tail.get(name, Layer(k[:, :0], v[:, :0]))
            self.tail[name] = Layer(
                np.concatenate([old.k, k], axis=1), np.concatenate([old.v, v], axis=1)
            )
            out = attend(np.asarray(q)[:, None], *self.restored(name), self.scale).out
            outs.append(out[:, 0])
        waiting = self.tail["a"].k.shape[1]
        if self.decode_policy == "frozen":
            self._merge(waiting)
        elif self.decode_policy == "buffer" and waiting >= self.buffer:
            self._merge(self.buffer)
        return outs[0], outs[1]

    def restored(self, layer: str) -> tuple[Array, Array]:
        """What layer "a" or "b" reads: restored blocks, then exact tokens. Shapes: [H, n, D]."""
        tail = self.tail[layer]
        n_heads = tail.k.shape[0]
        past_k = [restore(block, layer, n_heads) for block in self.blocks["k"]]
        past_v = [restore(block, layer, n_heads) for block in self.blocks["v"]]
        return np.concatenate([*past_k, tail.k], axis=1), np.concatenate([*past_v, tail.v], axis=1)

    def n_retained(self, tensor: str) -> int:
        """Retained entries of K or of V: (token, head), or tokens at granularity "token"."""
        return sum(int(block.kept.sum()) for block in self.blocks[tensor])

    def nbytes(self, e: int = 2, em: int = 2) -> dict[str, int]:
        """`pair_bytes` as the pair stands; directions uncoded."""
        n_heads, n_dense, head_dim = self.tail["a"].k.shape
        m_k, m_v = self.n_retained("k"), self.n_retained("v")
        return pair_bytes(
            self.n_merged, n_heads, head_dim, m_k, m_v, e, em, self.granularity, self.how, n_dense
        )

    def _merge(self, n: int) -> None:
        if n == 0:
            return
        a, b = self.tail["a"], self.tail["b"]
        for tensor in ("k", "v"):
            blocks = self.blocks[tensor]
            block = merge_block(
                getattr(a, tensor)[:, :n],
                getattr(b, tensor)[:, :n],
                self.t,
                self.how,
                self.rule,
                self.gamma,
                self.granularity,
                max(0, self.always_keep - self.n_merged),
                self.limits.get(tensor),
                self.direction_dtype,
                self.norm_dtype,
            )
            if tensor not in self.limits and self.rule != "none":
                self.limits[tensor] = thresholds(block.angles, self.rule, self.gamma)
            if self.codec is not None:
                block = replace(block, e=self.codec(block.e, tensor, len(blocks)))
            blocks.append(block)
        self.n_merged += n
        self.tail = {name: Layer(x.k[:, n:], x.v[:, n:]) for name, x in self.tail.items()}


def pair_bytes(
    n: int,
    n_kv_heads: int,
    head_dim: int,
    m_k: int = 0,
    m_v: int = 0,
    e: int = 2,
    em: int = 2,
    granularity: str = "head",
    how: str = "slerp",
    n_dense: int = 0,
) -> dict[str, int]:
    """Direction 2 n H D e; norms 2 (2 n H em); retained sum_X (2 m_X D e + 4 m_X); 4 thresholds.

    granularity "token": norms 2 (2 n em), retained 2 m H D e + 4 m. "mean" has no norms. Tokens
    that are not merged: 4 H D e each.
    """
    per_token = n_kv_heads if granularity == "head" else 1
    width = n_kv_heads * head_dim // per_token
    return {
        "direction": 2 * n * n_kv_heads * head_dim * e,
        "norms": 0 if how == "mean" else 2 * 2 * n * per_token * em,
        "retained": sum(2 * m * width * e + 4 * m for m in (m_k, m_v)),
        "thresholds": 4 * 4,
        "dense": 4 * n_kv_heads * head_dim * e * n_dense,
    }
