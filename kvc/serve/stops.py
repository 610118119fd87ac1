"""Texts that end an answer, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Lets text through up to the first of `texts`; what may yet become one waits.

    Args:
        texts: That end the answer; none of them is empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.held, self.found = tuple(texts), "", False

    def add(self, text: str) -> str:
        """What can be given out, now that `text` has come; `found` says whether it is the last."""
        self.held += text
        places = [place for stop in self.texts if (place := self.held.find(stop)) >= 0]
        if places:
            self.found, text, self.held = True, self.held[: min(places)], ""
            return text
        waits = max((self._overlap(stop) for stop in self.texts), default=0)
        cut = len(self.held) - waits
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def rest(self) -> str:
        """What waited, at the end of the tokens."""
        text, self.held = self.held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """How much of the held text's end is the beginning of `stop`."""
        sizes = range(min(len(stop) - 1, len(self.held)), 0, -1)
        return next((n for n in sizes if self.held.endswith(stop[:n])), 0)
