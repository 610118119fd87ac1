"""Text from tokens one by one, on any library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvc.backends.base import Message
from kvc.backends.fit import in_short
from kvc.errors import ConfigError

CONTEXT = 8  # tokens of the prompt that the first new ones are decoded with


def chat_ids(
    name: str, apply: Callable[..., Iterable[int]] | None, messages: Sequence[Message], reply: bool
) -> list[int]:
    """Token ids of a conversation, up to where the answer begins if `reply`.

    Args:
        name: What messages call the model.
        apply: Its tokenizer's `apply_chat_template`; None where there is no template.
        messages: The conversation.
        reply: Whether the model is to answer.

    Raises:
        ConfigError: If there is no template, or it refuses the conversation.
    """
    if apply is None:
        raise ConfigError(f"{name}: expected a chat template, this model's tokenizer has none")
    try:
        return list(apply([dict(m) for m in messages], add_generation_prompt=reply))
    except Exception as error:  # templates are programs of the models' authors
        raise ConfigError(
            f"{name}: its chat template refuses this conversation: {in_short(error)}"
        ) from error


class Text:
    """The text that each new token completes; none in the middle of a character.

    Tokens are decoded together with some before them: tokenizers treat a text's first token
    differently, and many drop its leading space.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt[-CONTEXT:])
        self.start, self.done = 0, len(self.ids)  # ids[:done] is given out; ids[start:] is context

    def add(self, token: int) -> str:
        """The text that ends with `token`, since what was given out last."""
        self.ids.append(token)
        before = self._decode(self.ids[self.start : self.done])
        now = self._decode(self.ids[self.start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.start, self.done = self.done, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
