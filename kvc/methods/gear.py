"""GEAR: quantization, low rank and sparsity together.

Kang et al. 2024, arXiv:2403.05527; its backbone is KIVI, Liu et al. 2024, arXiv:2402.02750.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvc.errors import ConfigError
from kvc.ops.quant import Backbone, Role


@dataclass(frozen=True, slots=True)
class Gear:
    """The codec's parameters; the defaults are those of the authors' scripts."""

    bits: int = 2  # of keys and values alike
    k_bits: int = 0  # of keys; 0 as `bits`
    v_bits: int = 0  # of values; 0 as `bits`
    backbone: Backbone = "kivi"
    group_size: int = 64
    buffer: int = 64  # tokens that are gathered and coded together
    prefill_rank: int = 4  # of the low-rank fit of the prompt, for each head; 0 for none
    rank: int = 2  # of the fit of a block during decoding
    outliers: float = 0.02  # fraction kept exactly, half from each tail
    n_iter: int = 3  # power iterations
    sink: int = 0  # first tokens that stay as they came
    window: int = 0  # newest tokens that stay as they came
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
        if self.backbone not in ("kivi", "kcvt", "token"):
            raise ConfigError(f"gear: backbone must be kivi, kcvt or token, got {self.backbone!r}")
        for name in ("group_size", "buffer", "n_iter"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gear: {name} must be 1 or more, got {getattr(self, name)}")
        for name in ("prefill_rank", "rank", "sink", "window", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"gear: {name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.outliers <= 1:
            raise ConfigError(f"gear: outliers must be in 0 to 1, got {self.outliers}")
        if self.backbone == "kivi" and self.buffer % self.group_size:
            raise ConfigError(
                f"gear: buffer must be a multiple of group_size with the kivi backbone, got "
                f"{self.buffer} and {self.group_size}; set both, e.g. gear.group_size=32"
            )

    def check(self, head_dim: int) -> None:
        """That the groups fit a model.

        Raises:
            ConfigError: if `group_size` does not divide `head_dim`.
        """
        if self.backbone != "kcvt" and head_dim % self.group_size:
            raise ConfigError(
                f"gear: group_size must divide the model's head_dim {head_dim}, got "
                f"{self.group_size}; set gear.group_size={head_dim} or a divisor of it"
            )

    def bits_of(self, role: Role) -> int:
        """Bits of a code of keys (`k`) or values (`v`)."""
        return (self.k_bits if role == "k" else self.v_bits) or self.bits
