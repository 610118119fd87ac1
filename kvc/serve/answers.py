"""Answers in the two forms of OpenAI's API, whole and in pieces."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvc.serve.jobs import Counts, Update
from kvc.serve.protocol import (
    Answer,
    CacheBytes,
    CachedTokens,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    Finish,
    Usage,
)


class Form(Protocol):
    """How an answer is written."""

    def whole(self, update: Update) -> dict[str, Any]:
        """All of it."""

    def first(self) -> dict[str, Any] | None:
        """The piece before any text, if there is one."""

    def piece(self, text: str, finish: Finish | None = None) -> dict[str, Any]:
        """More text, or the end."""


def usage(counts: Counts | None) -> Usage:
    """What a job took, as the API says it."""
    assert counts is not None
    return Usage(
        prompt_tokens=counts.prompt,
        completion_tokens=counts.generated,
        total_tokens=counts.prompt + counts.generated,
        prompt_tokens_details=CachedTokens(cached_tokens=counts.cached),
        kvc=CacheBytes(cache_bytes=counts.cache_bytes, dense_bytes=counts.dense_bytes),
    )


@dataclass(frozen=True, slots=True)
class TextForm:
    """Of /v1/completions."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, update: Update) -> dict[str, Any]:
        """All of it."""
        return self._answer(update.text, update.finish, usage(update.counts)).model_dump()

    def first(self) -> None:
        """None: the text begins at once."""

    def piece(self, text: str, finish: Finish | None = None) -> dict[str, Any]:
        """More text, or the end."""
        return self._answer(text, finish).model_dump(exclude={"usage"})

    def _answer(self, text: str, finish: Finish | None, took: Usage | None = None) -> Completion:
        choices = [CompletionChoice(text=text, finish_reason=finish)]
        return Completion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=took
        )


@dataclass(frozen=True, slots=True)
class ChatForm:
    """Of /v1/chat/completions."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, update: Update) -> dict[str, Any]:
        """All of it."""
        assert update.finish is not None
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[ChatChoice(message=Answer(content=update.text), finish_reason=update.finish)],
            usage=usage(update.counts),
        ).model_dump()

    def first(self) -> dict[str, Any]:
        """Who speaks."""
        return self._piece({"role": "assistant", "content": ""}, None)

    def piece(self, text: str, finish: Finish | None = None) -> dict[str, Any]:
        """More text, or the end."""
        return self._piece({"content": text} if text else {}, finish)

    def _piece(self, delta: dict[str, str], finish: Finish | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }
