"""The caches and the loop of transformers, and PyTorch's attention, for races."""

from __future__ import annotations

import platform
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, QuantizedCache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from kvc.backends.base import Engine, chunk_size
from kvc.backends.torch.attention import uninstall
from kvc.measure.speed.clock import NotRaced
from kvc.measure.speed.library import DENSE, STEP, Told

PACKAGES = ("torch", "transformers", "triton", "optimum-quanto", "hqq")


def _quantized(backend: str, bits: int | None, config: Any) -> Any:
    try:
        return QuantizedCache(backend, config, **({"nbits": bits} if bits else {}))
    except ImportError as error:
        raise NotRaced(f"{backend}: {str(error).splitlines()[0]}") from None


RIVALS: dict[str, Any] = {
    DENSE: lambda config: DynamicCache(config=config),
    "quanto 4 bits": partial(_quantized, "quanto", 4),
    "hqq 4 bits": partial(_quantized, "hqq", 4),
    "fp8": partial(_quantized, "fp8", None),
}


def device() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


def sync(x: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    packed = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # heads of a group side by side
    return scaled_dot_product_attention(packed, k, v, scale=scale).reshape(q.shape)


class Layer:
    """A layer of a cache of transformers."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.gathers = layer, int(getattr(layer, "residual_length", 1))

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.layer.update(k, v)

    def attend(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        return attend(q, *self.tokens(), scale)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layer
        if not hasattr(layer, "_quantized_keys"):
            return layer.keys, layer.values
        found = []
        for coded, rest in (
            (layer._quantized_keys, layer.keys),
            (layer._quantized_values, layer.values),
        ):
            past = layer._dequantize(coded)
            found.append(torch.cat([past, rest], -2) if rest.ndim == 4 else past)
        return found[0], found[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays())

    def arrays(self) -> list[torch.Tensor]:
        names = ("keys", "values", "_quantized_keys", "_quantized_values")
        return [x for name in names for x in _tensors(getattr(self.layer, name, None))]


def _tensors(x: Any) -> list[torch.Tensor]:
    """Plain tensors in what a quantizer made: tuples, dicts, tensors made of tensors."""
    if hasattr(x, "__tensor_flatten__"):
        return [y for name in x.__tensor_flatten__()[0] for y in _tensors(getattr(x, name))]
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple | list) else ()
    return [y for part in parts for y in _tensors(part)]


def make_cache(engine: Engine, rival: str) -> Any:
    model: Any = engine
    return RIVALS[rival](model.model.config)


def make_layer(engine: Engine, rival: str) -> Layer:
    return layers(make_cache(engine, rival))[0]


def layers(cache: Any) -> list[Layer]:
    return [Layer(layer) for layer in cache.layers]


class _Clock(BaseStreamer):
    """When the prompt was there, and each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left."""


class _Forced(LogitsProcessor):
    """Makes given tokens [B, N] the likeliest; keeps the last logits of the first row."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.n, self.last = tokens, 0, torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.n == self.tokens.shape[1] - 1:
            self.last = scores[0].clone()
        chosen = torch.full_like(scores, -torch.inf)
        chosen.scatter_(1, self.tokens[:, self.n : self.n + 1], 0.0)
        self.n += 1
        return chosen


@torch.no_grad()
def tell(engine: Any, cache: Any, rival: str, ids: NDArray[Any], forced: NDArray[Any]) -> Told:
    model = engine.model
    if rival:
        uninstall(model)
    prompt, tokens = (torch.as_tensor(x, device=model.device).long() for x in (ids, forced))
    clock, choice = _Clock(), _Forced(tokens)
    n = tokens.shape[1]
    config = GenerationConfig(
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=engine.shape.vocab_size,  # nothing ends it; without one the model's own would
        prefill_chunk_size=chunk_size(prompt.shape[1], STEP),
    )
    sync(None)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList([choice]),
        streamer=clock,
    )
    marks = clock.marks
    times = [b - a for a, b in pairwise(marks)]
    return Told(times, choice.last.double().log_softmax(-1).cpu().numpy())
