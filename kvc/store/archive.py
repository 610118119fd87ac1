"""Where a store's state goes to and comes from: one walk over it writes a file or reads one.

The walk (`kvc.store.state`) shows an archive every count and every array with the shape that it has
to have. A writer takes note of them; a reader answers with what the file has in their place, if it
is of that shape.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np

from kvc.backends.base import Array, ops_of
from kvc.errors import CacheFileError
from kvc.files.cache import DEFLATED, CacheFile, Entry, Raw, Tensor

Own = TypeVar("Own", bound="Archive")
Shape = tuple[int | None, ...] | None  # None in it: as many as there are; alone: any shape
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Library(Protocol):
    """What a library has to do with bytes; each backend has such a module, `saved`."""

    def raw(self, x: Array) -> Raw:
        """The numbers of an array, bfloat16 as uint16; maybe a view."""

    def array(self, x: Raw, dtype: str, like: Any) -> Array:
        """An array of such numbers, of the library's own `word` for uint32; maybe a view.

        `like` is the device, where the library has several.
        """


class Sizes(NamedTuple):
    """What all arrays of some rows of a layer share."""

    rows: int
    n: int  # tokens
    heads: int
    head_dim: int
    dtype: str  # of keys and values

    @property
    def wide(self) -> str:
        """The dtype that sums are kept in."""
        return "float64" if self.dtype == "float64" else "float32"


class Archive(ABC):
    """One place in a state, and what lies below it.

    Attributes:
        reading: Whether answers come from a file.
        rows: Of the batch.
        columns: Tokens of each row, padding included.
        dtype: Of keys and values.
    """

    reading = False

    def __init__(self, rows: int, columns: int, dtype: str) -> None:
        self.rows, self.columns, self.dtype = rows, columns, dtype
        self.place = ""

    def begin(self, rows: int, dtype: str) -> None:  # noqa: B027 - not for readers
        """What the store has is of so many rows and of a dtype; a reader knows its own."""

    def at(self: Own, name: str) -> Own:
        """What lies below a name."""
        below = copy.copy(self)
        below.place = f"{self.place}{name}."
        return below

    @abstractmethod
    def value(self, name: str, x: Any) -> Any:
        """Anything that JSON has; what a file has must be checked."""

    @abstractmethod
    def array(
        self,
        name: str,
        x: Array | None,
        dtype: str | tuple[str, ...],
        shape: Shape,
        bounds: tuple[int, int] | None = None,
        packed: bool = False,
    ) -> Array:
        """An array.

        Args:
            name: Of it.
            x: What the store has; a reader looks at the file alone.
            dtype: What it must have, or one of these.
            shape: What it must have.
            bounds: Least and most of its numbers, if others would do harm.
            packed: Whether it is codes, which can be deflated.

        Raises:
            CacheFileError: If it is not there or not like that.
        """

    def has(self, name: str, x: Any) -> bool:
        """Whether there is an array of that name; to be asked where there need be none."""
        return x is not None

    def check_room(self, name: str, n: int) -> None:  # noqa: B027 - not for writers
        """That so many bytes can be there, before room is made for them."""

    def number(self, name: str, x: int, least: int, most: int) -> int:
        """A count."""
        found = self.value(name, x)
        if type(found) is not int or not least <= found <= most:
            self.refuse(name, f"a number from {least} to {most}", found)
        return found

    def real(self, name: str, x: float | None) -> float:
        """A number that is finite."""
        found = self.value(name, None if x is None else float(x))
        if type(found) is not float or not math.isfinite(found):
            self.refuse(name, "a number", found)
        return found

    def kind(self, x: str) -> None:
        """What a layer that is not the store's keeps: files must have the same."""
        found = self.value("kind", x)
        if found != x:
            self.refuse("kind", f"{x!r}, as this library has it here", found)

    def flag(self, name: str, x: bool) -> bool:
        """Yes or no."""
        found = self.value(name, x)
        if type(found) is not bool:
            self.refuse(name, "true or false", found)
        return found

    def numbers(self, name: str, x: list[int], n: int, least: int, most: int) -> list[int]:
        """As many counts as `n`."""
        found = self.value(name, x)
        if type(found) is not list or len(found) != n:
            self.refuse(name, f"{n} numbers", found)
        for number in found:
            if type(number) is not int or not least <= number <= most:
                self.refuse(name, f"numbers from {least} to {most}", number)
        return list(found)

    def refuse(self, name: str, expected: str, got: Any) -> NoReturn:
        """What is there cannot be.

        Raises:
            CacheFileError: Always.
        """
        raise CacheFileError(f"{self.place}{name}: expected {expected}, got {got!r:.60}")


class Writer(Archive):
    """Takes note of what is to be written; arrays leave the device when their turn comes."""

    def __init__(self, columns: int, library: Library) -> None:
        super().__init__(0, columns, "")
        self.library = library
        self.values: dict[str, Any] = {}
        self.entries: list[Entry] = []
        self.codes: list[Entry] = []

    def begin(self, rows: int, dtype: str) -> None:  # noqa: D102 - as `Archive` says
        self.rows, self.dtype = rows, dtype

    def value(self, name: str, x: Any) -> Any:  # noqa: D102 - as `Archive` says
        self.values[self.place + name] = x
        return x

    def array(  # noqa: D102 - as `Archive` says
        self,
        name: str,
        x: Array | None,
        dtype: str | tuple[str, ...],
        shape: Shape,
        bounds: tuple[int, int] | None = None,
        packed: bool = False,
    ) -> Array:
        xp, known = ops_of(x), (dtype,) if isinstance(dtype, str) else dtype
        assert x is not None
        got = "uint32" if "uint32" in known and x.dtype == xp.word else xp.dtype_name(x)
        _fit(self, name, Tensor(got, tuple(x.shape), 0, 0), known, shape)
        entry = Entry(self.place + name, got, tuple(x.shape), lambda: self.library.raw(x))
        (self.codes if packed else self.entries).append(entry)
        return x


class Reader(Archive):
    """Answers from a file; `rest` are the tensors that were not asked for."""

    reading = True

    def __init__(self, file: CacheFile, make: Callable[[Raw, str], Array], mapped: bool) -> None:
        self.file, self.make, self.mapped = file, make, mapped
        self.rest = set(file.tensors)
        tokens = file.tensors.get("tokens")
        if tokens is None or tokens.dtype != "int32" or len(tokens.shape) != 2:
            raise CacheFileError(f"{file.path}: tokens: expected int32 [B, T], got {tokens}")
        super().__init__(*tokens.shape, file.header["dtype"])
        if self.dtype not in FLOATS or not (self.rows and self.columns):
            self.refuse("dtype", f"one of {', '.join(FLOATS)}, and tokens", self.dtype)

    def value(self, name: str, x: Any) -> Any:  # noqa: D102 - as `Archive` says
        if self.place + name not in self.file.state:
            self.refuse(name, "a value", None)
        return self.file.state[self.place + name]

    def has(self, name: str, x: Any) -> bool:  # noqa: D102 - as `Archive` says
        return self.place + name in self.file.tensors

    def array(  # noqa: D102 - as `Archive` says
        self,
        name: str,
        x: Array | None,
        dtype: str | tuple[str, ...],
        shape: Shape,
        bounds: tuple[int, int] | None = None,
        packed: bool = False,
    ) -> Array:
        full = self.place + name
        known = (dtype,) if isinstance(dtype, str) else dtype
        there = self.file.tensors.get(full)
        if there is None and packed and full + DEFLATED in self.file.tensors:
            self.rest.discard(full + DEFLATED)
            sizes = tuple(n or 0 for n in shape or ())  # those of codes are all known
            return self.make(self.file.inflate(full, known[0], sizes), known[0])
        if there is None:
            self.refuse(name, "a tensor", None)
        _fit(self, name, there, known, shape)
        self.rest.discard(full)
        found = self.file.read(full, self.mapped)
        if bounds is not None and found.size:
            places = found.view(np.uint16) if there.dtype == "int16" else found  # low 16 bits
            low, high = int(places.min()), int(places.max())
            if low < bounds[0] or high > bounds[1]:
                self.refuse(name, f"numbers from {bounds[0]} to {bounds[1]}", (low, high))
        return self.make(found, there.dtype)

    def check_room(self, name: str, n: int) -> None:  # noqa: D102 - as `Archive` says
        if n > self.file.size:
            self.refuse(name, f"{self.file.size} bytes at most", n)

    def token(self, heads: int, head_dim: int) -> Array:
        """A token of all rows, all zeros, for what depends on the library of arrays."""
        self.check_room("size", self.rows * heads * head_dim)
        kind = {"float64": np.float64}.get(self.dtype, np.float32)
        x = self.make(np.zeros((self.rows, heads, 1, head_dim), kind), kind.__name__)
        return ops_of(x).astype(x, ops_of(x).dtype(self.dtype))

    def refuse(self, name: str, expected: str, got: Any) -> NoReturn:
        """What is there cannot be.

        Raises:
            CacheFileError: Always.
        """
        place = f"{self.file.path}: {self.place}{name}"
        raise CacheFileError(f"{place}: expected {expected}, got {got!r:.60}; make the file again")

    def ids(self, vocab_size: int) -> list[list[int]]:
        """The token ids of each row; a vocabulary of 0 is not known.

        Raises:
            CacheFileError: If some are in no vocabulary of that size.
        """
        x = self.file.read("tokens", mapped=False)
        self.rest.discard("tokens")
        if int(x.min()) < 0 or (vocab_size and int(x.max()) >= vocab_size):
            self.refuse("tokens", f"ids below {vocab_size}", (int(x.min()), int(x.max())))
        return [[int(i) for i in row] for row in x]

    def end(self) -> None:
        """That all tensors were asked for.

        Raises:
            CacheFileError: If the file has others.
        """
        if self.rest:
            self.refuse(min(self.rest), "no tensor of this name", "one")


def _fit(archive: Archive, name: str, x: Tensor, known: tuple[str, ...], shape: Shape) -> None:
    """That a tensor is what it must be."""
    fits = shape is None or (
        len(x.shape) == len(shape)
        and all(wanted in (None, n) for n, wanted in zip(x.shape, shape, strict=True))
    )
    if x.dtype not in known or not fits:
        wanted = ["any" if n is None else n for n in shape or (None,)]
        archive.refuse(name, f"{' or '.join(known)} {wanted}", f"{x.dtype} {list(x.shape)}")
