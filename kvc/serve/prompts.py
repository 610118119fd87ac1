"""From what a client sends to tokens, and where prompts after it may branch off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvc.errors import ConfigError
from kvc.serve.errors import APIError
from kvc.serve.prefixes import shared

if TYPE_CHECKING:
    from kvc.backends.base import Engine


class Reader:
    """Makes tokens of prompts, as `kvc generate` does.

    Args:
        engine: Its tokenizer is asked, and no arrays; by one thread.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.n_tokens = engine.shape.vocab_size

    def text(self, text: str) -> list[int]:
        """Tokens of a text.

        Raises:
            APIError: If there are none.
        """
        ids = self.engine.encode(text)
        if not ids:
            raise APIError(
                400,
                "prompt: expected some text, got none that makes a token",
                param="prompt",
                code="invalid_value",
            )
        return ids

    def tokens(self, ids: Sequence[int]) -> list[int]:
        """Tokens as they came.

        Raises:
            APIError: If the model does not know one.
        """
        if (largest := max(ids)) >= self.n_tokens:
            raise APIError(
                400,
                f"prompt: expected tokens below {self.n_tokens}, got {largest}",
                param="prompt",
                code="invalid_value",
            )
        return list(ids)

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], int]:
        """Tokens of a conversation, and how many of them do not depend on its last message.

        Raises:
            APIError: If the model has no chat template, or it refuses the conversation.
        """
        if not self.engine.can_chat:
            raise APIError(
                400,
                "messages: this model has no chat template; ask /v1/completions, or start the "
                "server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        # Another last message, with another first character.
        last = messages[-1]
        other = {**last, "content": "1" if last["content"][:1] == "0" else "0"}
        try:
            ids = self.engine.encode(messages)
            changed = self.engine.encode([*messages[:-1], other])
        except ConfigError as error:
            raise APIError(
                400, f"messages: {error}", param="messages", code="chat_template"
            ) from None
        if not ids:
            raise APIError(
                400, "messages: their template makes no token", param="messages", code="empty"
            )
        return ids, shared(ids, changed)
