"""A transformers `Cache` over the store, and the choice of how a model reads it.

Layers with full attention are ours. Sliding, linear and shared layers keep the library's classes.
In "handle" mode a layer gives out handles (see attention.py); models whose attention cannot be set
from outside get tensors that the store builds, which is "dense" mode. A short trial decides, once
per model: both kinds must give the logits that the plain library gives.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from kvc.backends.torch.attention import (
    Handle,
    decoder_of,
    install,
    is_installed,
    leading_pads,
    supports_interface,
    uninstall,
)
from kvc.backends.torch.projections import free_projections, gates, skip
from kvc.errors import ConfigError
from kvc.methods import Method, parse
from kvc.store.store import KVStore

# Largest difference of logits in the trial, relative to the largest logit.
TRIAL_TOL = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
        ours = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
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
        self.batch = 0
        self._pads: tuple[int, int, list[int] | None] = (0, 0, None)
        for layer, i in enumerate(ours):
            layers[i] = KVCLayer(self, layer)
        super().__init__(layers=layers)
        self._others = [layer for layer in layers if not isinstance(layer, KVCLayer)]
        owners = map(self.store.owner, range(len(ours)))
        self.sharers = frozenset(ours[j] for j, owner in enumerate(owners) if owner != j)

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
        for layer in self._others:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-n` tokens; a positive number is the length to keep."""
        n = tokens_to_remove
        n = -n if n <= 0 else max(self.get_seq_length() - n, 0)
        if n:
            self.store.trim(n)
        for layer in self._others:
            layer.crop(-n)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `i` of the cache what row `beam_idx[i]` was."""
        if self.store.length(0):
            self.store.reorder(beam_idx.tolist())
        for layer in self._others:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.store.length(0):
            self.store.reorder([i for i in range(self.batch) for _ in range(repeats)])
        for layer in self._others:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        if self.store.length(0):
            self.store.reorder(indices.tolist())
        for layer in self._others:
            layer.batch_select_indices(indices)


class _Watch:
    """A forward pre-hook: tells the cache about padding and closes the right gates."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.gates = gates(model)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = next((x for x in args if isinstance(x, KVCCache)), None)
        if not isinstance(cache, KVCCache):
            skip(self.gates, ())
            return
        skip(self.gates, cache.sharers)
        if cache.mode == "handle" and not is_installed(module):
            raise ConfigError(
                "kvc: the attention implementation was changed after this cache was made; "
                "make a new one"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = ids if ids is not None else kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if ids is not None:
            cache.note_mask(mask, ids.shape[1])


def make_cache(model: PreTrainedModel, method: Method, prefill: str = "exact") -> KVCCache:
    """A cache for `model` that keeps its tokens as `method` says.

    Raises:
        ConfigError: If the model and the method do not go together; always before generation.
    """
    mode = model_mode(model)
    if mode == "dense" and method.needs_queries:
        raise ConfigError(
            f"kvc: {type(method).__name__.lower()} needs the queries, and the attention of "
            f"{type(model).__name__} cannot be reached; use a method that only compresses"
        )
    if mode == "handle":
        install(model)
    cache = KVCCache(model.config, method, prefill, mode)
    if cache.sharers:
        free_projections(decoder_of(model), cache.sharers)
        watch(model)
    return cache


def watch(model: PreTrainedModel) -> None:
    """Put the pre-hook on the model and on its decoder, in place of an older one."""
    for module in {id(m): m for m in (model, decoder_of(model))}.values():
        if (old := vars(module).get("_kvc_hook")) is not None:
            old.remove()
        hook = module.register_forward_pre_hook(_Watch(model), with_kwargs=True)
        vars(module)["_kvc_hook"] = hook


def model_mode(model: PreTrainedModel) -> str:
    """How this model reads the cache, "handle" or "dense", found by a trial and remembered.

    Raises:
        ConfigError: If with neither the model gives the logits it gives with its own cache.
    """
    known: str | None = vars(model).get("_kvc_mode")
    if known is not None:
        return known
    if model.config.is_encoder_decoder:
        raise ConfigError("kvc: encoder-decoder models are not supported; use a causal LM")
    reasons = []
    uninstall(model)
    expected = _trial_logits(model, None)
    watch(model)
    for mode in ("handle", "dense"):
        if mode == "handle" and not supports_interface(model):
            reasons.append("handle: no attention interface")
            continue
        error = _trial(model, mode, expected)
        if error is None:
            vars(model)["_kvc_mode"] = mode
            return mode
        uninstall(model)
        reasons.append(f"{mode}: {error}")
    raise ConfigError(f"kvc: {type(model).__name__} cannot use this cache ({'; '.join(reasons)})")


def _trial(model: PreTrainedModel, mode: str, expected: torch.Tensor) -> str | None:
    """Why a cache of this mode does not give the expected logits; None if it does."""
    cache = KVCCache(model.config, parse("none"), "exact", mode, always_attend=True)
    # Any code of any model runs here, and whatever it raises means that it cannot take the cache.
    try:
        if mode == "handle":
            install(model)
        got = _trial_logits(model, cache)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if cache.store.length(0) != 7:
        return "the model does not fill the cache"
    off = float((got - expected).abs().max() / expected.abs().max())
    tol = TRIAL_TOL.get(model.dtype, 1e-3)
    return None if off <= tol else f"logits differ by {off:.1e} of the largest"


@torch.no_grad()
def _trial_logits(model: PreTrainedModel, cache: Cache | None) -> torch.Tensor:
    """Logits after six tokens and after a seventh, for two rows of which one is padded."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(14, device=model.device).reshape(2, 7) * 37 + 11) % vocab
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    was_training = model.training
    model.eval()
    try:
        start = model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache, use_cache=True)
        end = model(
            ids[:, 6:], attention_mask=mask, past_key_values=start.past_key_values, use_cache=True
        )
    finally:
        model.train(was_training)
    return torch.stack((start.logits[:, -1], end.logits[:, -1])).float()
