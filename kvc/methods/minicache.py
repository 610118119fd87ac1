"""MiniCache: two adjacent layers share one direction and keep a norm each.

Liu et al. 2024, arXiv:2405.14366.

Departures: what merges worst is retained, not what merges best (see `kvc.ops.merge`); retention is
decided for each row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from kvc.errors import ConfigError
from kvc.methods.part import Part
from kvc.ops.merge import Granularity, How, Rule

Policy = Literal["frozen", "keep", "buffer"]


@dataclass(frozen=True, slots=True)
class MiniCache(Part):
    """The pairs of layers, and how they are merged; the defaults are the paper's."""

    seam: ClassVar[str] = "layout"
    section: ClassVar[str] = "minicache"

    start: int = -1  # first merged layer; -1 for the middle, L / 2
    t: float = 0.6  # weight of the deeper layer's direction
    gamma: float = 0.05  # how much is retained
    how: How = "slerp"
    granularity: Granularity = "head"  # one direction for each head, or for all heads together
    retention: Rule = "angle"
    always_keep: int = 1  # first tokens that are retained whatever their angle
    decode_policy: str = ""  # frozen, keep or buffer; as it stands frozen, with a codec buffer
    buffer: int = 64  # tokens that `buffer` merges together, where no codec says it

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ConfigError: naming the field, what it may be and what came.
        """
        for name in ("t", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"minicache: {name} must be in 0 to 1, got {getattr(self, name)}")
        choices = {
            "how": get_args(How),
            "granularity": get_args(Granularity),
            "retention": get_args(Rule),
            "decode_policy": ("", *get_args(Policy)),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"minicache: {name} must be {', '.join(filter(None, known))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name, least in (("start", -1), ("always_keep", 0), ("buffer", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"minicache: {name} must be {least} or more, got {getattr(self, name)}"
                )

    def conflict(self, other: Part) -> str | None:
        """Why this cannot work with another part; None if it can."""
        if other.seam == "memory":
            return (
                "the two layers of a pair share their tokens, and an evicting policy would drop "
                "and reuse them one by one, per layer and head; evict or merge, not both"
            )
        if getattr(other, "value_window", "") == "sliding":
            return "directions are merged in whole blocks; set gear.value_window=chunk"
        if other.seam == "codec" and self.decode_policy == "frozen":
            return (
                "coded directions are merged in whole blocks, not one by one; "
                "set minicache.decode_policy=buffer or keep"
            )
        return None

    def policy(self, coded: bool) -> str:
        """What becomes of tokens after the prompt: frozen, keep or buffer."""
        return self.decode_policy or ("buffer" if coded else "frozen")

    def pairs(self, n_layers: int) -> tuple[tuple[int, int], ...]:
        """Merged layers (S, S + 1), (S + 2, S + 3), ...; a last odd one stays alone.

        Raises:
            ConfigError: if `start` is no layer of the model.
        """
        start = n_layers // 2 if self.start < 0 else self.start
        if start >= n_layers:
            raise ConfigError(
                f"minicache: start must be below the model's {n_layers} layers, got {start}"
            )
        return tuple((a, a + 1) for a in range(start, n_layers - 1, 2))
