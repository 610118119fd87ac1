"""What a race needs of the library that runs the model: its own caches, loop and attention."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine

DENSE = "dense"  # what every library calls the cache that compresses nothing
STEP = 512  # tokens of a prompt in one piece, about, as in `kvc generate`


class Layer(Protocol):
    """One layer of a cache of the library's own.

    Attributes:
        gathers: Tokens that come before it quantizes what is new.
    """

    gathers: int

    def append(self, k: Array, v: Array) -> None:
        """Takes tokens [B, H, L, D], as in a model's pass."""

    def attend(self, q: Array, scale: float) -> Array:
        """Attention of one query in each row, as the library does it."""

    def tokens(self) -> tuple[Array, Array]:
        """Keys and values [B, H, T, D] as attention sees them."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, room in buffers included."""

    def arrays(self) -> list[Any]:
        """What must be there before the layer is."""


class Told(NamedTuple):
    """A generation of tokens that were given."""

    times: list[float]  # seconds of the prompt and its first token, then of each other one
    log_probs: NDArray[np.float64]  # [V], of the token behind the last, in the first row


class Library(Protocol):
    """A module for each library."""

    PACKAGES: tuple[str, ...]
    RIVALS: Mapping[str, Any]  # names of its caches, the dense one first

    def device(self) -> str:
        """What it runs on."""

    def sync(self, x: Any) -> None:
        """Waits for arrays, in lists or alone, and for all that the device has to do."""

    def attend(self, q: Array, k: Array, v: Array, scale: float) -> Array:
        """Its attention over tokens as they came, in its fastest form for one query in a row."""

    def make_cache(self, engine: Engine, rival: str) -> Any:
        """A cache of the library's own, for its loop.

        Raises:
            NotRaced: If a package is missing, or the cache cannot be for this model.
        """

    def make_layer(self, engine: Engine, rival: str) -> Layer:
        """One layer of such a cache, empty.

        Raises:
            NotRaced: Likewise.
        """

    def layers(self, cache: Any) -> list[Layer]:
        """The layers of a cache of the library's own."""

    def tell(
        self, engine: Engine, cache: Any, rival: str, ids: NDArray[Any], forced: NDArray[Any]
    ) -> Told:
        """The library's own loop over prompts [B, T], which takes `forced` [B, N] for its samples.

        Raises:
            NotRaced: If the loop does not take so many rows.
        """


def library_of(engine: Engine) -> Library:
    """The module for the library that an engine stands on."""
    name = "mlx" if engine.name == "mlx" else "torch"
    return cast("Library", import_module(f"kvc.measure.speed.{name}_library"))
