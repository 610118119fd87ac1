"""LESS: a sparse policy and a recurrent state of what it evicts, token by token.

Dong et al. 2024, arXiv:2402.09398. Policies: H2O, arXiv:2306.14048; sink + recent,
arXiv:2309.17453; TOVA, arXiv:2401.06104. Feature maps: `less_features`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tests.oracles.attention import (
    Array,
    attend,
    attention_mass,
    kv_head,
    log_sum_exp,
    probs,
    softmax,
    stored,
)
from tests.oracles.codes import n_words, quantize_group
from tests.oracles.less_features import Features

POLICIES = ("h2o", "sink", "tova")


class Answer(NamedTuple):
    """One query's answer: its output and the log of its denominator."""

    out: Array  # [D]
    lse: float


def combine(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    state: ArrayLike,
    norm: ArrayLike,
    features: ArrayLike,
    scale: float | None = None,
) -> Answer:
    """Output [sum_S exp(s_i) v_i + phi Hs] / [sum_S exp(s_i) + rho], rho = phi z.

    Stable: mu = max(max_S s_i, log rho); the state's part is exp(log rho - mu) (phi Hs) / rho.
    Gated, per query, on rho > 0: where it is not, the answer is that of the kept tokens alone.

    Shapes: q [D]; keys, values [n, D]; state [R, D]; norm [R]; features [R]; returns out [D].
    """
    q, values = np.asarray(q, np.float64), np.asarray(values, np.float64)
    features = np.asarray(features, np.float64)
    scale = len(q) ** -0.5 if scale is None else scale
    s = [scale * float(q @ k) for k in np.asarray(keys, np.float64)]
    rho = float(features @ np.asarray(norm, np.float64))
    parts, rows = list(s), list(values)
    if rho > 0:
        parts.append(float(np.log(rho)))
        rows.append(features @ np.asarray(state, np.float64) / rho)
    out = np.zeros(values.shape[-1])
    for weight, row in zip(softmax(parts), rows, strict=True):
        out += weight * row
    return Answer(out, log_sum_exp(parts))


def largest(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` largest scores, in order of time; of equal ones the older wins."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(ranked[: max(0, count)])


def select(
    policy: str, positions: list[int], scores: list[float], n: int, heavy: int, recent: int
) -> list[int]:
    """Indices into `positions` (ascending) that a policy keeps, once n tokens have been seen.

    No more than c = heavy + recent tokens: all are kept.
    h2o: the last w, and the h largest scores of the older ones. sink: the first h and the last w.
    tova: the c largest scores, with no window, so the newest may go.
    """
    everything = list(range(len(positions)))
    if len(positions) <= heavy + recent:
        return everything
    if policy == "tova":
        return largest(scores, heavy + recent)
    last = [i for i in everything if positions[i] >= n - recent]
    older = [i for i in everything if positions[i] < n - recent]
    if policy == "sink":
        return [i for i in older if positions[i] < heavy] + last
    if policy != "h2o":
        raise ValueError(f"policy: expected one of {POLICIES}, got {policy}")
    return [older[i] for i in largest([scores[i] for i in older], heavy)] + last


class KeptQuantizer(NamedTuple):
    """Per-token groups of `group` channels inside a head, for K and V alike."""

    bits: int
    group: int
    meta: str | None = None

    def __call__(self, x: ArrayLike) -> Array:
        """Value deq(quant(x)) of one token of one head. Shapes: x [D]; returns [D]."""
        x = np.asarray(x, np.float64)
        if len(x) % self.group:
            raise ValueError(f"{len(x)} channels are not whole groups of {self.group}")
        out = np.zeros_like(x)
        for d in range(0, len(x), self.group):
            codes, m, step = quantize_group(x[d : d + self.group], self.bits, self.meta)
            out[d : d + self.group] = codes * step + m
        return out


@dataclass
class Head:
    """What one key/value head holds."""

    state: Array  # [R, D], sum of psi(k) v^T over the evicted
    norm: Array  # [R], sum of psi(k) over the evicted
    positions: list[int] = field(default_factory=list)  # of the kept tokens, ascending
    keys: list[Array] = field(default_factory=list)  # [D] each, as stored
    values: list[Array] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    coded: list[bool] = field(default_factory=list)  # whether the slot has been quantized
    evicted: list[int] = field(default_factory=list)  # positions, in order of eviction


@dataclass
class LessCache:
    """One layer of LESS for one row without padding. `features` None: the bare sparse policy.

    heavy h, recent w, capacity c = h + w. H2O's scores are accumulated attention mass, summed
    over the G query heads of a key head; TOVA's are the newest query's probabilities, averaged
    over all query heads, so that it keeps one set for the layer.
    """

    policy: str
    heavy: int
    recent: int
    features: Features | None = None
    scale: float | None = None
    quantizer: KeptQuantizer | None = None  # of the kept tokens older than the last w
    state_dtype: str | None = None
    heads: list[Head] = field(default_factory=list)
    n: int = 0

    @property
    def capacity(self) -> int:
        """C = h + w."""
        return self.heavy + self.recent

    def prefill(self, q: ArrayLike, k: ArrayLike, v: ArrayLike) -> Array:
        """Exact causal attention over the prompt; then select, and fold what is dropped at once.

        H2O's score of a column is the full softmax probability summed over the prompt's queries;
        TOVA's is the last query's.

        Shapes: q [Hq, n, D]; k, v [H, n, D]; returns [Hq, n, D].
        """
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        self._start(k.shape[0], k.shape[2])
        self.n = k.shape[1]
        if self.n == 0:
            return np.zeros(q.shape)
        mass = attention_mass(q, k, self.scale, causal=True)
        if self.policy == "tova":
            newest = probs(q[:, -1:], k, self.scale)[:, 0]
            mass = np.repeat([newest.mean(axis=0)], k.shape[0], axis=0)
        for g, head in enumerate(self.heads):
            for t in range(self.n):
                self._append(head, t, k[g, t], v[g, t])
                head.scores[t] = float(mass[g, t])
            self._evict(g)
        return attend(q, k, v, self.scale, causal=True).out

    def step(self, q: ArrayLike, k: ArrayLike, v: ArrayLike) -> Array:
        """Append one token, answer, account for the probabilities, evict, and only then quantize.

        The step sees at most c kept tokens, itself and the state of earlier evictions. Scores use
        the probabilities renormalized over the kept tokens, without the state's share.

        Shapes: q [Hq, D]; k, v [H, D]; returns [Hq, D].
        """
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        if not self.heads:
            self._start(k.shape[0], k.shape[1])
        for g, head in enumerate(self.heads):
            self._append(head, self.n, k[g], v[g])
        self.n += 1
        out = np.zeros(q.shape)
        shares: list[Array] = []  # per query head, over the kept tokens of its key head
        for j in range(len(q)):
            head = self.heads[kv_head(j, len(q), len(self.heads))]
            out[j] = self.answer(j, q[j], len(q)).out
            shares.append(probs(q[j][None, None], np.array(head.keys)[None], self.scale)[0, 0])
        for g, head in enumerate(self.heads):
            mine = [p for j, p in enumerate(shares) if kv_head(j, len(q), len(self.heads)) == g]
            if self.policy == "tova":  # all heads keep the same tokens
                head.scores = [float(s) for s in np.mean(shares, axis=0)]
            else:
                head.scores = [
                    s + float(p) for s, p in zip(head.scores, np.sum(mine, axis=0), strict=True)
                ]
            self._evict(g)
        return out

    def answer(self, j: int, q: ArrayLike, n_heads: int) -> Answer:
        """What query head j of n_heads reads now: kept tokens and state. Shapes: q [D]."""
        q = np.asarray(q, np.float64)
        head = self.heads[kv_head(j, n_heads, len(self.heads))]
        features = np.zeros(0) if self.features is None else self.features.phi(j, q)
        keys, values = np.array(head.keys), np.array(head.values)
        return combine(q, keys, values, head.state, head.norm, features, self.scale)

    def _start(self, n_kv_heads: int, head_dim: int) -> None:
        rank = 0 if self.features is None else self.features.rank
        self.heads = [Head(np.zeros((rank, head_dim)), np.zeros(rank)) for _ in range(n_kv_heads)]

    def _append(self, head: Head, position: int, k: Array, v: Array) -> None:
        head.positions.append(position)
        head.keys.append(k.copy())
        head.values.append(v.copy())
        head.scores.append(0.0)
        head.coded.append(False)

    def _evict(self, g: int) -> None:
        head = self.heads[g]
        kept = select(self.policy, head.positions, head.scores, self.n, self.heavy, self.recent)
        for i in range(len(head.positions)):
            if i not in kept:
                head.evicted.append(head.positions[i])
                if self.features is not None:
                    # psi of the key that is stored: quantized, where the slot was.
                    features = self.features.psi(g, head.keys[i])
                    head.state = head.state + np.outer(features, head.values[i])
                    head.norm = head.norm + features
        head.state = stored(head.state, self.state_dtype)
        head.norm = stored(head.norm, self.state_dtype)
        for name in ("positions", "keys", "values", "scores", "coded"):
            setattr(head, name, [getattr(head, name)[i] for i in kept])
        for i, position in enumerate(head.positions):
            if self.quantizer and not head.coded[i] and position < self.n - self.recent:
                head.keys[i] = self.quantizer(head.keys[i])
                head.values[i] = self.quantizer(head.values[i])
                head.coded[i] = True


def nbytes(
    n_kv_heads: int,
    head_dim: int,
    capacity: int,
    rank: int,
    policy: str,
    e: int = 2,
    state_bytes: int = 4,
    n_kept: int | None = None,
) -> dict[str, int]:
    """Kept 2 H (c+1) D e; state H R (D + 1) 4; positions H (c+1) 4; scores likewise, H2O alone.

    With n_kept: the logical bytes of `kept`, with that many tokens in place of c + 1.
    """
    slots = capacity + 1
    return {
        "kept": 2 * n_kv_heads * (slots if n_kept is None else n_kept) * head_dim * e,
        "state": n_kv_heads * rank * (head_dim + 1) * state_bytes,
        "positions": n_kv_heads * slots * 4,
        "scores": n_kv_heads * slots * 4 if policy == "h2o" else 0,
    }


def kept_bytes_quantized(
    n_kv_heads: int,
    head_dim: int,
    n_dense: int,
    n_coded: int,
    bits: int,
    group: int,
    e: int = 2,
    es: int = 2,
) -> int:
    """2 H (n_dense D e + n_coded (4 ceil(D b / 32) + 2 es D / g)): dense and coded slots apart."""
    coded = 4 * n_words(head_dim, bits) + 2 * es * head_dim // group
    return 2 * n_kv_heads * (n_dense * head_dim * e + n_coded * coded)
