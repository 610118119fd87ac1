"""The caches, the loop and the attention of mlx-lm, for races."""

from __future__ import annotations

import platform
import time
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from numpy.typing import NDArray

from kvc.backends.base import Engine, chunk_size
from kvc.backends.mlx.entry import library_entries
from kvc.measure.speed.clock import NotRaced
from kvc.measure.speed.library import DENSE, STEP, Told

PACKAGES = ("mlx", "mlx-lm")
RIVALS: dict[str, Any] = {DENSE: None, "kv-bits 4": 4}
GROUPS = (64, 32)  # that `mx.quantize` takes; the library's default comes first


def device() -> str:
    if mx.metal.is_available():
        return str(mx.device_info()["device_name"])
    return f"{platform.processor() or platform.machine()}, MLX on the CPU"


def sync(x: Any) -> None:
    mx.eval(x)
    mx.synchronize()


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


class Layer:
    """A layer of a cache of mlx-lm."""

    gathers = 1

    def __init__(self, entry: Any) -> None:
        self.entry = entry

    def append(self, k: mx.array, v: mx.array) -> None:
        self.entry.update_and_fetch(k, v)

    def attend(self, q: mx.array, scale: float) -> mx.array:
        entry = self.entry
        k, v = entry.keys_and_values()
        if not isinstance(entry, QuantizedKVCache):
            return attend(q, k, v, scale)
        # it scales its queries in place: it gets a copy
        return quantized_scaled_dot_product_attention(
            mx.array(q), k, v, scale, None, group_size=entry.group_size, bits=entry.bits
        )

    def tokens(self) -> tuple[mx.array, mx.array]:
        k, v = self.entry.keys_and_values()
        if isinstance(self.entry, QuantizedKVCache):
            how = {"group_size": self.entry.group_size, "bits": self.entry.bits}
            return mx.dequantize(*k, **how), mx.dequantize(*v, **how)
        return k, v

    @property
    def nbytes(self) -> int:
        return int(self.entry.nbytes)

    def arrays(self) -> list[Any]:
        return [self.entry.keys, self.entry.values]


def make_cache(engine: Any, rival: str) -> Any:
    """The dense cache in any case: the loop makes quantized ones of it."""
    if RIVALS[rival]:
        _group(engine)
    return library_entries(engine.model)


def make_layer(engine: Any, rival: str) -> Layer:
    bits = RIVALS[rival]
    return Layer(QuantizedKVCache(_group(engine), bits) if bits else KVCache())


def layers(cache: Any) -> list[Layer]:
    return [Layer(entry) for entry in cache if isinstance(entry, KVCache | QuantizedKVCache)]


def _group(engine: Engine) -> int:
    """Channels of a group in this model.

    Raises:
        NotRaced: If none fits.
    """
    D = engine.shape.head_dim
    for group in GROUPS:
        if D % group == 0:
            return group
    raise NotRaced(f"mlx-lm quantizes {' or '.join(map(str, GROUPS))} channels, not heads of {D}")


def tell(engine: Any, cache: Any, rival: str, ids: NDArray[Any], forced: NDArray[Any]) -> Told:
    if len(ids) > 1:
        raise NotRaced("mlx-lm's loop takes one row")
    bits = RIVALS[rival] if rival else None
    how: dict[str, Any] = {}
    if bits:
        how = {"kv_bits": bits, "kv_group_size": _group(engine), "quantized_kv_start": 0}
    tokens = iter(forced[0].tolist())
    sync([])
    start = time.perf_counter()
    times, found = [], mx.zeros(1)
    steps = generate_step(
        mx.array(ids[0]),
        engine.model,
        max_tokens=forced.shape[1],
        # it asks for one token more than it gives out
        sampler=lambda _: mx.array([next(tokens, 0)]),
        prompt_cache=cache,
        prefill_step_size=chunk_size(ids.shape[1] - 1, STEP),
        **how,
    )
    for step in steps:
        now, found = time.perf_counter(), step[1]
        times.append(now - start)
        start = now
    log_probs = np.asarray(found.astype(mx.float32)).astype(np.float64)
    return Told(times, log_probs.reshape(-1))
