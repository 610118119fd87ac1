"""Each method at its lossless limit, tried on small models of many families on either library.

`families_torch` and `families_mlx` make the models and run them. At its limit a cache holds
everything that came, by way of codes, retained originals or kept tokens: the tokens must be those
of the bare library.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from kvc.backends.base import FULL, ModelShape
from kvc.backends.fit import Fit
from kvc.errors import KVCError
from kvc.files import write_kernels
from kvc.methods import Method, parse
from kvc.ops.evict import Kernels
from kvc.store.store import KVStore
from tests.oracles.less_features import random_weights

LIBRARIES = ("mlx", "torch")
N_PROMPT, N_NEW = 20, 14
PIECE = 8  # tokens of a prompt that comes in pieces
TOL = 1e-3  # of logits, relative to the largest

BLOCKS = {"group_size": 8, "buffer": 8}
FULL_RANK = {**BLOCKS, "prefill_rank": 32, "rank": 32, "n_iter": 1}
BUDGET = {"heavy": 60, "recent": 4}  # more than all tokens; most of them leave the ring
KEEP = {"start": 0, "gamma": 1, "decode_policy": "keep"}


class Limit(NamedTuple):
    """The settings under which a method loses nothing, and a part that its cache holds then."""

    settings: dict[str, Any]
    part: str = "window"


def joined(**sections: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": x for name, part in sections.items() for key, x in part.items()}


# Codecs with neither a low-rank fit nor outliers (kivi, kcvt, token) have none.
LIMITS = {
    "none": Limit({}),
    "gear": Limit({**BLOCKS, "outliers": 1}, "outliers"),
    "gear-l": Limit({**FULL_RANK, "bits": 8}, "low rank"),
    "gear2": Limit({**FULL_RANK, "sink": 2, "window": 4}, "low rank"),
    "streaming": Limit(BUDGET, "kept"),
    "h2o": Limit(BUDGET, "kept"),
    "tova": Limit({"heavy": 64}, "kept"),
    "less": Limit(BUDGET, "state"),
    "minicache": Limit(KEEP, "retained"),
    "kvsharer": Limit({"map": "0:0"}),
    "kvsharer+gear": Limit(
        joined(kvsharer={"map": "0:0"}, gear={**BLOCKS, "outliers": 1}), "outliers"
    ),
    "minicache+gear": Limit(joined(minicache=KEEP, gear={**BLOCKS, "outliers": 1}), "retained"),
}
# What a prompt's later pieces retain is up to the first one's extremes, whatever gamma is.
STREAMED = {"minicache": {"always_keep": 64}, "minicache+gear": {"minicache.always_keep": 64}}


class Run(NamedTuple):
    """Greedy tokens of each row, and the logits [B, N_NEW, V] that they come of."""

    tokens: list[list[int]]
    logits: np.ndarray[Any, Any]


class Library(Protocol):
    """What `families_torch` and `families_mlx` have: families by how they take our cache."""

    HANDLE: dict[str, dict[str, Any]]
    DENSE: dict[str, dict[str, Any]]
    REFUSED: dict[str, dict[str, Any]]

    def model(self, family: str) -> Any:
        """The family's tiny model, made once."""

    def plain(self, family: str) -> Run:
        """Its run with the library's own cache, made once."""

    def model_fit(self, model: Any) -> Fit: ...

    def make_cache(self, model: Any, method: Method, prefill: str) -> Any: ...

    def store(self, cache: Any) -> KVStore: ...

    def run(self, model: Any, cache: Any, prefill: str) -> Run: ...


class Outcome(NamedTuple):
    """What became of a method on a model.

    Attributes:
        cell: handle, dense or refused; else the failure: `differs`, or `idle` of a cache that does
            not hold what the method makes.
        note: The reason of a refusal, or what differs.
        tie: Whether tokens differ after all, where two logits are closer than TOL.
    """

    cell: str
    note: str = ""
    tie: bool = False


def library(name: str) -> Library:
    """The families of `mlx` or `torch`.

    Raises:
        ImportError: If the library is not installed.
    """
    return cast("Library", import_module(f"tests.families_{name}"))


def outcome(of: Library, family: str, name: str, folder: Path, prefill: str = "exact") -> Outcome:
    """Generates with a method at its limit and compares with the bare library."""
    model = of.model(family)
    try:
        fit = of.model_fit(model)
        method = at_limit(name, fit.shape, folder, prefill)
        entries = of.make_cache(model, method, prefill)
    except KVCError as error:
        return Outcome("refused", str(error))
    expected, got = of.plain(family), of.run(model, entries, prefill)
    off = max(map(_off, got.tokens, expected.tokens, got.logits, expected.logits))
    if not off <= TOL:  # NaN is not
        return Outcome("differs", f"logits differ by {off:.1e} of the largest")
    parts = of.store(entries).report().parts
    if LIMITS[name].part not in parts:
        return Outcome("idle", f"the cache holds {', '.join(parts)}")
    return Outcome(fit.mode, tie=got.tokens != expected.tokens)


def _off(
    tokens: list[int], expected: list[int], got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]
) -> float:
    """The largest difference of one row's logits up to the first token that differs."""
    same = np.cumprod(np.equal(tokens, expected))
    n = min(int(same.sum()) + 1, len(same))
    return float(np.abs(got[:n] - want[:n]).max() / np.abs(want[:n]).max())


def at_limit(name: str, shape: ModelShape, folder: Path, prefill: str = "exact") -> Method:
    """The method with the settings under which it loses nothing; its files go into `folder`."""
    settings = dict(LIMITS[name].settings)
    if prefill == "stream":
        settings |= STREAMED.get(name, {})
    if name == "less":
        settings["kernels"] = _write_kernels(folder, shape)
    return parse(name, settings)


def _write_kernels(folder: Path, shape: ModelShape) -> str:
    """Random maps with s1 = 0: nothing would be added of what is evicted."""
    sizes = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
    layers = {
        layer: Kernels(**vars(random_weights(*sizes, hidden=8, rank=4, seed=layer, s1=0.0)))
        for layer, kind in enumerate(shape.layer_kinds)
        if kind == FULL
    }
    path = folder / "kernels.safetensors"
    write_kernels(path, layers, shape.fingerprint, {})
    return str(path)
