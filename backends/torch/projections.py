"""Key and value projections that need not run: a sharing layer reads another layer's cache.

The projections stay where they are in the model, under their names; a `Gate` stands before each.
While a cache is used in which the layer only reads, the gate answers with zeros that take no
memory, and the weights rest in host memory. With any other cache the weights return.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from kvc.errors import ConfigError


class Gate:
    """Takes the place of a projection's `forward`."""

    def __init__(self, linear: Any, layer: int) -> None:
        self.linear, self.layer = linear, layer
        self.forward: Callable[[torch.Tensor], torch.Tensor] = linear.forward
        self.skips = self.dropped = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight
        if self.skips:
            if not self.dropped and weight.device.type != "cpu":
                weight.data = weight.data.cpu()
            return x.new_zeros(1).expand(*x.shape[:-1], self.linear.out_features)
        if self.dropped:
            raise ConfigError(
                f"kvc: the key and value weights of layer {self.layer} were freed for a sharing "
                "method; load the model again to use it without"
            )
        if weight.device != x.device:
            weight.data = weight.data.to(x.device)
        return self.forward(x)

    def drop(self) -> None:
        """Free the weights for good; the module keeps their shape."""
        weight = self.linear.weight
        weight.data = weight.data.new_zeros(1).expand(weight.shape)
        self.dropped = True


def free_projections(model: nn.Module, layers: Collection[int], *, keep: bool = True) -> str | None:
    """Put gates before `k_proj` and `v_proj` of the layers; returns why not, or None.

    Args:
        model: The language model.
        layers: The layers (as the model numbers them) that read another layer's cache.
        keep: Whether the weights may return for another cache; False frees them for good.
    """
    found = {getattr(m, "layer_idx", None): m for m in model.modules() if hasattr(m, "k_proj")}
    if any(layer not in found or not hasattr(found[layer], "v_proj") for layer in layers):
        return "q, k and v are one matrix in this model: the projections still run"
    for layer in layers:
        for name in ("k_proj", "v_proj"):
            linear = getattr(found[layer], name)
            if not isinstance(linear.forward, Gate):
                linear.forward = Gate(linear, layer)
            if not keep:
                linear.forward.drop()
    return None


def gates(model: nn.Module) -> list[Gate]:
    """All gates of a model."""
    return [m.forward for m in model.modules() if isinstance(getattr(m, "forward", None), Gate)]


def skip(gates: Iterable[Gate], layers: Collection[int]) -> None:
    """Close the gates of these layers and open all others."""
    for gate in gates:
        gate.skips = gate.layer in layers
