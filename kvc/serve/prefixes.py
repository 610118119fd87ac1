"""Caches of what earlier prompts began with, for prompts that begin alike.

A compressed cache cannot be cut back, so copies are kept where prompts may branch off. Those that
were used least recently leave memory: for a folder, or for good.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvc.errors import KVCError

Ids = np.ndarray[Any, np.dtype[np.int32]]

LOG = logging.getLogger("uvicorn.error")  # the server's own: its lines go where those go

GAP = 32  # tokens that a copy must save over a shorter one to be worth its bytes
# What a cut leaves of a prompt: the same prompt again still has a token to be predicted from, and
# no library gets a lone token, which would end the prompt for the store.
TAIL = 3


class Shelf(Protocol):
    """Files of caches."""

    def files(self) -> Iterable[tuple[Sequence[int], Path]]:
        """What is there already, with its tokens, the least recently used first."""

    def write(self, ids: Sequence[int], cache: Any) -> Path:
        """Keeps a cache.

        Raises:
            KVCError: If it cannot be written.
        """

    def read(self, path: Path) -> Any:
        """Brings one back.

        Raises:
            KVCError: If it is damaged, or not of this model and method.
        """


@dataclass(slots=True)
class Entry:
    """A cache of the tokens `ids`: in memory, in a file, or in both."""

    ids: Ids
    cache: Any = None
    nbytes: int = 0
    path: Path | None = None
    file_bytes: int = 0


class Found(NamedTuple):
    """A stored cache of a prompt's first `n` tokens."""

    n: int
    cache: Any


class Prefixes:
    """Caches by their tokens; one thread calls it.

    Args:
        size: The bytes of a cache.
        budget: Bytes of the caches in memory, at most.
        shelf: Where those go that have no room in memory.
        shelf_budget: Bytes of the files, at most.
    """

    def __init__(
        self,
        size: Callable[[Any], int],
        budget: int,
        shelf: Shelf | None = None,
        shelf_budget: int = 0,
    ) -> None:
        self.size, self.budget, self.shelf, self.shelf_budget = size, budget, shelf, shelf_budget
        self.nbytes = self.file_bytes = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # the least recently used first
        for ids, path in shelf.files() if shelf is not None else ():
            tokens = _array(ids)
            self._entries[tokens.tobytes()] = entry = Entry(tokens)
            self._filed(entry, path)
        self._shrink_files()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, ids: Sequence[int]) -> Found | None:
        """The longest stored beginning of a prompt, but not all of it, as a copy to go on from."""
        prompt = _array(ids)
        begins = [
            key
            for key, entry in self._entries.items()
            if (n := len(entry.ids)) < len(prompt) and np.array_equal(entry.ids, prompt[:n])
        ]
        for key in sorted(begins, key=len, reverse=True):
            entry = self._entries[key]
            if entry.cache is not None or self._read(entry):
                self._entries.move_to_end(key)
                found = Found(len(entry.ids), copy.deepcopy(entry.cache))
                self._shrink()
                return found
            self._drop(key)
        return None

    def cuts(self, ids: Sequence[int], start: int, wanted: Sequence[int]) -> list[int]:
        """Where to take copies of a prompt whose first `start` tokens are stored already.

        Args:
            ids: The prompt.
            start: How many of its tokens are stored.
            wanted: Where prompts to come may branch off, as far as the request shows it.

        Returns:
            Numbers of tokens: those wanted, those that an earlier prompt shares, and nearly all.
        """
        prompt = _array(ids)
        alike = max((shared(entry.ids, prompt) for entry in self._entries.values()), default=0)
        chosen, last = [], start
        for cut in sorted({*wanted, alike, len(ids) - TAIL}):
            if last + GAP <= cut <= len(ids) - TAIL:
                chosen.append(last := cut)
        return chosen

    def put(self, ids: Sequence[int], cache: Any) -> None:
        """Keeps a cache that holds these tokens and that nobody changes any more."""
        if len(ids) < GAP:
            return
        tokens = _array(ids)
        entry = self._entries.setdefault(tokens.tobytes(), Entry(tokens))
        self._entries.move_to_end(tokens.tobytes())
        self._held(entry, cache)
        self._shrink()

    def spill(self) -> int:
        """Writes every cache that is in memory alone to a file; says how many files there are.

        Their times say which of them was used before which.
        """
        for entry in list(self._entries.values()):
            self._write(entry)
        self._shrink_files()
        paths = [entry.path for entry in self._entries.values() if entry.path]
        start = time.time() - len(paths)
        for i, path in enumerate(paths):
            with suppress(OSError):  # somebody took it away
                os.utime(path, (start + i, start + i))
        return len(paths)

    def _held(self, entry: Entry, cache: Any) -> None:
        """Puts a cache into an entry in memory, or takes it out, with None."""
        self.nbytes -= entry.nbytes
        entry.cache, entry.nbytes = cache, 0 if cache is None else self.size(cache)
        self.nbytes += entry.nbytes

    def _filed(self, entry: Entry, path: Path) -> None:
        entry.path, entry.file_bytes = path, path.stat().st_size
        self.file_bytes += entry.file_bytes

    def _shrink(self) -> None:
        """Takes caches out of memory until the rest is within the budget."""
        for key, entry in list(self._entries.items()):
            if self.nbytes <= self.budget:
                break
            self._write(entry)
            self._held(entry, None)
            if entry.path is None:
                del self._entries[key]
        self._shrink_files()

    def _shrink_files(self) -> None:
        for key, entry in list(self._entries.items()):
            if self.file_bytes <= self.shelf_budget:
                return
            self._unfile(entry)
            if entry.cache is None:
                del self._entries[key]

    def _write(self, entry: Entry) -> None:
        if self.shelf is None or entry.path or entry.cache is None:
            return
        try:
            self._filed(entry, self.shelf.write(entry.ids.tolist(), entry.cache))
        except (KVCError, OSError) as error:  # a full disk must not stop the server
            LOG.warning("a cache of %d tokens is not kept: %s", len(entry.ids), error)

    def _read(self, entry: Entry) -> bool:
        """Brings an entry's cache back from its file, if the file is whole."""
        assert self.shelf is not None
        assert entry.path is not None
        try:
            self._held(entry, self.shelf.read(entry.path))
        except (KVCError, OSError) as error:
            LOG.warning("%s", error)
            return False
        return True

    def _unfile(self, entry: Entry) -> None:
        if entry.path:
            entry.path.unlink(missing_ok=True)
            self.file_bytes -= entry.file_bytes
            entry.path, entry.file_bytes = None, 0

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._held(entry, None)
        self._unfile(entry)


def shared(a: Sequence[int] | Ids, b: Sequence[int] | Ids) -> int:
    """How many tokens two sequences begin with in common."""
    a, b = _array(a), _array(b)
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _array(ids: Sequence[int] | Ids) -> Ids:
    return np.asarray(ids, np.int32)
