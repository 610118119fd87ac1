"""Where an mlx-lm model and the store meet: the handle, and the attention function.

An entry of the cache returns a `Handle` in place of keys and values. Models carry it unread to
`mlx_lm.models.base.scaled_dot_product_attention`, which a hundred modules import by name. So its
code is replaced, not its name: one function object, whoever imported it and when, and the old code
can be put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from mlx_lm.models import base

from kvc.errors import BackendError
from kvc.store.batch import attend_rows

if TYPE_CHECKING:
    from kvc.store.store import KVStore

_target = base.scaled_dot_product_attention
_code = _target.__code__
_library = FunctionType(
    _code, _target.__globals__, _target.__name__, _target.__defaults__, _target.__closure__
)


class Handle:
    """Stands for the keys (or values) that a layer of the store holds; it is no array."""

    __slots__ = ("always_attend", "dtype", "layer", "shape", "store")
    ndim = 4

    def __init__(self, store: KVStore, layer: int, new: Any, always_attend: bool) -> None:
        B, H, _, D = new.shape
        self.store, self.layer, self.always_attend = store, layer, always_attend
        self.shape, self.dtype = (B, H, store.length(layer), D), new.dtype


class RowsHandle(Handle):
    """Stands for what a layer holds of rows that have a store each; `columns` of them in all."""

    __slots__ = ("counts", "stores")

    def __init__(
        self, stores: Sequence[KVStore], layer: int, new: Any, counts: list[int], columns: int
    ) -> None:
        B, H, _, D = new.shape
        self.stores, self.layer, self.counts = stores, layer, counts
        self.shape, self.dtype, self.always_attend = (B, H, columns, D), new.dtype, False


def attention(
    queries: Any, keys: Handle, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> Any:
    """Attention over the tokens behind a handle.

    While nothing is compressed the library computes it, from the tokens as they came. Rows with a
    store each need no mask: a row has no padding but behind its newest tokens, which is dropped.

    Shapes: queries [B, n_heads, L, head_dim]; returns [B, n_heads, L, head_dim].
    """
    layer = keys.layer

    def answer(store: KVStore, q: Any, mask: Any) -> Any:
        dense = None if keys.always_attend else store.dense(layer)
        if dense is None:
            return store.attend(layer, q, scale, sinks=sinks)
        out = _library(q, *dense, cache, scale, mask, sinks)
        store.observe(layer, q, scale, sinks=sinks)
        return out

    if not isinstance(keys, RowsHandle):
        return answer(keys.store, queries, mask)

    def own(store: KVStore, q: Any) -> Any:
        return answer(store, q, "causal" if q.shape[2] > 1 else None)

    return attend_rows(keys.stores, queries, keys.counts, own)


# Its code runs in the place of the library's, among that module's globals: hence the imports.
def _routed(  # type: ignore[no-untyped-def]
    queries, keys, values, cache, scale, mask, sinks=None
):
    from kvc.backends.mlx import attention as kvc_attention

    if isinstance(keys, kvc_attention.Handle):
        return kvc_attention.attention(queries, keys, cache, scale, mask, sinks)
    return kvc_attention._library(queries, keys, values, cache, scale, mask, sinks)


def install() -> None:
    """Route mlx-lm's attention; calls without a handle go the way they went before.

    Raises:
        BackendError: If this mlx-lm has another attention function than the one we know.
    """
    known, found = (list(inspect.signature(f).parameters) for f in (_routed, _library))
    if found != known or _code.co_freevars:
        raise BackendError(
            f"mlx: expected mlx-lm's attention to take ({', '.join(known)}), it takes "
            f"({', '.join(found)}); install mlx-lm 0.32"
        )
    if _target.__code__ is _code:
        _target.__code__ = _routed.__code__


def uninstall() -> None:
    """Put the library's own code back."""
    if _target.__code__ is _routed.__code__:
        _target.__code__ = _code
