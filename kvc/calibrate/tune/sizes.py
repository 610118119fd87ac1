"""Measured bytes of a method's cache at a context: what `kvc eval` reports as `bytes`.

All that the store holds counts, the room that its buffers keep for later tokens too. Codecs do not
look at values, so that a store of random numbers holds what the model's would.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine, ModelShape
from kvc.measure.held import hold
from kvc.measure.tasks import DECODED
from kvc.methods import Gear, KVSharer, Method, method_of
from kvc.store.store import KVStore

LONG = 8192  # tokens from which on lengths are extrapolated
PERIOD = 1024  # tokens after which buffers are as full as before


class Sizes:
    """Bytes of one sequence of `context` tokens in a model's cache.

    Args:
        engine: With the model.
        ids: Tokens [n], for methods that look at values.
        context: Tokens.
    """

    def __init__(self, engine: Engine, ids: NDArray[np.int32], context: int) -> None:
        self.engine, self.shape, self.ids, self.context = engine, engine.shape, ids, context

    @property
    def dense(self) -> int:
        """Bytes of the same tokens, uncompressed."""
        return self.context * self.dense_token

    @property
    def dense_token(self) -> int:
        """Bytes of one token, uncompressed."""
        shape = self.shape
        layers = len(shape.full_layers)
        return 2 * layers * shape.n_kv_heads * shape.head_dim * shape.dtype_bytes

    def owners(self, method: Method) -> tuple[int, ...]:
        """The layers that hold tokens, by the model's numbers."""
        numbers = self.shape.full_layers
        places = method.check(self.shape).owners(len(numbers))
        return tuple(numbers[place] for place in sorted(set(places)))

    def of(self, method: Method, context: int | None = None) -> int:
        """Bytes of a method's cache, of so many tokens or of all.

        Raises:
            KVCError: If the method and the model do not go together.
        """
        context = self.context if context is None else context
        if method.memory is None and (method.layout is None or type(method.layout) is KVSharer):
            codec = method.codec
            return sum(
                _layer(codec and codec.of(layer), self.shape, context)
                for layer in self.owners(method)
            )
        return self._measured(method, context)

    def _measured(self, method: Method, context: int) -> int:
        """Bytes that the model's own tokens take, extrapolated from two lengths where those end."""
        longest = min(len(self.ids), context)
        if longest == context:
            return self._of_model(method, context)
        short, long = (self._of_model(method, n) for n in (longest // 2, longest))
        return round(long + (long - short) / (longest - longest // 2) * (context - longest))

    def _of_model(self, method: Method, n: int) -> int:
        ids = self.ids[:n]
        return hold(self.engine, ids, method, n - DECODED).report.nbytes

    def layer(self, codec: Gear, k_bits: int, v_bits: int) -> int:
        """Bytes of one layer at these widths."""
        codec = replace(codec, k_bits=k_bits, v_bits=v_bits, layer_bits="")
        return _layer(codec, self.shape, self.context)


@cache
def _layer(codec: Gear | None, shape: ModelShape, context: int) -> int:
    """Bytes of one layer's tokens, exact or from the line through two lengths below `LONG`."""
    if context <= LONG:
        return _stored(codec, shape, context)
    long = LONG - PERIOD + context % PERIOD
    short = long - PERIOD * 2
    a, b = _stored(codec, shape, short), _stored(codec, shape, long)
    return round(b + (b - a) / (long - short) * (context - long))


def _stored(codec: Gear | None, shape: ModelShape, n: int) -> int:
    store = KVStore(method_of(codec) if codec else Method(), 1)
    x = np.random.default_rng(0).standard_normal((1, shape.n_kv_heads, n, shape.head_dim))
    x = x.astype(f"float{8 * shape.dtype_bytes}")
    prompt = n - DECODED
    store.append(0, x[:, :, :prompt], x[:, :, :prompt])
    store.trim(0)  # the prompt is over
    for at in range(prompt, n):
        store.append(0, x[:, :, at : at + 1], x[:, :, at : at + 1])
    return store.report().nbytes
