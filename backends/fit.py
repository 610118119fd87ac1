"""What a trial tells of how a model takes our cache, and what follows from it, on any library."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvc.backends.base import FULL, ModelShape
from kvc.errors import ConfigError
from kvc.methods import Method
from kvc.store.store import KVStore

# Why weights that nobody reads cannot be freed.
FUSED = "q, k and v are one matrix in this model: the projections still run"
# What the authors of models call the projections before attention, and the one behind it.
INPUTS = ("q_proj", "qkv_proj", "query_key_value", "c_attn")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


# What layers keep that are not ours, by their kind.
_OTHERS = {
    "sliding_attention": ", it keeps a window only",
    "chunked_attention": ", it keeps a chunk only",
    "linear_attention": ", it keeps a state of one size",
}
_NO_CACHE = "no_cache: it reads another layer's by the model's design, or has no attention"


@dataclass(frozen=True, slots=True)
class Fit:
    """What the trial found: how the model reads the cache, and its sizes.

    Attributes:
        mode: "handle", where attention comes to the store, or "dense", where it does not.
        shape: The model's sizes.
    """

    mode: str
    shape: ModelShape


def describe(shape: ModelShape, store: KVStore) -> tuple[str, ...]:
    """What each of a model's layers keeps, in words."""
    kinds = shape.layer_kinds
    numbers = shape.full_layers
    method = store.method
    partner = {a: b for pair in method.pairs(len(numbers)) for a, b in (pair, pair[::-1])}
    alone = "compressed" if method.memory or method.codec else "as it came"
    words = [
        _NO_CACHE
        if kind == "no_cache"
        else f"{kind}: the library's own cache{_OTHERS.get(kind, '')}"
        for kind in kinds
    ]
    for layer, number in enumerate(numbers):
        owner = store.owner(layer)
        what = f"merged with layer {numbers[partner[layer]]}" if layer in partner else alone
        words[number] = f"{FULL}: {what if owner == layer else f'reads layer {numbers[owner]}'}"
    return (*words, *[_NO_CACHE] * (shape.n_layers - len(kinds)))


def in_short(error: Exception) -> str:
    """An error of a library's code as a part of a line."""
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]


def refusal(name: str, error: Exception) -> ConfigError:
    """For a model that does not even run with the cache of its own library."""
    return ConfigError(
        f"kvc: expected a causal language model, got {name}, which cannot take one token after "
        f"others: {in_short(error)}"
    )


def no_numbers(name: str) -> ConfigError:
    """For a model whose logits are no numbers even with the cache of its own library."""
    return ConfigError(
        f"kvc: expected numbers from {name}, got NaN or infinity, without this cache too: its "
        "weights are damaged, or too large for its dtype"
    )


def check_eviction(method: Method, fit: Fit) -> None:
    """Refuse a method that drops tokens in a model whose attention does not come to us.

    Raises:
        ConfigError: If it is so.
    """
    if fit.mode == "dense" and method.evicts:
        raise ConfigError(
            f"kvc: {method.name} evicts tokens, and the attention of {fit.shape.family} "
            "cannot be reached; use a method that only compresses"
        )


def check_weights(freed: Collection[int], sharers: Collection[int]) -> None:
    """Refuse a cache in which a layer needs key and value weights that were freed.

    Args:
        freed: The layers without weights, by the model's numbers.
        sharers: The layers that need none with this cache.

    Raises:
        ConfigError: If it is so.
    """
    if lost := sorted(set(freed) - set(sharers)):
        raise ConfigError(
            f"kvc: the key and value weights of layers {lost} were freed for a sharing method; "
            "load the model again to use it without"
        )
