"""A method as a table names it: presets and, behind them, settings, as in `gear bits=4`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvc.backends.base import Engine
from kvc.errors import ConfigError, KVCError
from kvc.methods import PRESETS, Method, parse


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of a table.

    Attributes:
        name: What `parse` takes: presets joined by `+`, or a profile.
        settings: What it takes beside that, by `section.key`.
        method: What came of it.
    """

    name: str
    settings: Mapping[str, str]
    method: Method

    @property
    def label(self) -> str:
        """Short and unique, and what `read_choice` takes; a lone section goes without saying."""
        alone = len(self.method.parts) == 1
        words = [
            f"{key.rpartition('.')[2] if alone else key}={value}"
            for key, value in self.settings.items()
        ]
        return shlex.join([self.name, *words]) if words else self.name


def read_choice(text: str, common: Mapping[str, str] | None = None) -> Choice:
    """The method that words as in `gear bits=4` mean; what holds a space is quoted as in a shell.

    Args:
        text: Presets joined by `+`, and settings.
        common: Settings of all methods that have their section; words of `text` come first.

    Raises:
        ConfigError: If it is no method, or a setting is none of its own.
    """
    try:
        name, *words = shlex.split(text)
    except ValueError as error:
        why = str(error) if text.strip() else "nothing"
        raise ConfigError(f"--method {text!r}: expected a method such as gear, got {why}") from None
    settings: dict[str, str] = {}
    sections = {part.section for part in parse(name).parts}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):  # a value may be empty, as in `rotate=`
            raise ConfigError(
                f"--method {text!r}: expected settings such as bits=4 behind the name, got {word!r}"
            )
        key = _full(key, sections)
        if key in settings:
            raise ConfigError(f"--method {text!r}: {key} is given twice")
        settings[key] = value
    for key, value in (common or {}).items():
        if (key := _full(key, sections)).partition(".")[0] in sections:
            settings.setdefault(key, value)
    return Choice(name, settings, parse(name, settings))


def _full(key: str, sections: set[str]) -> str:
    """A setting's key with its section, where that goes without saying."""
    return key if "." in key or len(sections) != 1 else f"{next(iter(sections))}.{key}"


def read_choices(texts: Sequence[str], common: Mapping[str, str]) -> list[Choice]:
    """All methods of a run: the full cache first, since it is what others are compared with.

    Raises:
        ConfigError: If one is no method, comes twice, or nobody takes a common setting.
    """
    expected = "--set: expected section.key such as gear.bits of a --method"
    if len(texts) > 1 and (bare := [key for key in common if "." not in key]):
        raise ConfigError(f"{expected}, got {bare[0]!r} for several of them")
    found = [read_choice(text, common) for text in texts]
    taken = {key for choice in found for key in choice.settings}
    taken |= {key.partition(".")[2] for key in taken}
    if lost := [key for key in common if key not in taken]:
        raise ConfigError(f"{expected}, got {lost[0]!r}")
    none = read_choice("none")
    labels = [none.label]
    for choice in (found := [choice for choice in found if choice != none]):
        if choice.label in labels:
            raise ConfigError(f"--method {choice.label}: it is given twice")
        labels.append(choice.label)
    return [none, *found]


def allowed_presets(
    engine: Engine, common: Mapping[str, str]
) -> tuple[list[Choice], dict[str, str]]:
    """Every preset that this model takes, and why others are left out.

    Raises:
        ConfigError: If nobody takes a common setting.
    """
    left_out: dict[str, str] = {}
    names = []
    for name in PRESETS:
        try:
            engine.make_cache(read_choice(name, common).method)
        except KVCError as error:
            left_out[name] = str(error)
        else:
            names.append(name)
    return read_choices(names, common), left_out
