"""Key and value projections that need not run: a sharing layer reads another layer's cache.

The projections stay where they are in the model, under their names; a `Gate` stands before each.
While a cache is used in which the layer only reads, the gate answers with zeros that take no
memory. With any other cache the projection runs, or, if its weights were freed, it raises.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from kvc.backends.fit import FUSED, INPUTS, OUTPUTS, check_weights
from kvc.backends.torch.attention import decoder_of


class Gate:
    """Takes the place of a projection's `forward`."""

    def __init__(self, linear: Any, layer: int) -> None:
        self.linear, self.layer = linear, layer
        self.forward: Callable[[torch.Tensor], torch.Tensor] = linear.forward
        self.skips = self.freed = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.skips:
            return x.new_zeros(1).expand(*x.shape[:-1], self.linear.out_features)
        check_weights([self.layer] if self.freed else [], ())
        return self.forward(x)

    def free(self) -> None:
        """Free the weights for good; parameters keep their shape over a single number."""
        for weight in self.linear.parameters():
            weight.data = weight.data.new_zeros(1).expand(weight.shape)
        self.freed = True


def put_gates(model: PreTrainedModel, layers: Collection[int]) -> str | None:
    """Put gates before `k_proj` and `v_proj` of layers, as the model numbers them.

    Returns:
        Why there are none; None if there are.
    """
    modules = decoder_of(model).modules()
    found = {getattr(m, "layer_idx", None): m for m in modules if hasattr(m, "k_proj")}
    if any(layer not in found or not hasattr(found[layer], "v_proj") for layer in layers):
        return FUSED
    for layer in layers:
        for linear in (found[layer].k_proj, found[layer].v_proj):
            if not isinstance(linear.forward, Gate):
                linear.forward = Gate(linear, layer)
    return None


def free_projections(model: PreTrainedModel, layers: Collection[int]) -> str | None:
    """Free `k_proj` and `v_proj` of layers that read another layer's tokens, for good.

    The model then serves only caches in which these layers share.

    Args:
        model: The language model.
        layers: As the model numbers them; `KVCCache.sharers` has them.

    Returns:
        Why nothing was freed; None if it was.
    """
    why = put_gates(model, layers)
    for gate in gates(model) if why is None else ():
        if gate.layer in layers:
            gate.free()
    return why


def freed_layers(model: PreTrainedModel) -> frozenset[int]:
    """The layers whose projections are freed."""
    return frozenset(gate.layer for gate in gates(model) if gate.freed)


@torch.no_grad()
def output_projection(model: PreTrainedModel, layer: int, n_in: int) -> torch.Tensor | None:
    """The matrix [n_in, width] that a layer's attention output is multiplied by.

    Whatever its weights are stored as: it is what the projection makes of the identity. None where
    no projection by a known name is found. `n_in` is n_heads * head_dim.
    """
    for module in decoder_of(model).modules():
        linear: Any = next((getattr(module, x) for x in OUTPUTS if hasattr(module, x)), None)
        projects = linear is not None and any(hasattr(module, name) for name in INPUTS)
        if projects and getattr(module, "layer_idx", None) == layer:
            eye = torch.eye(n_in, device=model.device, dtype=model.dtype)
            return linear(eye).float() - linear(eye[:1] * 0).float()
    return None


def gates(model: PreTrainedModel) -> list[Gate]:
    """All gates of a model."""
    return [m.forward for m in model.modules() if isinstance(getattr(m, "forward", None), Gate)]


def skip(gates: Iterable[Gate], layers: Collection[int]) -> None:
    """Close the gates of these layers and open all others."""
    for gate in gates:
        gate.skips = gate.layer in layers
