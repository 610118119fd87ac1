"""How well cache files serve: `python -m tests.cache_table [TOKENS]`, on the bundled model.

Each method's cache is written by one library and taken up by the other. Both then write greedily
behind the same token: `same` is how many tokens are those of the cache that was never written.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvc
import kvc.demo
from kvc.backends.base import ops_of
from kvc.methods import Method
from tests.backend_table import NAMES, engines, method_of

SPLIT = 3  # tokens of decoding before a cache is written


@dataclass(frozen=True)
class Row:
    """One method, written by one library and taken up by the other."""

    name: str
    writer: str
    same: int  # tokens until the first that differs
    n: int  # tokens in all
    size: int  # bytes of the file
    nbytes: int  # of the cache from it

    def __str__(self) -> str:
        over = 100 * (self.size / self.nbytes - 1)
        return f"| `{self.name}` | {self.writer} | {self.same} of {self.n} | {over:+.2f} % |"


def feed(engine: Any, cache: Any, ids: list[int]) -> int:
    """The likeliest token behind these, which go into the cache."""
    found = engine.logits(np.array([ids]), cache)[0, -1]
    return int(np.asarray(ops_of(found).to_numpy(found)).argmax())


def greedy(engine: Any, cache: Any, token: int, n: int) -> list[int]:
    """The next `n` tokens behind one that is not in the cache yet."""
    found = [token]
    for _ in range(n):
        found.append(feed(engine, cache, found[-1:]))
    return found[1:]


def filled(engine: Any, method: Method, ids: list[int], **options: Any) -> tuple[Any, list[int]]:
    """A cache that has read a prompt and written a few tokens, and all tokens in it."""
    cache = engine.make_cache(method, **options)
    if engine.name == "mlx":  # it sends a prompt's last token alone
        feed(engine, cache, ids[:-1])
    token = feed(engine, cache, ids[-1:] if engine.name == "mlx" else ids)
    return cache, [*ids, token, *greedy(engine, cache, token, SPLIT)][:-1]


def compare(
    writer: Any, reader: Any, method: Method, ids: list[int], n: int, path: Path, **options: Any
) -> Row:
    """Writes a cache, and `n` tokens behind it and behind the one that is taken up."""
    cache, held = filled(writer, method, ids, **options)
    kvc.save_cache(cache, path, held, model=writer.model)
    again, tokens = kvc.load_cache(reader.model, path)
    assert tokens == held
    nbytes = kvc.report(again).nbytes
    expected = greedy(writer, cache, held[-1], n)
    got = greedy(reader, again, held[-1], n)
    same = next((i for i in range(n) if expected[i] != got[i]), n)
    return Row(method.name, writer.name, same, n, path.stat().st_size, nbytes)


def main() -> None:
    """Prints the table."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    pair = engines(str(kvc.demo.path()))
    text = (kvc.demo.path() / "text.txt").read_text(encoding="utf-8")
    ids = pair[0].encode(text)[:1200]
    print("| method | written by | same tokens | file over the cache's bytes |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            for writer, reader in (pair, pair[::-1]):
                method = method_of(name, writer.shape, Path(folder))
                print(compare(writer, reader, method, ids, n, Path(folder) / "x.kvc"), flush=True)


if __name__ == "__main__":
    main()
