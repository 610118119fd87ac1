"""The cache for a model of mlx-lm, and how the model takes it: found by a trial, once per model.

In "handle" mode entries give out handles (attention.py). Models that compute with keys and values
themselves, or look at a window of a full cache, get arrays that the store builds: "dense" mode.
Both must give the logits that the library's own cache gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from kvc.backends.mlx.attention import install
from kvc.backends.mlx.entry import KVCEntry, build, library_entries, name_of, sharers
from kvc.backends.mlx.projections import freed_layers
from kvc.errors import ConfigError
from kvc.methods import Method, parse

# Largest difference of logits in the trial, relative to the largest logit.
TRIAL_TOL = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}
_KINDS = {
    "KVCache": "full_attention",
    "RotatingKVCache": "sliding_attention",
    "ChunkedKVCache": "chunked_attention",
    "ArraysCache": "linear_attention",
}


@dataclass(frozen=True)
class Fit:
    """What the trial found.

    Attributes:
        mode: "handle" or "dense".
        n_kv_heads: Of our layers.
        head_dim: Of our layers' keys.
        dtype_bytes: Of one number in them.
        layer_kinds: Of each entry of the cache.
    """

    mode: str
    n_kv_heads: int
    head_dim: int
    dtype_bytes: int
    layer_kinds: tuple[str, ...]


def make_cache(model: Any, method: Method, prefill: str = "exact") -> list[Any]:
    """A prompt cache for `model` that keeps its tokens as `method` says.

    Raises:
        ConfigError: If the model and the method do not go together; always before generation.
    """
    mode = model_mode(model)
    if mode == "dense" and method.needs_queries:
        raise ConfigError(
            f"kvc: {method.name} needs the queries, and the attention of "
            f"{name_of(model)} cannot be reached; use a method that only compresses"
        )
    install()
    entries = build(model, method, prefill, mode)
    if lost := sorted(freed_layers(model) - set(sharers(entries))):
        raise ConfigError(
            f"kvc: the key and value weights of layers {lost} were freed for a sharing method; "
            "load the model again to use it without"
        )
    return entries


def model_mode(model: Any) -> str:
    """How this model reads the cache: "handle" or "dense"."""
    return model_fit(model).mode


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
    expected = _trial_logits(model, plain := library_entries(model))
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
            kinds = tuple(_KINDS.get(type(c).__name__, type(c).__name__) for c in plain)
            size = ours[0].dtype_bytes
            vars(model)["_kvc_fit"] = fit = Fit(mode, heads, k_dim, size, kinds)
            return fit
        reasons.append(f"{mode}: {error}")
    raise ConfigError(f"kvc: {name_of(model)} cannot use this cache ({'; '.join(reasons)})")


def _trial(model: Any, entries: list[Any], ours: list[KVCEntry], expected: Any) -> str | None:
    """Why our entries do not give the expected logits; None if they do."""
    # Any code of any model runs here, and whatever it raises means that it cannot take the cache.
    try:
        got = _trial_logits(model, entries)
    except Exception as error:
        return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
    if any(entry.offset != 7 for entry in ours):
        return "the model does not fill the cache"
    if ours[0].mode == "handle" and any(entry.windowed for entry in ours):
        return "a window over a cache of all tokens"
    off = (mx.abs(got - expected).max() / mx.abs(expected).max()).item()
    tol = TRIAL_TOL.get(got.dtype, 1e-3)
    return None if off <= tol else f"logits differ by {off:.1e} of the largest"


def _trial_logits(model: Any, entries: list[Any]) -> Any:
    """Logits of six tokens and of a seventh."""
    vocab = getattr(getattr(model, "args", None), "vocab_size", None) or 64
    ids = (mx.arange(7)[None] * 37 + 11) % vocab
    steps = [model(ids[:, :6], cache=entries), model(ids[:, 6:], cache=entries)]
    logits = mx.concatenate(steps, 1)
    mx.eval(logits)
    return logits
