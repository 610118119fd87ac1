"""LESS: a policy that keeps few tokens, and a constant-size state of those that go.

Dong et al. 2024, arXiv:2402.09398. Without its learned maps it is the bare policy: H2O
(arXiv:2306.14048), sinks and recent tokens (StreamingLLM, arXiv:2309.17453), TOVA
(arXiv:2401.06104).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from kvc.backends.base import ModelShape
from kvc.errors import ArtifactError, ConfigError
from kvc.files import check_model, read_kernels
from kvc.methods.part import Part
from kvc.ops.evict import Kernels

Policy = Literal["h2o", "sink", "tova"]


@dataclass(frozen=True, slots=True)
class Less(Part):
    """How many tokens stay, and who decides. Budgets below 1 are fractions of the context."""

    seam: ClassVar[str] = "memory"
    section: ClassVar[str] = "less"

    policy: Policy = "h2o"
    heavy: float = 0.025  # heavy hitters, or the first tokens, or all that TOVA keeps
    recent: float = 0.025  # newest tokens, which always stay
    kernels: str | None = ""  # file of learned maps; "" for the bare policy; None asks for one
    normalize: bool = False  # H2O: mass divided by the number of queries that saw the token

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ConfigError: naming the field, what it may be and what came.
        """
        if self.policy not in get_args(Policy):
            known = ", ".join(get_args(Policy))
            raise ConfigError(f"less: policy must be one of {known}, got {self.policy!r}")
        for name in ("heavy", "recent"):
            value = getattr(self, name)
            if value < 0 or (value >= 1 and value != int(value)):
                raise ConfigError(
                    f"less: {name} must be a number of tokens, or below 1 a fraction of the "
                    f"context, got {value}"
                )
        if self.heavy + self.recent == 0:
            raise ConfigError("less: heavy and recent are both 0; keep at least one token")
        if self.policy == "tova" and self.recent:
            raise ConfigError(
                f"less: tova protects no window, so recent must be 0, got {self.recent}; "
                "give the whole budget to heavy"
            )
        if self.kernels is None:
            raise ConfigError(
                "less: expected the learned maps of this model, got none; set "
                "less.kernels=FILE.safetensors, or take h2o, which is less without the state"
            )

    def conflict(self, other: Part) -> str | None:
        """Why this cannot work with another part; None if it can."""
        if other.seam != "codec":
            return None
        plain = ("prefill_rank", "rank", "outliers", "window", "sink", "rotate", "scales")
        if getattr(other, "backbone", "") != "token" or any(getattr(other, f) for f in plain):
            return (
                "evicted tokens leave holes that no block of tokens may have, so kept tokens are "
                "coded one by one; take the preset token, e.g. h2o+token"
            )
        return None

    def check(self, shape: ModelShape) -> Less:
        """The same with budgets in tokens.

        Raises:
            ConfigError: if a fraction is given and the context's length is not known.
            ArtifactError: if the maps are unreadable, or another model's.
        """
        heavy, recent = (self._tokens(name, shape) for name in ("heavy", "recent"))
        if self.kernels:
            check_model(read_kernels(self.kernels).model, shape.fingerprint, self.kernels)
        return replace(self, heavy=heavy, recent=recent)

    def _tokens(self, name: str, shape: ModelShape) -> int:
        """A budget in tokens."""
        value: float = getattr(self, name)
        if not 0 < value < 1:
            return int(value)
        if shape.context_length is None:
            raise ConfigError(
                f"less: {name} is the fraction {value} of a context whose length this model's "
                f"config does not say; set less.{name} to a number of tokens"
            )
        return int(value * shape.context_length)

    def maps(self, numbers: Sequence[int]) -> dict[int, Kernels]:
        """The learned maps of layers by their place in `numbers`, the model's numbers of them.

        Raises:
            ArtifactError: if the file cannot be read, or lacks one of the layers.
        """
        if not self.kernels:
            return {}
        found = read_kernels(self.kernels).layers
        if missing := [n for n in numbers if n not in found]:
            raise ArtifactError(f"{self.kernels}: expected maps of layer {missing[0]}, got none")
        return {place: found[number] for place, number in enumerate(numbers)}
