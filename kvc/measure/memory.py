"""Bytes per token of every preset, measured on stores of a model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvc.backends.base import FULL, ModelShape
from kvc.errors import KVCError
from kvc.methods import PRESETS, KVSharer, Method, MiniCache, parse
from kvc.store.store import KVStore

LENGTHS = (512, 1024)  # of two prompts; the difference is what the tokens between them cost
COSINE = 0.65  # of adjacent layers' vectors, as MiniCache's authors show it for the upper half


@dataclass(frozen=True, slots=True)
class Cost:
    """One row: the bytes of all layers that keep all their tokens, for one sequence."""

    method: str
    bytes_per_token: float
    fixed_bytes: int  # whatever the length
    ratio: float | None  # dense bytes per token over these; None where a token costs nothing
    note: str = ""  # why there are no figures, or what they rest on


def cost_table(shape: ModelShape) -> list[Cost]:
    """What each preset costs a model, from prompts of random numbers.

    Methods do not look at values, but for MiniCache: its layers' vectors are given the cosine that
    its authors report.
    """
    return [_cost(name, shape) for name in PRESETS]


def _cost(name: str, shape: ModelShape) -> Cost:
    try:
        method = parse(name).check(shape)
    except KVCError as error:
        return Cost(name, 0.0, 0, None, str(error))
    short, long = (_nbytes(method, shape, n) for n in LENGTHS)
    slope = (long - short) / (LENGTHS[1] - LENGTHS[0])
    layers = shape.layer_kinds.count(FULL)
    dense = 2 * layers * shape.n_kv_heads * shape.head_dim * shape.dtype_bytes
    fixed = round(short - slope * LENGTHS[0])
    return Cost(name, slope, fixed, dense / slope if slope else None, _note(method))


def _note(method: Method) -> str:
    """What a method's figures rest on, if on more than its parameters."""
    if isinstance(method.layout, MiniCache):
        return f"at a cosine of {COSINE} between layers"
    if isinstance(method.layout, KVSharer):
        return f"with the map {method.layout.map}"
    if method.memory and method.memory.kernels:
        return f"with {Path(method.memory.kernels).name}"
    return ""


def _nbytes(method: Method, shape: ModelShape, n: int) -> int:
    """Bytes in use for a prompt of `n` tokens and one more, at which a store compresses it.

    One layer that is alone stands for all such layers, and one pair for all pairs. Layers that read
    another one's cache hold nothing.
    """
    n_layers = shape.layer_kinds.count(FULL)
    pairs = method.pairs(n_layers)
    total = 0
    if pairs:
        total += len(pairs) * _held(method, shape, n_layers, pairs[0], n)
    if alone := len({*method.owners(n_layers)}) - 2 * len(pairs):
        total += alone * _held(method, shape, n_layers, (0,), n)
    return total


def _held(method: Method, shape: ModelShape, n_layers: int, layers: tuple[int, ...], n: int) -> int:
    """Bytes that some layers hold, without the room of buffers that grow."""
    store = KVStore(method, n_layers)
    rng = np.random.default_rng(0)
    size = (2, 1, shape.n_kv_heads, n + 1, shape.head_dim)
    common, dtype = rng.standard_normal(size), f"float{8 * shape.dtype_bytes}"
    group = shape.n_heads // shape.n_kv_heads
    for t in (slice(0, n), slice(n, n + 1)):
        for layer in layers:
            own = np.random.default_rng(layer).standard_normal(size)
            x = (COSINE**0.5 * common + (1 - COSINE) ** 0.5 * own).astype(dtype)
            k, v = x[:, :, :, t]
            store.append(layer, k, v)
            if store.dense(layer) is not None:
                store.observe(layer, k.repeat(group, 1), shape.head_dim**-0.5)
    report = store.report()
    if method.memory:  # its buffers have one size, whatever is in them yet
        return report.nbytes
    return report.nbytes - report.parts.get("slack", 0)
