"""Caches full of random tokens, made without a prefill, and what they must answer in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.races.lab import Lab
from kvc.methods.gear import Gear
from kvc.methods.part import Part
from kvc.ops.dispatch import mode
from kvc.ops.quant import Role
from kvc.store.coded import Coded
from kvc.store.store import KVStore
from kvc.store.unit import Query

COSINE = 0.65  # between the layers that MiniCache merges, as in `kvc.measure.memory`


def coded(codec: Gear, role: Role, x: torch.Tensor, rows: int) -> Coded:
    """A prompt [1, H, T, D] as one block of codes, the same in each of so many rows."""
    past = Coded(codec, role, 0)
    past.append(x, codec.prefill_rank)
    return past.rows([0] * rows)


def fill(lab: Lab, store: KVStore, kv_heads: int, head_dim: int, batch: int, n: int) -> None:
    """A prompt of n random tokens in every layer, compressed, and one token behind it.

    One row is compressed and copied. Layers are filled one after another, so that no more than one
    of them (or a pair that shares a slot) is dense at a time.
    """
    common = lab.randn(2, 1, kv_heads, n, head_dim, seed=1)
    for slot in store._slots:
        paired = len(slot.layers) > 1
        prompts = {}
        for layer in slot.layers:
            own = lab.randn(2, 1, kv_heads, n, head_dim, seed=2 + layer)
            prompts[layer] = COSINE**0.5 * common + (1 - COSINE) ** 0.5 * own if paired else own
            store.append(layer, *prompts[layer])
        for layer in slot.layers:
            store.append(layer, *prompts[layer][..., :1, :])
    for layer in range(len(store._owners)):
        if store.owner(layer) != layer:  # it stores nothing, but it counts
            store.append(layer, *common)
            store.append(layer, *common[..., :1, :])
    if batch > 1:
        store.reorder([0] * batch)


def wide(x: Any) -> Any:
    """A part of a store with every number that is not an integer in float64."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple):
        return type(x)(*map(wide, x)) if hasattr(x, "_fields") else tuple(map(wide, x))
    if isinstance(x, list):
        return [wide(y) for y in x]
    if dataclasses.is_dataclass(x) and not isinstance(x, Part):  # parts of methods hold no arrays
        named = {f.name: wide(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **named)  # type: ignore[type-var]
    return x


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((got.double() - want).abs().max() / want.abs().max())


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention in the dtype given, one head after another.

    Shapes: q [B, Hq, 1, D]; k, v [B, H, T, D].
    """
    B, Hq, L, D = q.shape
    H = k.shape[1]
    grouped = q.reshape(B, H, Hq // H * L, D)
    each = []
    for head in range(H):
        scores = grouped[:, head] @ k[:, head].mT * D**-0.5
        each.append(scores.softmax(-1) @ v[:, head])
    return torch.stack(each, 1).reshape(B, Hq, L, D)


def sdpa_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Of the library's attention, in the first row, against float64."""
    q, k, v = q[:1], k[:1], v[:1]
    got = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return error(got, attend(q.double(), k.double(), v.double()))


def store_error(lab: Lab, store: KVStore, heads: int) -> float:
    """Of the attention of the first layer with a random query, in the first row.

    In the mode that stands; against the definitions in float64 over the same tokens and codes.
    """
    slot = store._slots[0]
    layer = slot.layers[0]
    kv = store.dense(layer)
    unit: Any = slot.units()[0][1]
    first = unit.k if hasattr(unit, "state") else unit.faces[0].k.window.x
    B, _, _, D = first.shape
    q = lab.randn(B, heads, 1, D, seed=9)
    if kv is not None:  # the library attends for itself
        return sdpa_error(q, *kv)
    with mode("reference"):
        alone = wide(unit.rows([0]))
        want = alone.faces[0].attend(Query(q[:1].double(), D**-0.5)).out
    return error(store.attend(layer, q, D**-0.5)[:1], want)
