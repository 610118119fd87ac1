"""A conversation over one cache that stays compressed: only what is new is read in each turn.

The tokens of the conversation are those that the model has really read and written. A turn renders
the whole conversation with the chat template; what stands behind the tokens so far is read. Where
they are no beginning of it (the template drops what the model thought, or its answer is cut into
other tokens when read again), they stay, and the turn's own part of the rendering is read: what
renderings with two different answers have in common at their ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, cast

from kvc.api import load_cache, save_cache
from kvc.backends.base import Engine, Message
from kvc.backends.sequences import Piece
from kvc.errors import CacheFileError, ConfigError
from kvc.methods import Method
from kvc.saving import notes_of
from kvc.text import split_start


class Notes(NamedTuple):
    """What a file keeps of a conversation beside its cache, as JSON."""

    messages: list[Message]
    rest: list[int]  # tokens that the cache does not hold yet
    start: int  # tokens in front that no message stands for
    ended: bool  # whether the model ended its last answer by itself


class Conversation:
    """Messages, their tokens and the cache that holds them.

    Attributes:
        engine: Runs the model.
        method: What keeps the tokens.
        prefill: `exact` or `stream`, as in `Engine.make_cache`.
        messages: What was said, with "role" and "content".
        tokens: What was read and written; the cache holds the first of them.
        cache: From the engine; without tokens it reads them all in the next turn.
    """

    def __init__(
        self, engine: Engine, method: Method, prefill: str = "exact", system: str | None = None
    ) -> None:
        self.engine, self.method, self.prefill, self.system = engine, method, prefill, system
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages: list[Message] = []
        if self.system is not None:
            self.messages = [{"role": "system", "content": self.system}]
        self.tokens: list[int] = []
        self.start = 0  # tokens in front that no message stands for
        self.ended = False  # whether the model ended its last answer by itself
        self.forget()

    def forget(self, method: Method | None = None) -> None:
        """Gives up the cache, for one of another method if there is one.

        Raises:
            ConfigError: If the model cannot take the method; nothing is changed then.
        """
        cache = self.engine.make_cache(method or self.method, self.prefill)
        self.method, self.cache = method or self.method, cache

    @property
    def held(self) -> int:
        """How many of the tokens are in the cache."""
        return self.engine.store(self.cache).length()

    @property
    def room(self) -> int | None:
        """Tokens that the model's context still has room for; None where it has no end."""
        limit = self.engine.context_length
        return None if limit is None else max(limit - len(self.tokens), 0)

    def ask(self, text: str) -> list[int]:
        """Adds a message of the user's; returns the tokens to read, those of earlier turns too.

        Raises:
            ConfigError: If the context has no room for it and an answer, or the template refuses
                it; nothing is changed then.
        """
        message = {"role": "user", "content": text}
        new = self._turn(message)
        tokens = self.tokens + new if new is not None else self.render([*self.messages, message])
        limit = self.engine.context_length
        if limit is not None and len(tokens) >= limit:
            raise ConfigError(
                f"chat: with this message the conversation has {len(tokens)} tokens, the model's "
                f"context {limit}: no room for an answer"
            )
        if new is None:
            self.start = 0
            self.forget()
        self.tokens = tokens
        self.messages = [*self.messages, message, {"role": "assistant", "content": ""}]
        return self.tokens[self.held :]

    def stream(
        self,
        ids: Sequence[int],
        cache: Any,
        *,
        max_tokens: int,
        on_prefill: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """The answer, as `Engine.stream` gives it for what `ask` returned; it is remembered.

        Closed early, it keeps what was read and written until then. An error in the middle of a
        step costs the cache: the next turn reads all tokens again.
        """
        room, n, between = self.room, 0, True
        max_tokens = max_tokens if room is None else min(max_tokens, room)

        def told(done: int, total: int) -> None:
            nonlocal between
            between = True
            if on_prefill is not None:
                on_prefill(done, total)
            between = False

        self.ended = False
        try:
            pieces = self.engine.stream(
                ids, cache, max_tokens=max_tokens, on_prefill=told, **options
            )
            with closing(cast("Generator[Piece, None, None]", pieces)):
                between = False
                for piece in pieces:
                    between, n = True, n + 1
                    self.tokens.append(piece.token)
                    self._write(piece.text)
                    yield piece
                    between = False
                between, self.ended = True, n < max_tokens
        finally:
            if not between:
                self.forget()

    def _write(self, text: str) -> None:
        answer = self.messages[-1]
        self.messages[-1] = {**answer, "content": answer["content"] + text}

    def save(self, path: str | Path) -> None:
        """Keeps the conversation with its cache in a file.

        Raises:
            ConfigError: If the cache holds nothing.
            CacheFileError: If the file cannot be written; what was there before stays.
        """
        held = self.held
        if not held:
            raise ConfigError(f"{path}: expected a cache with some tokens, got an empty one")
        notes = Notes(self.messages, self.tokens[held:], self.start, self.ended)
        save_cache(
            self.cache,
            path,
            self.tokens[:held],
            model=self.engine.model,
            notes=json.dumps(notes._asdict()),
        )

    def load(self, path: str | Path) -> None:
        """Goes on with the conversation of a file, or behind the text that it is a cache of.

        Raises:
            CacheFileError: If it is damaged or not of this model; nothing is changed then.
        """
        cache, tokens = load_cache(self.engine.model, path)
        if tokens and isinstance(tokens[0], list):
            raise CacheFileError(f"{path}: expected one text, got a cache of {len(tokens)}")
        text = notes_of(path)
        notes = Notes([], [], len(tokens), ended=False)
        if text:
            notes = _read_notes(path, text, len(tokens), self.engine.shape.vocab_size)
        self.reset()
        if text:
            self.messages = notes.messages
        self.tokens = [*tokens, *notes.rest]
        self.start, self.ended = notes.start, notes.ended
        self.cache, self.method = cache, self.engine.store(cache).method

    def render(self, messages: Sequence[Message], reply: bool = True) -> list[int]:
        """Tokens of a conversation. A model without a chat template continues its texts.

        Raises:
            ConfigError: If the template refuses it.
        """
        if self.engine.can_chat:
            return self.engine.encode(messages, reply=reply)
        text, last = "", "user"
        for message in messages:
            text += ("" if last == "user" else "\n\n") + message["content"]
            last = message["role"]
        return self.engine.encode(text)

    def _turn(self, message: Message) -> list[int] | None:
        """What a message of the user's adds to the tokens; None if they must be read anew."""
        whole = self.render([*self.messages, message])
        if self.start:
            whole = split_start(self.engine, whole)[1]
        written = self.tokens[self.start :]
        if whole[: len(written)] == written:
            return whole[len(written) :]
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        one, two = (
            self.render([*self.messages[:-1], {"role": "assistant", "content": answer}, message])
            for answer in ("1", "2")
        )
        pairs = zip(reversed(one), reversed(two), strict=False)
        n = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if n is None:  # the template leaves the answer out
            return None
        tail = one[len(one) - n :]
        # The model has ended its answer as the template does: that is not read twice. Some
        # templates put a space in front.
        ends = tail[: 2 if self.ended else 1]
        last = self.tokens[-1]
        return tail[ends.index(last) + 1 :] if last in ends else tail


def _read_notes(path: str | Path, text: str, n_tokens: int, vocab_size: int) -> Notes:
    """What `Conversation.save` wrote.

    Raises:
        CacheFileError: If it is something else.
    """
    try:
        notes = Notes(**json.loads(text))
        messages, rest, start, ended = notes
        good = (
            all(set(m) == {"role", "content"} for m in messages)
            and all(type(x) is str for m in messages for x in m.values())
            and all(type(x) is int and 0 <= x < vocab_size for x in rest)
            and type(start) is int
            and 0 <= start <= n_tokens
            and type(ended) is bool
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise CacheFileError(f"{path}: notes: expected those of a conversation, got {text[:60]!r}")
    return notes
