"""Loads and runs a model with mlx-lm: its loader, tokenizer, samplers and generation loop."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.sample_utils import make_sampler

from kvc.backends.base import Message, ModelShape, chunk_size
from kvc.backends.mlx.batch import Runner
from kvc.backends.mlx.cache import joins, make_cache, shape_of
from kvc.backends.mlx.entry import KVCEntry, name_of
from kvc.backends.mlx.projections import output_projection
from kvc.backends.sequences import Piece
from kvc.backends.text import Text, chat_ids
from kvc.backends.turns import Turns
from kvc.errors import BackendError, ConfigError
from kvc.methods import Method
from kvc.store.store import KVStore

DTYPES = ("float16", "bfloat16", "float32")


class Engine:
    """A loaded model, its tokenizer, and how to run them."""

    name = "mlx"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.chat_template: str | None = None

    @property
    def shape(self) -> ModelShape:
        """The sizes of the model.

        Raises:
            ConfigError: If the model cannot take our cache.
        """
        return shape_of(self.model)

    @property
    def context_length(self) -> int | None:
        """How many tokens the model was made for, if its config says so."""
        return self.shape.context_length

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.chat_template or self.tokenizer.has_chat_template)

    def encode(self, text: str | Sequence[Message], *, reply: bool = True) -> list[int]:
        """Token ids of a text as it is, or of a conversation in the model's chat template.

        A conversation ends where the model's answer begins, unless `reply` is false.

        Raises:
            ConfigError: If there is no chat template, or it refuses this conversation.
        """
        if isinstance(text, str):
            return list(self.tokenizer.encode(text))
        # mlx-lm has templates written in Python, which do not take the argument
        given = {"chat_template": self.chat_template} if self.chat_template else {}
        apply = partial(self.tokenizer.apply_chat_template, **given) if self.can_chat else None
        return chat_ids(name_of(self.model), apply, text, reply)

    def make_cache(
        self, method: Method, prefill: str = "exact", *, free: bool = False, graph: bool = False
    ) -> list[Any]:
        """A cache that keeps its tokens as `method` says; see `kvc.backends.mlx.cache`."""
        return make_cache(self.model, method, prefill, free=free, graph=graph)

    def store(self, cache: Sequence[Any]) -> KVStore:
        """The store under a prompt cache."""
        return next(entry.store for entry in cache if isinstance(entry, KVCEntry))

    def stream(
        self,
        ids: Sequence[int],
        cache: Sequence[Any] | None = None,
        *,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        prefill_step: int = 2048,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Piece]:
        """The continuation of `ids`, piece by piece; `cache` is filled on the way.

        Args:
            ids: The prompt, less what is in the cache already.
            cache: From `make_cache`; None takes the library's own.
            max_tokens: How many tokens to generate at most.
            temp: Of the samples; 0 takes the likeliest token.
            top_p: Samples come from the likeliest tokens with this much probability together.
            seed: Of the samples.
            prefill_step: How many tokens of the prompt to process at a time, about.
            on_prefill: Called with the tokens of the prompt done so far, and their number.
        """
        if seed is not None:
            mx.random.seed(seed)
        pieces = mlx_lm.stream_generate(
            self.model,
            self.tokenizer,
            list(ids),
            max_tokens=max_tokens,
            sampler=make_sampler(temp, top_p),
            prompt_cache=cache,
            prefill_step_size=chunk_size(len(ids) - 1, prefill_step),  # the last one goes alone
            prompt_progress_callback=on_prefill,
        )
        text = Text(self.tokenizer, ids)  # mlx-lm's own would drop the first one's leading space
        for piece in pieces:
            yield Piece(text.add(piece.token), piece.token)

    def batch(self, *, limit: int = 16, prefill_step: int = 512) -> Turns:
        """Generates up to `limit` sequences together; one, where the model's cannot be joined."""
        joined = joins(self.model)
        runner = Runner(self.model, joined)
        stop = sorted(self.tokenizer.eos_token_ids)
        return Turns(runner, self.tokenizer, stop, limit if joined else 1, prefill_step)

    def logits(self, ids: np.ndarray[Any, Any], cache: Sequence[Any]) -> Any:
        """One pass over tokens that come after those in the cache.

        Shapes: ids [B, L]; returns [B, L, vocab_size].
        """
        return self.model(mx.array(ids), cache=cache)

    def hidden(self, ids: np.ndarray[Any, Any], cache: Sequence[Any]) -> Any:
        """The same pass without the head: the last hidden state, after the final norm.

        Shapes: ids [B, L]; returns [B, L, width].

        Raises:
            ConfigError: If the model has no inner one that gives it.
        """
        text = getattr(self.model, "language_model", self.model)
        inner = getattr(text, "model", getattr(text, "transformer", None))
        if inner is None:
            raise ConfigError(
                f"{name_of(self.model)}: the model has no decoder apart from its head"
            )
        return inner(mx.array(ids), cache=cache)

    def output_projection(self, layer: int) -> Any:
        """The matrix [n_heads * head_dim, width] behind a layer's attention, by the model's number.

        None where the model calls it by no name that is known.
        """
        return output_projection(self.model, layer, self.shape.n_heads * self.shape.head_dim)

    def peak_memory(self) -> int:
        """Bytes that MLX held at most."""
        return int(mx.get_peak_memory())


def load(path: str | Path, device: str = "mlx", dtype: str | None = None) -> Engine:
    """Load a model from a folder, or by its name on the Hugging Face Hub.

    Args:
        path: The folder or the name.
        device: Unused: MLX has one device per machine.
        dtype: "float16", "bfloat16" or "float32". Without it weights stay as saved, and become
            float32 where MLX runs on a CPU, whose half-precision kernels are slow.

    Raises:
        BackendError: If there is no such model, or mlx-lm cannot load it.
    """
    if dtype not in (None, *DTYPES):
        raise BackendError(f"mlx: expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    folder = Path(path).expanduser()
    if not folder.exists() and (folder.is_absolute() or str(path).startswith((".", "~"))):
        raise BackendError(f"mlx: there is no model at {path}")
    try:
        model, tokenizer, config = mlx_lm.load(
            str(folder) if folder.exists() else str(path), return_config=True
        )
    except Exception as error:  # the hub, the parsers and mlx-lm raise whatever they like
        why = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise BackendError(
            f"mlx: cannot load a model from {path}: {type(error).__name__}: {why[:300]}"
        ) from error
    _check_rope(model, config)
    if dtype is None and mx.default_device().type == mx.DeviceType.cpu:
        dtype = "float32"
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    vars(model)["_kvc_config"] = config
    return Engine(model, tokenizer)


def _check_rope(model: Any, config: dict[str, Any]) -> None:
    """Warn where transformers wrote `rope_theta` and mlx-lm does not read it."""
    text = config.get("text_config") or config
    theta = (text.get("rope_parameters") or {}).get("rope_theta")
    reads = inspect.signature(inspect.getmodule(type(model)).ModelArgs).parameters  # type: ignore[union-attr]
    if theta is None or "rope_theta" in text or "rope_parameters" in reads:
        return
    warnings.warn(
        f"config.json has rope_theta only inside rope_parameters, where mlx-lm does not look: "
        f'expect poor text; add "rope_theta": {theta} at its top level',
        stacklevel=3,
    )
