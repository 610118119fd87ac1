"""Methods by name: presets, several of them joined by `+`, and their parameters as text."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from kvc.errors import ConfigError
from kvc.files import PROFILE, read_profile
from kvc.hub import locate
from kvc.methods.base import Method, clash
from kvc.methods.gear import Gear
from kvc.methods.kvsharer import KVSharer
from kvc.methods.less import Less
from kvc.methods.minicache import MiniCache
from kvc.methods.part import Part

_PLAIN = {"prefill_rank": 0, "rank": 0, "outliers": 0.0}
_TWO_SIDED = {"rotate": "hadamard", "scales": "dual", "buffer": 128, "sink": 64, "window": 128}

PRESETS: dict[str, tuple[type[Part] | None, dict[str, Any]]] = {
    "none": (None, {}),
    "kivi": (Gear, _PLAIN),
    "kcvt": (Gear, {**_PLAIN, "backbone": "kcvt", "bits": 4}),
    "token": (Gear, {**_PLAIN, "backbone": "token", "bits": 4}),
    "gear-l": (Gear, {"outliers": 0.0}),
    "gear-s": (Gear, {"prefill_rank": 0, "rank": 0}),
    "gear": (Gear, {}),
    "gear2": (
        Gear,
        {**_TWO_SIDED, "k_bits": 4, "v_bits": 2, "prefill_rank": 2, "rank": 2, "outliers": 0.0},
    ),
    "streaming": (Less, {"policy": "sink", "heavy": 4, "recent": 0.049}),
    "h2o": (Less, {}),
    "tova": (Less, {"policy": "tova", "heavy": 0.05, "recent": 0}),
    "less": (Less, {"kernels": None}),
    "minicache": (MiniCache, {}),
    "kvsharer": (KVSharer, {}),
}


def parse(text: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method that a name such as `gear` or `kvsharer+gear` means, or a profile, `@FILE`.

    Settings are by `section.key`, or by `key` alone where there is one section. They come before
    those of a profile.

    Raises:
        ConfigError: an unknown name or parameter, a value out of range, two methods on one seam,
            two that make no sense together.
        ArtifactError: a profile that is missing or damaged; another model refuses it later.
    """
    if text.startswith("@"):
        return _tuned(text, settings or {})
    left = dict(settings or {})
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in PRESETS:
            raise ConfigError(f"unknown method {name!r}; {_near(name, PRESETS)}")
    method = Method(names[0])
    for name in names:
        kind, params = PRESETS[name]
        if kind is None:
            continue
        if getattr(method, kind.seam) is not None:
            raise clash(method.name, name, kind.seam)
        given = {}
        for key in list(left):
            head, dot, tail = key.rpartition(".")
            if head == kind.section or (not dot and len(names) == 1):
                given[tail] = _value(kind, tail, left.pop(key))
        part = kind(**{**params, **kind.implied(given), **given})
        alone = Method(name, **{part.seam: part})  # type: ignore[arg-type]
        method = alone if not method.parts else method + alone
    if left:
        key = next(iter(left))
        sections = (kind.section for kind, _ in map(PRESETS.__getitem__, names) if kind)
        expected = ", ".join(f"{section}.…" for section in dict.fromkeys(sections)) or "none"
        raise ConfigError(f"{text}: no method takes the setting {key!r}; expected {expected}")
    return dataclasses.replace(method, name="+".join(names))


def _tuned(text: str, settings: Mapping[str, Any]) -> Method:
    """What a profile says, for its model alone."""
    profile = read_profile(locate(text[1:], (PROFILE,)))
    sections = {part.section for part in parse(profile.method).parts}
    alone = next(iter(sections)) if len(sections) == 1 else ""
    given = {f"{alone}.{k}" if alone and "." not in k else k: v for k, v in settings.items()}
    method = parse(profile.method, {**profile.settings, **given})
    return dataclasses.replace(method, name=text, model=profile.model)


def _near(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names)}"


def _value(kind: type[Part], key: str, value: Any) -> Any:
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if key not in defaults:
        raise ConfigError(f"{kind.section}: unknown parameter {key!r}; {_near(key, defaults)}")
    target: type[Any] = type(defaults[key])
    if target is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{kind.section}: {key} must be true or false, got {value!r}")
        return value.lower() == "true"
    percent = target is float and isinstance(value, str) and value.endswith("%")
    try:
        parsed = float(value[:-1]) / 100 if percent else target(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{kind.section}: {key} must be {target.__name__}, got {value!r}"
        ) from None
    if percent and kind is Less and parsed >= 1:  # there 1 is one token
        raise ConfigError(f"less: {key} must be below 100%, got {value!r}")
    return parsed
