"""A server over a model that is none: it answers at once, or when a test lets it."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn

from kvc.backends.sequences import Event, Piece
from kvc.errors import ConfigError, KVCError
from kvc.serve.app import Server, Settings
from kvc.serve.metrics import Metrics
from kvc.serve.model import Model
from kvc.serve.prefixes import Prefixes
from kvc.serve.prompts import Reader
from kvc.serve.run import address, bind
from kvc.serve.worker import Worker
from kvc.store.report import Report

VOCAB = 0x110000  # a token is a character
TEXT = "It was a dark and stormy night; the rain fell in torrents. "
BREAK = "\x07"  # a prompt with this in it fails
PATIENCE = 30.0  # seconds


def until(true: Callable[[], bool]) -> None:
    """Waits for what another thread will do."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


class FakeEngine:
    """Answers every prompt with `TEXT`, from where the prompt's length points."""

    name = "cpu"
    tokenizer = None
    context_length = 1000
    chat_template: str | None = "{}"
    shape = SimpleNamespace(vocab_size=VOCAB)

    @property
    def can_chat(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: Any, *, reply: bool = True) -> list[int]:
        if not isinstance(text, str):
            if text[0]["role"] == "assistant":
                raise ConfigError("the template refuses it")
            text = "".join(f"<{m['role']}>{m['content']}" for m in text) + "<assistant>"
        return [ord(c) for c in text]


def answer(prompt: str, n: int) -> str:
    """What the model says behind a prompt."""
    return "".join(itertools.islice(itertools.cycle(TEXT), len(prompt), len(prompt) + n))


@dataclass
class FakeBatch:
    """Sequences that take their tokens from `TEXT`."""

    batch_limit: int
    gate: threading.Event
    rows: dict[int, SimpleNamespace] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)
    added: list[SimpleNamespace] = field(default_factory=list)
    keys: Iterator[int] = field(default_factory=itertools.count)
    broken: bool = False
    wide: int = 1  # characters of a token's text

    def add(self, segments: Sequence[Sequence[int]], cache: Any, **options: Any) -> int:
        key = next(self.keys)
        row = SimpleNamespace(segments=segments, cache=cache, new=[], done=0, **options)
        self.rows[key] = row
        self.added.append(row)
        return key

    def step(self) -> list[Event]:
        assert self.gate.wait(PATIENCE)
        if self.broken:
            raise RuntimeError("out of memory, say")
        return [event for key in list(self.rows) for event in self._step(key)]

    def _step(self, key: int) -> list[Event]:
        row = self.rows[key]
        if row.done < len(row.segments):
            segment = row.segments[row.done]
            row.cache.extend(segment)
            row.done += 1
            if ord(BREAK) in segment:
                del self.rows[key]
                return [Event(key, "error", error=KVCError("the prompt holds NaN"))]
            return [Event(key, "segment", index=row.done - 1, cache=list(row.cache))]
        token = ord(TEXT[(len(row.cache) + len(row.new)) % len(TEXT)])
        row.new.append(token)
        events = [Event(key, "token", piece=Piece(chr(token) * self.wide, token))]
        if len(row.new) == row.max_tokens:
            events.append(self._end(key, "length"))
        return events

    def _end(self, key: int, finish: Any = None) -> Event:
        row = self.rows.pop(key)
        ids = [t for s in row.segments for t in s] + row.new
        row.cache.extend(row.new)
        return Event(key, "end", finish=finish, cache=row.cache, ids=tuple(ids))

    def remove(self, key: int) -> Event | None:
        self.removed.append(key)
        if key in self.rows and self.rows[key].new:
            return self._end(key)
        self.rows.pop(key, None)
        return None


class FakeModel:
    """What the worker runs; `gate` lets steps be taken."""

    def __init__(self, limit: int = 2, prefixes: Prefixes | None = None) -> None:
        self.engine: Any = FakeEngine()
        self.prefixes = prefixes
        self.limit, self.gate = limit, threading.Event()
        self.gate.set()
        self.batches: list[FakeBatch] = []
        self.rests = 0
        self.closed_in: int | None = None

    def batch(self) -> FakeBatch:
        self.batches.append(FakeBatch(self.limit, self.gate))
        return self.batches[-1]

    def cache(self) -> list[int]:
        return []

    def settle(self, cache: Any) -> None:
        pass

    def rest(self) -> None:
        self.rests += 1

    def close(self) -> None:
        self.closed_in = threading.get_ident()

    def report(self, cache: Any) -> Report:
        return Report(len(cache), 4 * len(cache), 4.0, {}, [])


@dataclass
class Running:
    """A server at work in a thread."""

    url: str
    worker: Worker
    model: Any
    server: uvicorn.Server
    http: httpx.Client

    def post(self, path: str = "completions", **body: Any) -> httpx.Response:
        """What is answered to a request."""
        return self.http.post(f"/v1/{path}", json=body)

    def stop(self) -> None:
        """As the first signal does."""
        self.server.should_exit = True


@contextmanager
def serving(model: Model | Any, max_waiting: int = 4, **settings: Any) -> Iterator[Running]:
    """A server of a model, or of what a function loads in the worker's thread."""
    metrics = Metrics()
    load = model if callable(model) else lambda: model
    worker = Worker(load, max_waiting, metrics)
    loaded = worker.start()
    context = loaded.engine.context_length
    chosen = Settings(
        **{"name": "fake", "context": context, "max_tokens": 40, "max_body": 100_000} | settings
    )
    app = Server(worker, Reader(loaded.engine), chosen, metrics).app()
    config = uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def and_tell(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = and_tell  # type: ignore[method-assign]
    with bind("127.0.0.1", 0) as bound, httpx.Client(base_url=address(bound), timeout=60) as http:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        assert started.wait(PATIENCE)
        try:
            yield Running(address(bound), worker, loaded, server, http)
        finally:
            server.should_exit = True
            if isinstance(loaded, FakeModel):
                loaded.gate.set()
            thread.join(PATIENCE)
            assert not thread.is_alive()
