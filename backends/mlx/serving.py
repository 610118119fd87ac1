"""mlx-lm's server: it cuts earlier requests' caches back to what a new prompt shares with one.

A compressed cache goes back only so far, and whether it does is known when it is tried. Where it
does not, the request must not fail for it: its prompt is processed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from kvc.errors import ConfigError

_library = LRUPromptCache.fetch_nearest_cache


def _fetch_nearest_cache(
    self: LRUPromptCache, model: Any, tokens: Sequence[int]
) -> tuple[Any, Sequence[int]]:
    try:
        found: tuple[Any, Sequence[int]] = _library(self, model, tokens)
    except ConfigError:  # from a copy's trim
        return None, tokens
    return found


def install() -> None:
    """Let prompts be processed anew whose nearest cache cannot go back far enough."""
    LRUPromptCache.fetch_nearest_cache = _fetch_nearest_cache
