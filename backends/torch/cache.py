"""The cache for a model of transformers, and how the model takes it: found by a trial, once.

Both modes (see entry.py) must give the logits that the plain library gives.
"""

import copy
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kvc.backends.base import ALONE, ModelShape, Shard
from kvc.backends.fit import (
    Fit,
    check_eviction,
    check_weights,
    describe,
    in_short,
    no_numbers,
    refusal,
)
from kvc.backends.torch.attention import (
    decoder_of,
    install,
    is_installed,
    supports_interface,
    uninstall,
)
from kvc.backends.torch.entry import KVCCache, kind_of
from kvc.backends.torch.graph import Steps, record, route, why_not
from kvc.backends.torch.projections import (
    free_projections,
    freed_layers,
    gates,
    put_gates,
    skip,
)
from kvc.backends.torch.rows import KVCRows
from kvc.errors import ConfigError
from kvc.methods import Method, parse
from kvc.ops.codec import spans_heads

# Largest difference of logits in the trial, relative to the largest logit.
TRIAL_TOL = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Watch:
    """A forward pre-hook: tells the cache about padding and closes the right gates."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.gates = gates(model)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = next((x for x in args if isinstance(x, KVCCache)), None)
        if not isinstance(cache, KVCCache | KVCRows):
            skip(self.gates, ())
            return
        skip(self.gates, cache.sharers)
        if cache.mode == "handle" and not is_installed(module):
            raise ConfigError(
                "kvc: the attention implementation was changed after this cache was made; "
                "make a new one"
            )
        if isinstance(cache, KVCRows):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = ids if ids is not None else kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if ids is not None:
            cache.note_mask(mask, ids.shape[1])


def make_cache(
    model: PreTrainedModel,
    method: Method,
    prefill: str = "exact",
    *,
    free: bool = False,
    graph: bool = False,
) -> KVCCache:
    """A cache for `model` that keeps its tokens as `method` says.

    Key and value projections of layers that read another layer's cache do not run with this cache.
    Their weights stay for other caches, unless `free` gives back their memory, for good; models
    that have q, k and v in one matrix keep them.

    With `graph` steps of one token are recorded as a CUDA graph and replayed.

    Raises:
        ConfigError: If the model and the method do not go together; always before generation.
        ArtifactError: If the method's files are of another model.
    """
    fit = model_fit(model)
    method = method.check(fit.shape)
    check_eviction(method, fit)
    if fit.mode == "handle":
        install(model)
    cache = KVCCache(model.config, method, prefill, fit.mode)
    cache.kinds = describe(fit.shape, cache.store)
    if graph:
        if _gathers(method, fit.shape):
            raise ConfigError(
                "graph: expected values that each process codes alone, got a method whose outliers "
                f"or steps span the heads of {fit.shape.shard.count} processes; leave it out"
            )
        if reason := why_not(model, method, fit.mode, len(cache.others)):
            raise ConfigError(f"graph: expected {reason}; leave it out")
        cache.steps = Steps(cache, record)
        route(model)
    check_weights(freed_layers(model), cache.sharers)
    if cache.sharers:
        put_gates(model, cache.sharers)
        watch(model)
        if free:
            joins(model)  # the trial reads the weights
            free_projections(model, cache.sharers)
    return cache


def _gathers(method: Method, shape: ModelShape) -> bool:
    """Whether processes that share a model's heads must meet to code its values."""
    codec = method.codec
    if codec is None or shape.shard.count == 1:
        return False
    spec = codec.spec("v", codec.buffer, shape.head_dim)
    return spans_heads(spec, codec.outliers, shape.n_kv_heads)


def watch(model: PreTrainedModel) -> None:
    """Put the pre-hook on the model and on its decoder, in place of an older one."""
    for module in {id(m): m for m in (model, decoder_of(model))}.values():
        if (old := vars(module).get("_kvc_hook")) is not None:
            old.remove()
        hook = module.register_forward_pre_hook(_Watch(model), with_kwargs=True)
        vars(module)["_kvc_hook"] = hook


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The sizes of a model.

    Raises:
        ConfigError: If the model cannot take our cache.
    """
    return model_fit(model).shape


def model_fit(model: PreTrainedModel) -> Fit:
    """The trial's result, remembered on the model.

    Raises:
        ConfigError: If the model gives other logits with our cache than with its own.
    """
    known: Fit | None = vars(model).get("_kvc_fit")
    if known is not None:
        return known
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"kvc: expected a causal language model, got {type(model).__name__}, an "
            "encoder-decoder model"
        )
    reasons = []
    uninstall(model)
    try:
        expected = _trial_logits(model, None)
    except Exception as why:
        raise refusal(type(model).__name__, why) from why
    if not expected.isfinite().all():
        raise no_numbers(type(model).__name__)
    watch(model)
    for mode in ("handle", "dense"):
        if mode == "handle" and not supports_interface(model):
            reasons.append("handle: no attention interface")
            continue
        cache = KVCCache(model.config, parse("none"), "exact", mode, always_attend=True)
        error = _trial(model, cache, expected)
        if error is None:
            vars(model)["_kvc_fit"] = fit = Fit(mode, _shape(model, cache))
            return fit
        uninstall(model)
        reasons.append(f"{mode}: {error}")
    raise ConfigError(f"kvc: {type(model).__name__} cannot use this cache ({'; '.join(reasons)})")


def joins(model: PreTrainedModel) -> bool:
    """Whether sequences can be generated together: a trial's result, remembered on the model.

    Layers that keep the library's own cache cannot: its rows are all of one length.
    """
    known: bool | None = vars(model).get("_kvc_joins")
    if known is None:
        known = vars(model)["_kvc_joins"] = _joins(model, model_fit(model).mode)
    return known


@torch.no_grad()
def _joins(model: PreTrainedModel, mode: str) -> bool:
    if mode == "handle":
        install(model)
    ids = (torch.arange(6, device=model.device)[None] * 37 + 11) % model_fit(model).shape.vocab_size
    rows, expected = [], []
    if KVCCache(model.config, parse("none"), "exact", mode).others:
        return False
    try:
        for n in (5, 3):
            rows.append(KVCCache(model.config, parse("none"), "exact", mode))
            model(ids[:, :n], past_key_values=rows[-1], use_cache=True)
            alone = copy.deepcopy(rows[-1])
            expected.append(model(ids[:, n : n + 1], past_key_values=alone, use_cache=True).logits)
        both = KVCRows(rows)
        got = model(**both.inputs([int(ids[0, 5]), int(ids[0, 3])], model)).logits
    except Exception:  # any code of any model runs here
        return False
    return _off(got, torch.cat(expected)) <= TRIAL_TOL.get(model.dtype, 1e-3)


def _off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, relative to the largest."""
    return float((got - expected).abs().max() / expected.abs().max())


def _shape(model: PreTrainedModel, cache: KVCCache) -> ModelShape:
    """The model's sizes, those of keys from a cache that the model has filled."""
    config = model.config.get_text_config(decoder=True)
    keys = cast("tuple[torch.Tensor, torch.Tensor]", cache.store.dense(0))[0]
    shard = _shard(model)
    return ModelShape(
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=keys.shape[1] * shard.count,
        head_dim=keys.shape[3],
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None),
        dtype_bytes=keys.itemsize,
        layer_kinds=tuple(map(kind_of, DynamicCache(config=config).layers)),
        shard=shard,
    )


def _shard(model: PreTrainedModel) -> Shard:
    """This process's part of a model's heads, if they are split by transformers."""
    count = model.tp_size or 1
    if count == 1:
        return ALONE
    mesh = model._device_mesh
    group = (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()

    def gather(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(count)]
        torch.distributed.all_gather(found, x, group=group)
        return torch.cat(found, 1)

    return Shard(torch.distributed.get_rank(group), count, gather)


def _trial(model: PreTrainedModel, cache: KVCCache, expected: torch.Tensor) -> str | None:
    """Why a cache does not give the expected logits; None if it does."""
    # Any code of any model runs here, and whatever it raises means that it cannot take the cache.
    try:
        if cache.mode == "handle":
            install(model)
        got = _trial_logits(model, cache)
    except Exception as error:
        return in_short(error)
    if cache.store.length(0) != 7:
        return "the model does not fill the cache"
    off = _off(got, expected)
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
