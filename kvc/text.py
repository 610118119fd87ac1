"""Texts and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvc.backends.base import Engine
from kvc.errors import ConfigError


def read_text(path: str | Path, source: str = "--text") -> str:
    """A file's text; errors begin with `source`, the option that named it.

    Raises:
        ConfigError: If it cannot be read, or is no UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{source} {path}: cannot read it: {error.strerror}") from None
    return decoded(data, f"{source} {path}")


def decoded(data: bytes, source: str) -> str:
    """Bytes as text, without a byte order mark.

    Raises:
        ConfigError: If they are no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(
            f"{source}: expected UTF-8, got byte 0x{byte:02x} at {error.start}; convert it, e.g. "
            "with iconv"
        ) from None


def split_start(engine: Engine, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text, and the text."""
    bos = getattr(engine.tokenizer, "bos_token_id", None)
    n = int(len(ids) > 0 and ids[0] == bos)
    return list(ids[:n]), list(ids[n:])
