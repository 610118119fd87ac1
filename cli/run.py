"""A model at work: its text as it comes, Ctrl-C, and what there is to say at the end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from kvc.backends.base import Engine
    from kvc.backends.sequences import Piece
    from kvc.chat import Conversation

PEAK_OF = {"cpu": "of the process", "mlx": "held by MLX", "cuda": "on the GPU"}


@dataclass(slots=True)
class Stats:
    """What a run did. A speed is None where there was too little to measure."""

    backend: str
    method: str
    prompt_tokens: int
    prefill_tokens: int = 0  # of the prompt; fewer only after Ctrl-C
    tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    prefill_tokens_per_s: float | None = None  # up to the first new token
    decode_tokens_per_s: float | None = None  # after it
    cache_bytes: int = 0
    dense_bytes: int = 0
    ratio: float = 1.0
    parts: dict[str, int] = field(default_factory=dict)  # bytes
    layers: list[int] = field(default_factory=list)  # bytes
    peak_bytes: int = 0
    peak_of: str = ""
    interrupted: bool = False

    def measure(self, engine: Engine, cache: Any) -> None:
        """Takes the bytes of the cache and the peak of memory."""
        report = engine.store(cache).report()
        self.cache_bytes, self.dense_bytes = report.nbytes, report.dense_bytes
        self.ratio, self.parts, self.layers = report.ratio, report.parts, report.layers
        self.peak_bytes, self.peak_of = engine.peak_memory(), PEAK_OF[engine.name]

    def lines(self) -> str:
        """For a reader."""
        prefill, decode = (
            f"{speed:.1f} tokens/s" if speed else "-"
            for speed in (self.prefill_tokens_per_s, self.decode_tokens_per_s)
        )
        part = "" if self.prefill_tokens == self.prompt_tokens else f"{self.prefill_tokens} of "
        return (
            f"{self.backend}, {self.method}{', interrupted' if self.interrupted else ''}\n"
            f"prefill  {part}{self.prompt_tokens} tokens, {prefill}\n"
            f"decode   {self.tokens} tokens, {decode}\n"
            f"cache    {in_units(self.cache_bytes)} against {in_units(self.dense_bytes)} dense, "
            f"ratio {self.ratio:.2f}\n"
            f"peak     {in_units(self.peak_bytes)} {self.peak_of}"
        )


def in_units(n: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def hush(quiet: bool = False) -> None:
    """Tells the library of the Hugging Face hub, before its import, to keep to our ways."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else a line for each try without network
    if quiet or not sys.stderr.isatty():  # the libraries' bars know of no terminal
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def load(backend: str, model: str | None, dtype: str | None = None, quiet: bool = False) -> Engine:
    """The model, or the bundled one without a name; the libraries keep to kvc's ways on stderr.

    Raises:
        KVCError: If the backend or the model is not there.
    """
    from kvc.api import load_engine
    from kvc.demo import path

    hush(quiet)
    return load_engine(backend, model if model is not None else str(path()), dtype)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises at the next call of what this yields, so that it cuts no step in two.

    A second Ctrl-C raises at once. Where SIGINT is ignored or handled otherwise, it stays so.
    """
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(
    engine: Engine | Conversation,
    ids: list[int],
    cache: Any,
    stats: Stats,
    show: Callable[[str], None],
    quiet: bool,
    **options: Any,
) -> None:
    """Generates into `show` and `stats`; Ctrl-C ends it, and `stats` holds what there is.

    Args:
        engine: With its model loaded: no speed counts loading.
        ids: The prompt, less what the cache holds.
        cache: From the engine's `make_cache`.
        stats: Filled with tokens and speeds.
        show: Takes the text of each token.
        quiet: Whether to do without a progress bar.
        options: Of the engine's `stream`.
    """
    from tqdm import tqdm

    start = first = last = time.perf_counter()
    with held_interrupts() as check:
        # disable=None: no bar where stderr is no terminal
        bar = tqdm(total=len(ids), desc="prefill", unit="tok", leave=False, disable=quiet or None)

        def on_prefill(done: int, total: int) -> None:
            nonlocal first
            if done > stats.prefill_tokens:
                stats.prefill_tokens, first = done, time.perf_counter()
                bar.update(done - bar.n)
            check()

        try:
            pieces = engine.stream(ids, cache, on_prefill=on_prefill, **options)
            with closing(cast("Generator[Piece, None, None]", pieces)):
                for piece in pieces:
                    last = time.perf_counter()
                    if not stats.tokens:
                        stats.prefill_tokens, first = len(ids), last
                        bar.close()
                    stats.tokens += 1
                    stats.token_ids.append(piece.token)
                    show(piece.text)
                    check()
        except KeyboardInterrupt:
            stats.interrupted = True
        finally:
            bar.close()
    if stats.prefill_tokens:
        stats.prefill_tokens_per_s = stats.prefill_tokens / max(first - start, 1e-9)
    if stats.tokens > 1:
        stats.decode_tokens_per_s = (stats.tokens - 1) / max(last - first, 1e-9)
