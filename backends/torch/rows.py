"""A step of several sequences at once in transformers, each with a cache of its own.

Every sequence brings one token, so that there is no padding among the new ones. Models that read
tensors get them padded on the left; handles have every row answered by its own store.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvc.backends.torch.attention import RowsHandle
from kvc.backends.torch.entry import KVCCache
from kvc.store.batch import append_rows, read_rows


class RowsLayer(CacheLayerMixin):
    """One layer of the stores of all rows, as the library sees it."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, rows: "KVCRows", layer: int) -> None:
        super().__init__()
        self.rows, self.layer = rows, layer
        self.is_initialized = True  # the rows hold their prompts

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Appends a token of each row; returns what attention reads: handles or tensors."""
        rows, layer = self.rows, self.layer
        new, counts = (key_states.detach(), value_states.detach()), [1] * len(rows.stores)
        append_rows(rows.stores, layer, *new, counts)
        if rows.mode == "handle":
            k, v = (RowsHandle(rows.stores, layer, x) for x in new)
            return k, v
        k, v = read_rows(rows.stores, layer, 1, counts)
        return k.to(key_states.dtype), v.to(value_states.dtype)

    def get_seq_length(self) -> int:
        """How many tokens the longest row has."""
        return max(store.length(self.layer) for store in self.rows.stores)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns the mask has, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None that is known."""
        return -1

    get_max_cache_shape = get_max_length


class KVCRows(Cache):
    """What to give to the model in place of the caches of the rows, for steps of one token.

    The caches must hold a token at least, and nothing but what is compressed: no layers that keep
    the library's own.
    """

    def __init__(self, caches: Sequence[KVCCache]) -> None:
        first = caches[0]
        self.stores = [cache.store for cache in caches]
        self.mode = first.mode
        self.sharers = frozenset.intersection(*(cache.sharers for cache in caches))
        super().__init__(layers=[RowsLayer(self, i) for i in range(len(first.layers))])

    def inputs(self, tokens: Sequence[int], model: PreTrainedModel) -> dict[str, Any]:
        """The model's arguments for one more token of each row, positions or a mask included."""
        lengths, device = [store.length() for store in self.stores], model.device
        positions = torch.tensor(lengths, device=device)[:, None]
        given = {"input_ids": torch.tensor(tokens, device=device)[:, None]}
        if takes(model, "position_ids"):
            given["position_ids"] = positions
        if self.mode == "dense":
            columns = torch.arange(max(lengths) + 1, device=device)
            given["attention_mask"] = (columns >= max(lengths) - positions).long()
        return {**given, "past_key_values": self, "use_cache": True}


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's forward pass has an argument of this name."""
    return name in _parameters(type(model).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
