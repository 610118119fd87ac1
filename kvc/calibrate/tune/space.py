"""What is searched: kinds of codes, and what each of them may keep exact.

A kind is a preset with parameters of its own; bits come from the budget. It begins with few exact
tokens, since bits are worth more at most budgets; how many exact tokens are best is tried for the
kinds that are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvc.backends.base import ModelShape
from kvc.calibrate.tune.allocate import Bits, settings_of
from kvc.errors import ConfigError, KVCError
from kvc.measure.choice import Choice
from kvc.methods import PRESETS, Gear, Less, Method, parse

Settings = Mapping[str, str]

KINDS: tuple[tuple[str, Settings], ...] = (
    ("kivi", {}),
    ("kivi", {"k_group": "32", "v_group": "32"}),
    ("kivi", {"k_group": "128", "buffer": "128"}),
    ("kcvt", {}),
    ("kcvt", {"rotate": "hadamard"}),
    ("token", {}),
    ("token", {"rotate": "hadamard"}),
    ("gear-l", {"prefill_rank": "2"}),
    ("gear-s", {"outliers": "0.01"}),
    ("gear", {"prefill_rank": "2", "outliers": "0.01"}),
    ("gear2", {}),
    ("gear2", {"prefill_rank": "0", "rank": "0"}),
)
SINK, WINDOW = 4, 0  # exact tokens of a kind, first and newest
# Others that are tried: sinks and window.
EXACT = ((0, 0), (32, 0), (4, 32), (4, 128), (64, 128))
LAYOUTS = ("", "kvsharer")
GROUP = 64  # channels or tokens that share a step, where a preset says nothing else


@dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """A way to code, without the bits: presets and settings by `section.key`.

    Attributes:
        name: What `parse` takes, of which the last preset is a codec.
        settings: Its own.
        root: The kind that it varies; its losses are taken to be that one's.
    """

    name: str
    settings: Settings
    root: Kind | None = None

    @property
    def layout(self) -> str:
        """What stands before the codec."""
        return self.name.rpartition("+")[0]

    def with_bits(self, bits: Bits) -> Choice:
        """It as a method with these bits."""
        return choice_of(self.name, {**self.settings, **settings_of(bits)})

    def uniform(self, k_bits: int, v_bits: int) -> Choice:
        """It as a method with the same bits in all layers."""
        own = {"gear.k_bits": str(k_bits), "gear.v_bits": str(v_bits)}
        return choice_of(self.name, {**self.settings, **own})

    @property
    def codec(self) -> Gear:
        """Its codec."""
        codec = parse(self.name, self.settings).codec
        assert codec is not None
        return codec

    def keeping(self, **settings: str) -> Kind:
        """The same with other settings of the codec; an empty one is left to the preset."""
        found = {**self.settings, **{f"gear.{key}": value for key, value in settings.items()}}
        found = {key: value for key, value in found.items() if value}
        return Kind(self.name, found, self.root or self)


def choice_of(name: str, settings: Settings) -> Choice:
    """A method by name and settings."""
    return Choice(name, settings, parse(name, settings))


def kinds(shape: ModelShape, presets: Sequence[str], layout: str = "") -> list[Kind]:
    """The kinds of codes that these presets allow and the model takes.

    Args:
        shape: Of the model.
        presets: Names that may be used.
        layout: What stands before a codec: nothing, or `kvsharer`.
    """
    found = []
    for name, own in KINDS:
        settings = {**own, "sink": str(SINK), "window": str(WINDOW)}
        if shape.head_dim % GROUP and "k_group" not in own:
            settings["group_size"] = str(math.gcd(GROUP, shape.head_dim))
        if shape.dtype_bytes == 4:  # a quarter of the bytes is scales, else
            settings |= {"scale_dtype": "float16", "zero_dtype": "float16"}
        settings = {f"gear.{key}": value for key, value in settings.items()}
        kind = Kind(f"{layout}+{name}" if layout else name, settings)
        if name in presets and takes(shape, parse(kind.name, kind.settings)):
            found.append(kind)
    return found


def exacts(kind: Kind, shape: ModelShape) -> Iterator[Kind]:
    """The same kind with other exact tokens, and with scales as fine as the cache's numbers."""
    for sink, window in EXACT:
        yield kind.keeping(sink=str(sink), window=str(window))
    if shape.dtype_bytes == 4:
        yield kind.keeping(scale_dtype="", zero_dtype="")


def takes(shape: ModelShape, method: Method) -> bool:
    """Whether a model takes a method."""
    try:
        method.check(shape)
    except KVCError:
        return False
    return True


def read_methods(text: str | None) -> tuple[str, ...]:
    """The presets that a search may use: those of a list, or all that keep every token.

    Raises:
        ConfigError: If one is none.
    """
    every = tuple(name for name in PRESETS if name != "none")
    if text is None:
        return tuple(name for name in every if PRESETS[name][0] is not Less)
    wanted = tuple(name.strip() for name in text.split(","))
    for name in wanted:
        if name not in every:
            raise ConfigError(f"--methods: expected some of {','.join(every)}, got {name!r}")
    return wanted
