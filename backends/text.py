"""Text from tokens one by one, on any library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 8  # tokens of the prompt that the first new ones are decoded with


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
