"""Torch's tensors as the numbers of a cache file, and back, and layers that are not ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvc.backends.torch.entry import KVCCache, KVCLayer, kind_of
from kvc.errors import CacheFileError
from kvc.files.cache import Raw
from kvc.store.archive import FLOATS, Archive
from kvc.store.store import KVStore

MAPPED = True  # tensors may be views of the file; what is written to them stays in memory


def raw(x: torch.Tensor) -> Raw:
    """The numbers of a tensor, bfloat16 as uint16."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.numpy()


def array(x: Raw, dtype: str, like: torch.device) -> torch.Tensor:
    """A tensor of such numbers on a device; torch's words are signed."""
    signed = {"uint32": np.int32, "bfloat16": np.int16}.get(dtype)
    found = torch.from_numpy(x if signed is None else x.view(signed))
    return (found.view(torch.bfloat16) if dtype == "bfloat16" else found).to(like)


def key_dtype(model: PreTrainedModel) -> str:
    """The dtype of the model's keys and values."""
    return str(model.dtype).removeprefix("torch.")


def place(model: PreTrainedModel) -> torch.device:
    """Where its cache is."""
    return model.device


def store_of(cache: KVCCache) -> KVStore:
    """The store behind a cache."""
    return cache.store


def exchange(archive: Archive, cache: KVCCache) -> None:
    """Writes what layers hold that are not the store's, or takes it from a file.

    Raises:
        CacheFileError: If a layer cannot be written, or a file has none like it.
    """
    for i, layer in enumerate(cache.layers):
        kind = kind_of(layer)
        if isinstance(layer, KVCLayer) or kind == "no_cache":
            continue
        ar = archive.at(f"layers.{i}")
        if kind == "sliding_attention":
            ar.kind(kind)
            _sliding(ar, layer)
        elif kind == "linear_attention":
            ar.kind(f"{kind} of transformers")
            _linear(ar, layer)
        else:
            raise CacheFileError(f"layer {i}: cannot keep a {kind} of transformers in a file")
    if archive.reading:
        cache.batch = archive.rows


def _sliding(ar: Archive, layer: Any) -> None:
    """The newest tokens in order of time, one less than the window: the next one's own is in it."""
    n = min(ar.columns, layer.sliding_window - 1)
    held = None if ar.reading else (layer.keys[:, :, -n:], layer.values[:, :, -n:])
    shape = (ar.rows, None, n, None)
    k, v = (ar.array(f"{z}.sliding", held and held[i], FLOATS, shape) for i, z in enumerate("kv"))
    if ar.reading:
        layer.lazy_initialization(k, v)
        layer.keys, layer.values, layer.cumulative_length = k, v, ar.columns


def _linear(ar: Archive, layer: Any) -> None:
    """States of one size, as the library lays them out."""
    for i in range(ar.number("states", layer.number_of_states, 1, layer.number_of_states)):
        conv, state = (
            _free(ar, f"{name}{i}", getattr(layer, f"{name}_states")[i])
            for name in ("conv", "recurrent")
        )
        seen = ar.flag(f"seen{i}", layer.has_previous_state[i])
        if ar.reading:
            layer.lazy_initialization(conv, state, i)
            for held, x in ((layer.conv_states, conv), (layer.recurrent_states, state)):
                if x is not None:
                    held[i].copy_(x)
            layer.has_previous_state[i] = seen


def _free(ar: Archive, name: str, x: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of a shape that only the library knows, if there is one."""
    return ar.array(name, x, FLOATS, None) if ar.has(name, x) else None
