"""What a user gives to `kvc generate`: the prompt, its tokens, the settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from kvc.errors import ConfigError
from kvc.text import decoded, read_text

if TYPE_CHECKING:
    from kvc.backends.base import Engine


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt: the argument, a file, or standard input where neither is given.

    Raises:
        ConfigError: If there is none or there are two, or it is empty, unreadable or not UTF-8.
    """
    if prompt is None and prompt_file is None and not sys.stdin.isatty():
        prompt_file = "-"
    if (prompt is None) == (prompt_file is None):
        got = "neither" if prompt is None else "both"
        raise ConfigError(f"generate: expected either PROMPT or --prompt-file, got {got}")
    if prompt_file is None:
        text, source = cast("str", prompt), "PROMPT"
        if any("\ud800" <= c <= "\udfff" for c in text):  # bytes that the shell's locale lacks
            raise ConfigError("PROMPT: expected UTF-8, got other bytes; use --prompt-file")
    else:
        source = f"--prompt-file {prompt_file}"
        if prompt_file == "-":
            text = decoded(sys.stdin.buffer.read(), source)
        else:
            text = read_text(prompt_file, "--prompt-file")
    if not text.strip():
        raise ConfigError(f"{source}: expected some text, got an empty prompt")
    return text


def read_settings(settings: Sequence[str], source: str = "--set") -> dict[str, str]:
    """`key=value` pairs as a dict; errors begin with `source`.

    Raises:
        ConfigError: If one has no `=`, or a key comes twice.
    """
    pairs: dict[str, str] = {}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not (key and equals and value):
            raise ConfigError(f"{source}: expected key=value such as gear.bits=4, got {setting!r}")
        if key in pairs:
            raise ConfigError(f"{source}: {key} is given twice, as {pairs[key]} and {value}")
        pairs[key] = value
    return pairs


def encode(engine: Engine, text: str, chat: bool | None) -> list[int]:
    """Token ids; with `chat=None` the model's chat template is used if it has one.

    Raises:
        ConfigError: If there is no chat template, or more tokens than the model's context has.
    """
    chat = engine.can_chat if chat is None else chat
    ids = engine.encode([{"role": "user", "content": text}] if chat else text)
    limit = engine.context_length
    if not ids:
        raise ConfigError("generate: the tokenizer makes no tokens of this prompt")
    if limit is not None and len(ids) > limit:
        raise ConfigError(
            f"generate: the prompt has {len(ids)} tokens, the model's context {limit}; shorten it"
        )
    return ids
