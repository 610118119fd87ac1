"""A method as a value: at most one filler for each seam, named by presets, joined with `+`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvc.errors import ConfigError
from kvc.methods.gear import Gear
from kvc.methods.kvsharer import KVSharer

Part = Gear | KVSharer
SEAMS: dict[type[Part], str] = {KVSharer: "layout", Gear: "codec"}

# name: (class, its section in settings, parameters)
PRESETS: dict[str, tuple[type[Part] | None, str, dict[str, Any]]] = {
    "none": (None, "none", {}),
    "kivi": (Gear, "gear", {"prefill_rank": 0, "rank": 0, "outliers": 0.0}),
    "gear-l": (Gear, "gear", {"outliers": 0.0}),
    "gear-s": (Gear, "gear", {"prefill_rank": 0, "rank": 0}),
    "gear": (Gear, "gear", {}),
    "kvsharer": (KVSharer, "kvsharer", {}),
}


@dataclass(frozen=True, slots=True)
class Method:
    """What fills each seam; `name` is as the user wrote it."""

    name: str
    layout: KVSharer | None = None
    codec: Gear | None = None

    @property
    def needs_queries(self) -> bool:
        """Whether the method watches the queries; such a one needs a model that takes handles."""
        return False

    def owners(self, n_layers: int) -> tuple[int, ...]:
        """The layer whose cache each layer reads."""
        return self.layout.owners(n_layers) if self.layout else tuple(range(n_layers))

    def sharers(self, n_layers: int) -> tuple[int, ...]:
        """The layers that read another layer's cache."""
        return tuple(i for i, owner in enumerate(self.owners(n_layers)) if owner != i)


def _near(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names)}"


def _value(part: type[Part], section: str, key: str, value: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(part)}
    if key not in fields:
        raise ConfigError(f"{section}: unknown parameter {key!r}; {_near(key, fields)}")
    kind: type[Any] = type(fields[key].default)
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{section}: {key} must be {kind.__name__}, got {value!r}") from None


def parse(text: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method that a name such as `gear` or `kvsharer+gear` means.

    Settings are by `section.key`, or by `key` alone where there is one section.

    Raises:
        ConfigError: an unknown name or parameter, a value out of range, two methods on one seam.
    """
    filled: dict[str, tuple[str, Part]] = {}
    left = dict(settings or {})
    names = [name.strip() for name in text.split("+")]
    sections = []
    for name in names:
        if name not in PRESETS:
            raise ConfigError(f"unknown method {name!r}; {_near(name, PRESETS)}")
        sections.append(PRESETS[name][1])
    for name in names:
        part, section, params = PRESETS[name]
        if part is None:
            continue
        given = {}
        for key in list(left):
            head, dot, tail = key.rpartition(".")
            if head == section or (not dot and len(sections) == 1):
                given[tail] = _value(part, section, tail, left.pop(key))
        seam = SEAMS[part]
        if seam in filled:
            raise ConfigError(f"{filled[seam][0]} and {name} both fill the seam {seam}; take one")
        filled[seam] = (name, part(**{**params, **given}))
    if left:
        key = next(iter(left))
        keys = [f"{s}.…" for s in dict.fromkeys(sections)]
        raise ConfigError(
            f"{text}: no method takes the setting {key!r}; expected {', '.join(keys)}"
        )
    parts: dict[str, Any] = {seam: part for seam, (_, part) in filled.items()}
    return Method("+".join(names), **parts)
