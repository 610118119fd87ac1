"""GEAR: quantization, low rank and sparsity together.

Kang et al. 2024, arXiv:2403.05527; its backbone is KIVI, Liu et al. 2024, arXiv:2402.02750.
Rotation is SAW-INT4's (2026, arXiv:2604.19157), two-sided scales are KVarN's (arXiv:2606.03458).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from kvc.errors import ConfigError
from kvc.methods.part import Part
from kvc.ops.codec import Spec
from kvc.ops.quant import Backbone, Role

CHOICES = {
    "backbone": ("kivi", "kcvt", "token"),
    "value_window": ("chunk", "sliding"),
    "rotate": ("", "hadamard"),
    "scales": ("", "dual"),
    "scale_dtype": ("", "float16", "bfloat16", "float32"),
    "zero_dtype": ("", "float16", "bfloat16", "float32"),
}
LAYER_BITS = re.compile(r"(\d+)(?:-(\d+))?:([248])(?:/([248]))?")
# what a sliding value window, which codes one token at a time, cannot be joined with
PLAIN = {
    "backbone": "kivi",
    "prefill_rank": 0,
    "rank": 0,
    "outliers": 0,
    "window": 0,
    "rotate": "",
    "scales": "",
}


@dataclass(frozen=True, slots=True)
class Gear(Part):
    """The codec's parameters; the defaults are those of the authors' scripts."""

    seam: ClassVar[str] = "codec"
    section: ClassVar[str] = "gear"

    bits: int = 2  # of keys and values alike
    k_bits: int = 0  # of keys; 0 as `bits`
    v_bits: int = 0  # of values; 0 as `bits`
    # of keys and values of some layers, by the model's numbers: 0-3:8/4,7:4
    layer_bits: str = ""
    backbone: Backbone = "kivi"
    group_size: int = 64  # of keys and values alike
    k_group: int = 0  # of keys; 0 as `group_size`
    v_group: int = 0  # of values; 0 as `group_size`
    buffer: int = 64  # tokens that are gathered and coded together
    prefill_rank: int = 4  # of the low-rank fit of the prompt, for each head; 0 for none
    rank: int = 2  # of the fit of a block during decoding
    outliers: float = 0.02  # fraction kept exactly, half from each tail
    n_iter: int = 3  # power iterations
    sink: int = 0  # first tokens that stay as they came
    window: int = 0  # newest tokens that stay as they came
    value_window: Literal["chunk", "sliding"] = "chunk"  # values coded by the buffer or singly
    rotate: Literal["", "hadamard"] = ""  # of the channels, before anything else
    scales: Literal["", "dual"] = ""  # dual: per token and channel of a buffer, not in groups
    scale_dtype: str = ""  # of steps and factors; empty as the cache
    zero_dtype: str = ""  # of the groups' lowest values; empty as the cache
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ConfigError: naming the field, what it may be and what came.
        """
        for name in ("bits", "k_bits", "v_bits"):
            value = getattr(self, name)
            if value not in (2, 4, 8) and not (name != "bits" and value == 0):
                raise ConfigError(f"gear: {name} must be 2, 4 or 8, got {value}")
        self.bits_by_layer()
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                *most, last = (choice or "empty" for choice in known)
                raise ConfigError(
                    f"gear: {name} must be {', '.join(most)} or {last}, got {getattr(self, name)!r}"
                )
        for name in ("group_size", "buffer", "n_iter"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gear: {name} must be 1 or more, got {getattr(self, name)}")
        for name in ("k_group", "v_group", "prefill_rank", "rank", "sink", "window", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"gear: {name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.outliers <= 1:
            raise ConfigError(f"gear: outliers must be in 0 to 1, got {self.outliers}")
        group, name = self.group_of("k"), self._group_name("k")
        if self.backbone == "kivi" and self.scales == "" and self.buffer % group:
            raise ConfigError(
                f"gear: buffer must be a multiple of {name} with the kivi backbone, got "
                f"{self.buffer} and {group}; set gear.buffer={math.lcm(self.buffer, group)} or "
                f"gear.{name}={math.gcd(self.buffer, group)}"
            )
        for name, plain in PLAIN.items() if self.value_window == "sliding" else ():
            if getattr(self, name) != plain:
                raise ConfigError(
                    f"gear: value_window=sliding codes one value at a time and goes with plain "
                    f"kivi alone, got {name}={getattr(self, name)}; "
                    f"set gear.{name}={plain} or gear.value_window=chunk"
                )

    def check(self, head_dim: int) -> None:
        """That the groups fit a model.

        Raises:
            ConfigError: if a group of channels does not divide `head_dim`.
        """
        if self.backbone == "kcvt" or self.scales == "dual":
            return
        roles: tuple[Role, ...] = ("v",) if self.backbone == "kivi" else ("k", "v")
        for role in roles:
            group, name = self.group_of(role), self._group_name(role)
            if head_dim % group:
                raise ConfigError(
                    f"gear: {name} must divide the model's head_dim {head_dim}, got {group}; "
                    f"set gear.{name}={math.gcd(group, head_dim)} or another divisor of it"
                )

    def bits_by_layer(self) -> dict[int, tuple[int, int]]:
        """Bits of keys and of values in the layers that `layer_bits` names.

        Raises:
            ConfigError: if it is no such text, or names a layer twice.
        """
        found: dict[int, tuple[int, int]] = {}
        for entry in self.layer_bits.split(",") if self.layer_bits else ():
            match = LAYER_BITS.fullmatch(entry.strip())
            if match is None:
                raise ConfigError(
                    "gear: layer_bits must be layers with the bits, 2, 4 or 8, of keys and values, "
                    f"such as 0-3:8/4,7:4, got {entry!r}"
                )
            first, last, k_bits, v_bits = match.groups()
            for layer in range(int(first), int(last or first) + 1):
                if layer in found:
                    raise ConfigError(f"gear: layer_bits must name a layer once, got {layer} twice")
                found[layer] = int(k_bits), int(v_bits or k_bits)
        return found

    def of(self, layer: int) -> Gear:
        """The codec of a layer, by the model's number, with its own bits."""
        k_bits, v_bits = self.bits_by_layer().get(layer, (self.k_bits, self.v_bits))
        return replace(self, k_bits=k_bits, v_bits=v_bits, layer_bits="")

    def check_layers(self, numbers: Sequence[int]) -> None:
        """That the layers that have bits of their own are among those that keep all tokens.

        Raises:
            ConfigError: if one is not.
        """
        if others := self.bits_by_layer().keys() - {*numbers}:
            raise ConfigError(
                f"gear: layer_bits must name layers that keep all tokens "
                f"({', '.join(map(str, numbers))}), got {min(others)}"
            )

    def bits_of(self, role: Role) -> int:
        """Bits of a code of keys (`k`) or values (`v`)."""
        return (self.k_bits if role == "k" else self.v_bits) or self.bits

    def group_of(self, role: Role) -> int:
        """Tokens or channels that share a step, of keys (`k`) or values (`v`)."""
        return (self.k_group if role == "k" else self.v_group) or self.group_size

    def _group_name(self, role: Role) -> str:
        own = f"{role}_group"
        return own if getattr(self, own) else "group_size"

    def spec(self, role: Role, n: int, head_dim: int) -> Spec:
        """How a block of `n` tokens is coded."""
        return Spec(
            role,
            self.bits_of(role),
            self.backbone,
            self.group_of(role),
            n,
            head_dim,
            rotate=self.rotate,
            scales=self.scales,
            tile=self.buffer,
            scale_dtype=self.scale_dtype,
            zero_dtype=self.zero_dtype,
        )
