"""Loads a model with transformers and runs it for the command line, one sequence at a time."""

import resource
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from kvc.backends.base import Message, ModelShape, chunk_size
from kvc.backends.sequences import Piece
from kvc.backends.text import Text, chat_ids
from kvc.backends.torch.attention import decoder_of
from kvc.backends.torch.batch import Runner
from kvc.backends.torch.cache import joins, make_cache, shape_of
from kvc.backends.torch.entry import KVCCache
from kvc.backends.torch.projections import output_projection
from kvc.backends.torch.stream import OnPrefill, stream
from kvc.backends.turns import Turns
from kvc.errors import BackendError, ConfigError
from kvc.methods import Method
from kvc.store.store import KVStore


def load(path: str, device: str, dtype: str | None = None) -> "Engine":
    """Load a causal language model and its tokenizer from a folder or the hub.

    Args:
        path: A folder with `config.json`, or the name of a repository.
        device: "cpu" or "cuda".
        dtype: "float32", "float16" or "bfloat16"; by default what the model was saved in, and
            float32 on a CPU, whose half-precision kernels are slow.

    Raises:
        BackendError: If there is no such model or no GPU.
        ConfigError: If the model is not a causal language model, or the dtype is unknown.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"kvc: torch {torch.__version__} sees no GPU; install a CUDA build "
            "on a machine with an NVIDIA GPU, or use the cpu backend"
        )
    folder = Path(path).expanduser()
    if path.startswith(("/", ".", "~")) and not (folder / "config.json").is_file():
        raise BackendError(f"kvc: no model in {path!r}: there is no {folder / 'config.json'}")
    wanted = getattr(torch, dtype, None) if dtype else None
    if dtype and wanted not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"kvc: dtype must be float32, float16 or bfloat16, got {dtype!r}")
    try:
        path = str(folder) if folder.is_dir() else path
        config = AutoConfig.from_pretrained(path)
        saved = config.get_text_config(decoder=True).dtype or torch.float32
        saved = torch.float32 if device == "cpu" else saved
        if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
            raise ConfigError(
                f"kvc: {path} is a {config.model_type} model, not a causal language model"
            )
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=wanted or saved)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise BackendError(f"kvc: cannot load a model from {path!r}: {first}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"kvc: transformers cannot load {path!r}: {first}") from error
    return Engine(model.to(device).eval(), tokenizer, device)


class Engine:
    """A model, its tokenizer and what the command line asks of them."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
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
        return bool(self.chat_template or self.tokenizer.chat_template)

    def encode(self, text: str | Sequence[Message], *, reply: bool = True) -> list[int]:
        """Token ids of a text as it is, or of a conversation in the model's chat template.

        A conversation ends where the model's answer begins, unless `reply` is false.

        Raises:
            ConfigError: If there is no chat template, or it refuses this conversation.
        """
        if isinstance(text, str):
            return list(self.tokenizer(text).input_ids)
        apply = partial(
            self.tokenizer.apply_chat_template, chat_template=self.chat_template, return_dict=False
        )
        return chat_ids(type(self.model).__name__, apply if self.can_chat else None, text, reply)

    def make_cache(
        self, method: Method, prefill: str = "exact", *, free: bool = False, graph: bool = False
    ) -> KVCCache:
        """A cache that keeps its tokens as `method` says; see `kvc.backends.torch.cache`."""
        return make_cache(self.model, method, prefill, free=free, graph=graph)

    def store(self, cache: KVCCache) -> KVStore:
        """The store behind a cache."""
        return cache.store

    @torch.no_grad()
    def logits(self, ids: np.ndarray[Any, Any], cache: KVCCache) -> torch.Tensor:
        """One pass over tokens that come after those in the cache.

        Shapes: ids [B, L]; returns [B, L, vocab_size].
        """
        inputs = torch.as_tensor(ids, device=self.model.device, dtype=torch.long)
        return self.model(inputs, past_key_values=cache, use_cache=True).logits

    @torch.no_grad()
    def hidden(self, ids: np.ndarray[Any, Any], cache: KVCCache) -> torch.Tensor:
        """The same pass without the head: the last hidden state, after the final norm.

        Shapes: ids [B, L]; returns [B, L, width].

        Raises:
            ConfigError: If the model has no inner one that gives it.
        """
        inner = decoder_of(self.model)
        inner = getattr(self.model, "model", inner) if inner is self.model else inner
        if inner is self.model:
            raise ConfigError(
                f"kvc: {type(self.model).__name__} has no decoder apart from its head"
            )
        inputs = torch.as_tensor(ids, device=self.model.device, dtype=torch.long)
        return inner(inputs, past_key_values=cache, use_cache=True).last_hidden_state

    def output_projection(self, layer: int) -> torch.Tensor | None:
        """The matrix [n_heads * head_dim, width] behind a layer's attention, by the model's number.

        None where the model calls it by no name that is known.
        """
        return output_projection(self.model, layer, self.shape.n_heads * self.shape.head_dim)

    def peak_memory(self) -> int:
        """The most bytes held so far: on the device, or by the process where there is none."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def stream(
        self,
        ids: Sequence[int],
        cache: KVCCache,
        *,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        prefill_step: int = 2048,
        on_prefill: OnPrefill | None = None,
    ) -> Iterator[Piece]:
        """Generates from `ids`, which come after the tokens in the cache; see stream.py.

        Yields each token with the text that it completes.
        """
        if seed is not None:
            torch.manual_seed(seed)
        config = self._generation_config(
            max_tokens, temp, top_p, chunk_size(len(ids), prefill_step)
        )
        return stream(self.model, ids, cache, config, Text(self.tokenizer, ids), on_prefill)

    def batch(self, *, limit: int = 16, prefill_step: int = 512) -> Turns:
        """Generates up to `limit` sequences together; one, where the model's cannot be joined."""
        stop = self._generation_config(1, 0.0, 1.0, 1).eos_token_id
        stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
        limit = limit if joins(self.model) else 1
        return Turns(Runner(self.model), self.tokenizer, stop, limit, prefill_step)

    def _generation_config(
        self, max_tokens: int, temp: float, top_p: float, chunk: int
    ) -> GenerationConfig:
        """Our settings alone; of the model's own only the special tokens count."""
        own = self.model.generation_config
        eos = own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id
        pad = own.pad_token_id
        if pad is None:
            pad = eos[0] if isinstance(eos, list) else eos
        sampling: dict[str, Any] = {"do_sample": False}
        if temp > 0:
            sampling = {"do_sample": True, "temperature": temp, "top_p": top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=max_tokens,
            eos_token_id=eos,
            pad_token_id=pad,
            bos_token_id=own.bos_token_id,
            prefill_chunk_size=chunk,
            **sampling,
        )
