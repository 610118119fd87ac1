"""LESS: a policy that keeps few tokens, and a constant-size state of those that go.

Dong et al. 2024, arXiv:2402.09398. Without its learned maps it is the bare policy: H2O
(arXiv:2306.14048), sinks and recent tokens (StreamingLLM, arXiv:2309.17453), TOVA
(arXiv:2401.06104).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import inf
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

from kvc.backends.base import ModelShape
from kvc.errors import ArtifactError, ConfigError
from kvc.files import KERNELS, bundled_kernels, check_model, map_text, read_kernels
from kvc.hub import locate
from kvc.methods.part import Part
from kvc.ops.evict import Kernels

Policy = Literal["h2o", "sink", "tova"]
SINKS = 4  # first tokens that sink + recent keeps
_ALONE: Mapping[int, int] = MappingProxyType({})  # no layer reads another one's cache


@dataclass(frozen=True, slots=True)
class Less(Part):
    """How many tokens stay, and who decides. Budgets below 1 are fractions of the context."""

    seam: ClassVar[str] = "memory"
    section: ClassVar[str] = "less"

    policy: Policy = "h2o"
    heavy: float = 0.025  # heavy hitters, or the first tokens, or all that TOVA keeps
    recent: float = 0.025  # newest tokens, which always stay
    # learned kernels: a file, or where the hub has one; "" for the bare policy; None for those of
    # the bundled ones that are nearest
    kernels: str | None = ""
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
            if not (0 <= value < 1 or (1 <= value < inf and value == int(value))):
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

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Named kernels bring the policy and the budget of their training, where none is set.

        Raises:
            ArtifactError: if the kernels cannot be had, or are damaged.
        """
        known = ("policy", "heavy", "recent")
        if not given.get("kernels") or {*known} & given.keys():
            return {}
        config = read_kernels(locate(given["kernels"], (KERNELS,))).config
        return {key: config[key] for key in known if key in config}

    @classmethod
    def of_budget(cls, policy: Policy, tokens: int) -> Less:
        """A policy that keeps so many tokens, split as the paper's authors do.

        H2O: half of them recent; sink: up to four first ones, the rest recent; TOVA: no window.
        """
        if policy == "tova":
            return cls(policy, heavy=tokens, recent=0)
        heavy = tokens // 2 if policy == "h2o" else max(0, min(SINKS, tokens - 1))
        return cls(policy, heavy=heavy, recent=tokens - heavy)

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

    def check(self, shape: ModelShape, sharers: Mapping[int, int] = _ALONE) -> Less:
        """The same with budgets in tokens, and the path of its kernels.

        Args:
            shape: Of the model.
            sharers: The owners of layers that read another layer's cache. Kernels know the keys of
                the cache that their layer read in training, and serve no other.

        Raises:
            ConfigError: if a fraction is given and the context's length is not known; if nothing
                would be kept; if no kernels are named and none are bundled.
            ArtifactError: if the kernels are unreadable, another model's, or another map's.
        """
        heavy, recent = (self._tokens(name, shape) for name in ("heavy", "recent"))
        if not heavy + recent:
            raise ConfigError(
                f"less: heavy {self.heavy} and recent {self.recent} of a context of "
                f"{shape.context_length} tokens are below one token; keep at least one"
            )
        kernels = self.kernels
        if kernels is None:
            kernels = self._bundled(shape, sharers, heavy + recent)
        elif kernels:
            path = locate(kernels, (KERNELS,))
            file = read_kernels(path)
            check_model(file.model, shape.fingerprint, kernels)
            if file.sharers != sharers:
                raise ArtifactError(
                    f"{kernels}: expected kernels trained under the method's sharing map, "
                    f"{map_text(sharers) or 'none'}, got ones trained under "
                    f"{map_text(file.sharers) or 'none'}; kernels serve the map of their training"
                )
            kernels = str(path)
        return replace(self, heavy=heavy, recent=recent, kernels=kernels)

    def _bundled(self, shape: ModelShape, sharers: Mapping[int, int], budget: int) -> str:
        """The path of the bundled kernels for a model, this policy and the nearest budget.

        Nearest by ratio; of two the smaller budget.
        """
        budgets = {
            path: file.config["heavy"] + file.config["recent"]
            for path, file in bundled_kernels(shape.fingerprint).items()
            if file.config.get("policy") == self.policy and file.sharers == sharers
        }
        if not budgets:
            shared = map_text(sharers)
            under, its = (f" and the map {shared}", f" --map {shared}") if sharers else ("", "")
            raise ConfigError(
                f"less: expected kernels for this model, {shape.fingerprint}, policy {self.policy}"
                f"{under}, found none; make them with kvc train less --model MODEL --text FILE"
                f"{its} and set less.kernels=FILE.safetensors, or take h2o, which is less without "
                "the state"
            )
        off = {path: max(n, budget) / min(n, budget) for path, n in budgets.items()}
        return min(budgets, key=lambda path: (off[path], budgets[path]))

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
        return int(Decimal(str(value)) * shape.context_length)  # 0.29 of 100 is 29

    def maps(self, numbers: Sequence[int]) -> dict[int, Kernels]:
        """The learned kernels of layers by their place in `numbers`, the model's numbers of them.

        Raises:
            ConfigError: if they were not looked for yet, which `check` does.
            ArtifactError: if the file cannot be read, or lacks one of the layers.
        """
        if self.kernels is None:
            raise ConfigError("less: expected a method checked against a model, got one without")
        if not self.kernels:
            return {}
        found = read_kernels(self.kernels).layers
        if missing := [n for n in numbers if n not in found]:
            raise ArtifactError(f"{self.kernels}: expected kernels of layer {missing[0]}, got none")
        return {place: found[number] for place, number in enumerate(numbers)}
