"""A transformers `Cache` over the store.

Layers with full attention are ours. Sliding, linear and shared layers keep the library's classes.
In "handle" mode a layer gives out handles (see attention.py); models whose attention cannot be set
from outside get tensors that the store builds, which is "dense" mode.
"""

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from kvc.backends.base import FULL
from kvc.backends.torch.attention import Handle, leading_pads
from kvc.backends.torch.graph import Steps
from kvc.errors import ConfigError
from kvc.methods import Method
from kvc.store.store import KVStore

_KINDS = {
    "DynamicLayer": FULL,
    "DynamicSlidingWindowLayer": "sliding_attention",
    "LinearAttentionLayer": "linear_attention",
    "DummyLayer": "no_cache",
}


def kind_of(layer: CacheLayerMixin) -> str:
    """What a layer of the library's own cache keeps; its class, where we do not know."""
    return _KINDS.get(type(layer).__name__, type(layer).__name__)


class KVCLayer(CacheLayerMixin):
    """One layer of the store as the library sees it. What concerns all layers is in `KVCCache`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "KVCCache", layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append to the store and return what attention reads: two handles or two tensors."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape != value_states.shape:
            raise ConfigError(
                f"keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} differ in "
                "shape (multi-head latent attention)"
            )
        cache, store = self.cache, self.cache.store
        cache.batch = key_states.shape[0]
        pads = cache.pads_at(self.get_seq_length(), key_states.shape[2])
        store.append(self.layer, key_states.detach(), value_states.detach(), pads)
        if cache.mode == "handle":
            new = (key_states, value_states)
            k, v = (Handle(store, self.layer, x, cache.always_attend) for x in new)
            return k, v
        dense = None if cache.always_attend else store.dense(self.layer)
        k, v = dense if dense is not None else store.read(self.layer)
        return k.to(key_states.dtype), v.to(value_states.dtype)

    def get_seq_length(self) -> int:
        return self.cache.store.length(self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns the mask has, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def _whole(self, *args: Any) -> None:
        raise ConfigError("kvc: layers are stored together; call this on the cache, not on a layer")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _whole

    def offload(self) -> None:
        raise ConfigError("kvc: a compressed cache stays on its device; do not ask for offloading")

    prefetch = offload


class KVCCache(Cache):
    """The cache to give to `model.generate(past_key_values=...)`; `store` holds the tokens."""

    def __init__(
        self, config: Any, method: Method, prefill: str, mode: str, *, always_attend: bool = False
    ) -> None:
        layers: list[Any] = DynamicCache(config=config).layers
        ours = [i for i, layer in enumerate(layers) if kind_of(layer) == FULL]
        if not ours:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise ConfigError(
                f"kvc: no layer of this {config.model_type} model keeps all its tokens ({kinds}): "
                "there is nothing to compress"
            )
        self.mode = mode
        self.always_attend = always_attend  # even uncompressed tokens are read by the store
        self.model_layers = tuple(ours)  # the model's number of each layer of the store
        self.store = KVStore(method, len(ours), prefill=prefill)
        self.kinds: tuple[str, ...] = ()  # what each of the model's layers keeps, in words
        self.steps: Steps | None = None  # recorded ones; see graph.py
        self.batch = 0
        self._pads: tuple[int, int, list[int] | None] = (0, 0, None)
        for layer, i in enumerate(ours):
            layers[i] = KVCLayer(self, layer)
        super().__init__(layers=layers)
        self.others = [layer for layer in layers if not isinstance(layer, KVCLayer)]
        owners = map(self.store.owner, range(len(ours)))
        self.sharers = frozenset(ours[j] for j, owner in enumerate(owners) if owner != j)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCCache":
        """The same tokens in a cache of its own, which records steps anew."""
        new = memo[id(self)] = copy.copy(self)
        memo[id(self.steps)] = None
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.steps = self.steps and Steps(new, self.steps.record)
        return new

    def note_mask(self, mask: torch.Tensor | None, n_new: int) -> None:
        """Remember where the next `n_new` tokens have left padding, from the 2-D mask."""
        past = self.store.length(0)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and n_new > 1:
            self._pads = (past, n_new, leading_pads(mask, past, n_new))

    def pads_at(self, past: int, n_new: int) -> list[int] | None:
        """The left padding noted for the piece that begins at `past`."""
        return self._pads[2] if self._pads[:2] == (past, n_new) else None

    def reset(self) -> None:
        """Forget all tokens."""
        self.store.reset()
        self._pads = (0, 0, None)
        for layer in self.others:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-n` tokens; a positive number is the length to keep.

        None of them too: then the prompt is over, and what comes is not a piece of it.
        """
        n = tokens_to_remove
        n = -n if n <= 0 else max(self.get_seq_length() - n, 0)
        if self.store.length(0):
            self.store.trim(n)
        for layer in self.others:
            layer.crop(-n)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the cache what row `beam_idx[i]` was."""
        if self.store.length(0):
            self.store.reorder(beam_idx.tolist())
        for layer in self.others:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.store.length(0):
            self.store.reorder([i for i in range(self.batch) for _ in range(repeats)])
        for layer in self.others:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        if self.store.length(0):
            self.store.reorder(indices.tolist())
        for layer in self.others:
            layer.batch_select_indices(indices)
