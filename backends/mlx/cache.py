"""The cache for a model of mlx-lm, and how the model takes it: found by a trial, once per model.

In "handle" mode entries give out handles (attention.py). Models that compute with keys and values
themselves, or look at a window of a full cache, get arrays that the store builds: "dense" mode.
Both must give the logits that the library's own cache gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from kvc.backends.base import ALONE, FULL, ModelShape, Shard
from kvc.backends.fit import (
    Fit,
    check_eviction,
    check_weights,
    describe,
    in_short,
    no_numbers,
    refusal,
)
from kvc.backends.mlx import serving
from kvc.backends.mlx.attention import install
from kvc.backends.mlx.entry import KVCEntry, build, library_entries, name_of, sharers
from kvc.backends.mlx.projections import free_projections, freed_layers
from kvc.errors import ConfigError
from kvc.methods import Method, parse

# Largest difference of logits in the trial, relative to the largest logit.
TRIAL_TOL = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}
_KINDS = {
    "KVCache": FULL,
    "RotatingKVCache": "sliding_attention",
    "ChunkedKVCache": "chunked_attention",
    "ArraysCache": "linear_attention",
}


# What the authors of mlx-lm's model files call these sizes.
_N_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_N_KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
_CONTEXT = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


def make_cache(
    model: Any,
    method: Method,
    prefill: str = "exact",
    *,
    free: bool = False,
    graph: bool = False,
) -> list[Any]:
    """A prompt cache for `model` that keeps its tokens as `method` says.

    Key and value projections of layers that read another layer's cache do not run with this cache.
    Their weights stay for other caches, unless `free` gives back their memory, for good; models
    that have q, k and v in one matrix keep them.

    Raises:
        ConfigError: If the model and the method do not go together; always before generation.
        ArtifactError: If the method's files are of another model.
    """
    if graph:
        raise ConfigError(
            "graph: expected a model of transformers, got one of mlx-lm; leave it out"
        )
    fit = model_fit(model)
    method = method.check(fit.shape)
    check_eviction(method, fit)
    install()
    serving.install()
    entries = build(model, method, prefill, fit.mode)
    for entry in entries:
        if isinstance(entry, KVCEntry):
            entry.kinds = describe(fit.shape, entry.store)
    check_weights(freed_layers(model), sharers(entries))
    if free:
        joins(model)  # the trial reads the weights
        free_projections(model, sharers(entries))
    return entries


def shape_of(model: Any) -> ModelShape:
    """The sizes of a model.

    Raises:
        ConfigError: If the model cannot take our cache.
    """
    return model_fit(model).shape


def model_fit(model: Any) -> Fit:
    """The trial's result, remembered on the model.

    Raises:
        ConfigError: If the model gives other logits with our cache than with its own.
    """
    known: Fit | None = vars(model).get("_kvc_fit")
    if known is not None:
        return known
    install()
    reasons = []
    try:
        expected = _trial_logits(model, plain := library_entries(model))
    except Exception as why:
        raise refusal(name_of(model), why) from why
    if not mx.isfinite(expected).all():
        raise no_numbers(name_of(model))
    for mode in ("handle", "dense"):
        entries = build(model, parse("none"), "exact", mode, trial=True)
        ours = [entry for entry in entries if isinstance(entry, KVCEntry)]
        error = _trial(model, entries, ours, expected)
        (_, heads, _, k_dim), (*_, v_dim) = (shape or (0,) * 4 for shape in ours[0].new_shapes)
        if error and heads == 1 and k_dim != v_dim:
            raise ConfigError(
                f"kvc: {name_of(model)} keeps latents in place of keys and values: they are "
                "compressed by the model already, and no method here applies"
            )
        if error is None:
            vars(model)["_kvc_fit"] = fit = Fit(mode, _shape(model, plain, ours[0]))
            return fit
        reasons.append(f"{mode}: {error}")
    raise ConfigError(f"kvc: {name_of(model)} cannot use this cache ({'; '.join(reasons)})")


def joins(model: Any) -> bool:
    """Whether sequences can be generated together: a trial's result, remembered on the model.

    It is for the library's own entries to join too, and for the model to take an offset per row.
    """
    known: bool | None = vars(model).get("_kvc_joins")
    if known is not None:
        return known
    mode, vocab = model_fit(model).mode, next(_settings(model, int, "vocab_size"), 64)
    install()
    try:
        rows, expected = [], []
        for n in (5, 3):
            rows.append(build(model, parse("none"), "exact", mode))
            ids = (mx.arange(n + 1)[None] * 37 + 11) % vocab
            model(ids[:, :n], cache=rows[-1])
            alone = copy.deepcopy(rows[-1])
            expected.append(model(ids[:, n:], cache=alone))
        both = [entry.merge(list(each)) for entry, *each in zip(rows[0], *rows, strict=True)]
        got = model((mx.array([[5], [3]]) * 37 + 11) % vocab, cache=both)
        found = _off(got, mx.concatenate(expected)) <= _tol(got)
    except Exception:  # any code of any model runs here, and of its own entries
        found = False
    vars(model)["_kvc_joins"] = found
    return found


def _shape(model: Any, plain: list[Any], filled: KVCEntry) -> ModelShape:
    """The model's sizes, those of keys from an entry that the model has filled."""
    _, n_kv_heads, _, head_dim = filled.new_shapes[0]
    shard = _shard(model, n_kv_heads)
    n_kv_heads *= shard.count
    return ModelShape(
        family=next(_settings(model, str, "model_type"), name_of(model)),
        n_layers=len(model.layers),
        n_heads=next(_settings(model, int, *_N_HEADS), n_kv_heads),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=next(_settings(model, int, "vocab_size"), 0),
        context_length=next(_settings(model, int, *_CONTEXT), None),
        dtype_bytes=filled.dtype_bytes,
        layer_kinds=tuple(_KINDS.get(type(c).__name__, type(c).__name__) for c in plain),
        shard=shard,
    )


def _shard(model: Any, n_kv_heads: int) -> Shard:
    """This process's part of a model's heads, if they are split."""
    group = mx.distributed.init()
    whole = next(_settings(model, int, *_N_KV_HEADS), n_kv_heads)
    split = group.size() > 1 and whole == n_kv_heads * group.size()

    def gather(x: mx.array) -> mx.array:
        found = mx.distributed.all_gather(x.swapaxes(0, 1), group=group).swapaxes(0, 1)
        # What a process looks at early depends on its own heads; if this waited for that, the
        # processes would talk in different orders.
        mx.eval(found)
        return found

    return Shard(group.rank(), group.size(), gather) if split else ALONE


def _settings(model: Any, kind: type, *names: str) -> Iterator[Any]:
    """What the model's settings say under these names, the text model's own settings first.

    Model files keep only the settings that they use: those of `config.json` come last.
    """
    args, config = getattr(model, "args", None), vars(model).get("_kvc_config", {})
    inner = getattr(model, "language_model", None)
    text = getattr(args, "text_config", None)
    for source in (getattr(inner, "args", None), text, args, config.get("text_config"), config):
        known = source if isinstance(source, dict) else vars(source) if source else {}
        found = (known.get(name) for name in names)
        yield from (value for value in found if value and isinstance(value, kind))


def _trial(model: Any, entries: list[Any], ours: list[KVCEntry], expected: Any) -> str | None:
    """Why our entries do not give the expected logits; None if they do."""
    # Any code of any model runs here, and whatever it raises means that it cannot take the cache.
    try:
        got = _trial_logits(model, entries)
    except Exception as error:
        return in_short(error)
    if any(entry.offset != 7 for entry in ours):
        return "the model does not fill the cache"
    if ours[0].mode == "handle" and any(entry.windowed for entry in ours):
        return "a window over a cache of all tokens"
    off = _off(got, expected)
    return None if off <= _tol(got) else f"logits differ by {off:.1e} of the largest"


def _off(got: Any, expected: Any) -> float:
    """The largest difference of logits, relative to the largest."""
    return float((mx.abs(got - expected).max() / mx.abs(expected).max()).item())


def _tol(logits: Any) -> float:
    return TRIAL_TOL.get(logits.dtype, 1e-3)


def _trial_logits(model: Any, entries: list[Any]) -> Any:
    """Logits of six tokens and of a seventh."""
    vocab = next(_settings(model, int, "vocab_size"), 64)
    ids = (mx.arange(7)[None] * 37 + 11) % vocab
    steps = [model(ids[:, :6], cache=entries), model(ids[:, 6:], cache=entries)]
    logits = mx.concatenate(steps, 1)
    mx.eval(logits)
    return logits
