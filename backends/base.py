"""What every backend has: a module of array verbs, found by the type of an array.

Operators, slices, `.shape`, `.ndim`, `.dtype`, `.reshape` and `.swapaxes` are alike in NumPy,
MLX and torch and are used bare. Only what differs is a verb here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from kvc.backends.sequences import Batch, Piece
    from kvc.methods.base import Method
    from kvc.store.store import KVStore

Array = Any  # of numpy, mlx or torch: kvc never imports what the user has not

Message = Mapping[str, str]  # of a conversation: "role" and "content", as chat templates read them

FULL = "full_attention"  # of a layer that keeps all its tokens

_LIBRARIES = {"numpy": "numpy", "mlx": "mlx", "torch": "torch"}


class Ops(Protocol):
    """The verbs, in array-API spelling. `axis` is an int; shapes are tuples."""

    name: str
    word: Any  # the dtype of packed codes: 32 bits, unsigned where the library can shift those

    def dtype(self, name: str) -> Any: ...
    def dtype_name(self, x: Array) -> str: ...
    def itemsize(self, x: Array) -> int: ...
    def astype(self, x: Array, dtype: Any) -> Array: ...
    def octets(self, words: Array) -> Array: ...
    def promote(self, x: Array) -> Array: ...
    def from_numpy(self, x: np.ndarray[Any, Any], like: Array | None = None) -> Array: ...
    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]: ...
    def zeros(self, shape: Sequence[int], dtype: Any, like: Array) -> Array: ...
    def arange(self, n: int, like: Array) -> Array: ...
    def concat(self, xs: Sequence[Array], axis: int) -> Array: ...
    def stack(self, xs: Sequence[Array], axis: int) -> Array: ...
    def copy(self, x: Array) -> Array: ...
    def broadcast_to(self, x: Array, shape: Sequence[int]) -> Array: ...
    def take(self, x: Array, rows: Sequence[int], axis: int) -> Array: ...
    def take_along_axis(self, x: Array, index: Array, axis: int) -> Array: ...
    def put_along_axis(self, x: Array, index: Array, values: Array, axis: int) -> Array: ...
    def add_along_axis(self, x: Array, index: Array, values: Array, axis: int) -> Array: ...
    def top_k(self, x: Array, k: int) -> Array: ...
    def argsort(self, x: Array, axis: int) -> Array: ...
    def cumsum(self, x: Array, axis: int) -> Array: ...
    def min(self, x: Array, axis: int, keepdims: bool = False) -> Array: ...
    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array: ...
    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array: ...
    def mean(self, x: Array, axis: int, keepdims: bool = False) -> Array: ...
    def abs(self, x: Array) -> Array: ...
    def exp(self, x: Array) -> Array: ...
    def log(self, x: Array) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def sin(self, x: Array) -> Array: ...
    def cos(self, x: Array) -> Array: ...
    def tanh(self, x: Array) -> Array: ...
    def gelu(self, x: Array) -> Array: ...
    def arctan2(self, y: Array, x: Array) -> Array: ...
    def round(self, x: Array) -> Array: ...
    def isfinite(self, x: Array) -> Array: ...
    def all(self, x: Array) -> Array: ...
    def where(self, condition: Array, a: Any, b: Any) -> Array: ...
    def maximum(self, a: Array, b: Any) -> Array: ...
    def minimum(self, a: Array, b: Any) -> Array: ...
    def write(self, buffer: Array, start: int | Array, x: Array, axis: int) -> Array: ...
    def after(self, x: Array, done: Array) -> Array: ...
    def orthonormal(self, x: Array) -> Array: ...
    def quantized_matmul(
        self, x: Array, words: Array, step: Array, low: Array, size: int, bits: int
    ) -> Array | None: ...


def library_of(x: Array) -> str:
    """The name of the library that an array belongs to: `numpy`, `mlx` or `torch`."""
    root = type(x).__module__.split(".")[0]
    if root not in _LIBRARIES:
        got = f"{type(x).__module__}.{type(x).__name__}"
        raise TypeError(f"kvc: expected a numpy, mlx or torch array, got {got}")
    return root


def ops_of(x: Array) -> Ops:
    """The verbs of the library that `x` belongs to.

    Raises:
        TypeError: if `x` is no array of a library that kvc knows.
    """
    return ops_named(library_of(x))


def ops_named(name: str) -> Ops:
    """The verbs of a library by its name: `numpy`, `mlx` or `torch`."""
    return cast("Ops", importlib.import_module(f"kvc.backends.{name}.ops"))


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of a model's heads a process has, where several processes share them.

    All of them call `whole` at the same times, as each waits for the others.

    Attributes:
        index: Which of the processes this is.
        count: How many there are.
        gather: Arrays of all processes behind each other along axis 1; where there are several.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Array], Array] | None = field(default=None, compare=False, repr=False)

    def whole(self, x: Array) -> Array:
        """`x` [B, H / count, ...] of all processes' heads, [B, H, ...]."""
        if self.count == 1:
            return x
        assert self.gather is not None
        return self.gather(x)

    def own(self, x: Array, axis: int = 1) -> Array:
        """This process's heads of an array that has all heads on an axis."""
        size = x.shape[axis] // self.count
        return x[(slice(None),) * axis + (slice(size * self.index, size * (self.index + 1)),)]


ALONE = Shard()  # one process has all heads


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that a cache, a map or a set of kernels depends on.

    Heads and numbers are those of keys and values in layers with full attention.

    Attributes:
        family: The type of its text model, as in `config.json`.
        context_length: How many tokens it was made for, if it says so.
        dtype_bytes: Of one number in keys and values.
        layer_kinds: Of each layer with a cache of its own: `full_attention` and others.
        shard: Which of its heads this process has.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int | None
    dtype_bytes: int
    layer_kinds: tuple[str, ...]
    shard: Shard = ALONE

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers that keep all their tokens, by the model's numbers."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == FULL)

    @property
    def fingerprint(self) -> str:
        """What files made for a model are checked by: readable, and the same on every library."""
        return (
            f"{self.family}-{self.n_layers}l-{self.n_heads}h-{self.n_kv_heads}kv"
            f"-{self.head_dim}d-{self.vocab_size}v"
        )


def chunk_size(n: int, step: int) -> int:
    """The largest piece up to `step`, or the next larger one, that leaves no lone token of `n`.

    The store takes a single token after others for the first step of decoding.
    """
    if n < 2:
        return max(step, 1)
    return next(size for size in chain(range(step, 1, -1), count(step + 1)) if n % size != 1)


class Engine(Protocol):
    """A loaded model with its tokenizer, run by its own library."""

    name: str
    model: Any  # the library's own, as the tokenizer
    tokenizer: Any
    chat_template: str | None  # Jinja, in place of the model's own; None: the model's own

    @property
    def shape(self) -> ModelShape:
        """The sizes of the model."""

    @property
    def context_length(self) -> int | None:
        """How many tokens the model was made for, if its config says so."""

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""

    def encode(self, text: str | Sequence[Message], *, reply: bool = True) -> list[int]:
        """Token ids of a text as it is, or of a conversation in the chat template.

        It ends where the model's answer begins, unless `reply` is false.
        """

    def make_cache(
        self, method: Method, prefill: str = "exact", *, free: bool = False, graph: bool = False
    ) -> Any:
        """The cache that the library's own generation loop takes.

        With `free` the weights that this cache makes useless are freed, for good. With `graph`
        steps of one token are recorded and replayed, on a CUDA GPU.
        """

    def store(self, cache: Any) -> KVStore:
        """The store behind such a cache."""

    def stream(
        self,
        ids: Sequence[int],
        cache: Any,
        *,
        max_tokens: int,
        temp: float,
        top_p: float,
        seed: int | None,
        prefill_step: int,
        on_prefill: Callable[[int, int], None] | None,
    ) -> Iterator[Piece]:
        """Generates; `on_prefill(done, total)` hears of every piece of the prompt."""

    def batch(self, *, limit: int = 16, prefill_step: int = 512) -> Batch:
        """Generates up to `limit` sequences together, of one method or several."""

    def logits(self, ids: np.ndarray[Any, Any], cache: Any) -> Array:
        """One pass over tokens that come after those in the cache.

        Shapes: ids [B, L]; returns [B, L, vocab_size].
        """

    def hidden(self, ids: np.ndarray[Any, Any], cache: Any) -> Array:
        """The same pass without the head: the last hidden state, after the final norm.

        Shapes: ids [B, L]; returns [B, L, width].

        Raises:
            ConfigError: if the model has no inner one that gives it.
        """

    def output_projection(self, layer: int) -> Array | None:
        """The matrix [n_heads * head_dim, width] behind a layer's attention, by the model's number.

        None where the model calls it by no name that is known.
        """

    def peak_memory(self) -> int:
        """The most bytes that were held at a time, by the device or the process."""
