"""Key and value projections that need not run: a sharing layer reads another layer's tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx
from mlx import nn

from kvc.backends.fit import FUSED, INPUTS, OUTPUTS
from kvc.backends.mlx.entry import library_entries


class Freed(nn.Module):
    """Stands for a projection that nobody reads.

    It gives NaN that takes no memory: a cache that is not ours, which none can refuse, gets no
    text that looks right.
    """

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out

    def __call__(self, x: Any) -> Any:
        """Shapes: x [..., D]; returns [..., n_out]."""
        return mx.broadcast_to(mx.array(mx.nan, x.dtype), (*x.shape[:-1], self.n_out))


def free_projections(model: Any, layers: Collection[int]) -> str | None:
    """Free `k_proj` and `v_proj` of layers that read another layer's tokens, for good.

    MLX is lazy and never runs them anyway. The model then serves only caches in which these layers
    share.

    Args:
        model: The language model.
        layers: As the model numbers them; `kvc.backends.mlx.entry.sharers` gives them.

    Returns:
        Why nothing was freed; None if it was.
    """
    if len(library_entries(model)) != len(model.layers):
        return "entries of the cache and layers of the model do not match: nothing is freed"
    found = {i: _attention_of(model.layers[i]) for i in layers}
    if any(module is None for module in found.values()):
        return FUSED
    for module in found.values():
        for name in ("k_proj", "v_proj"):
            linear = getattr(module, name)
            if not isinstance(linear, Freed):
                setattr(module, name, Freed(linear.weight.shape[0]))
    vars(model)["_kvc_freed"] = freed_layers(model) | set(layers)
    return None


def freed_layers(model: Any) -> frozenset[int]:
    """The layers whose projections are freed."""
    return frozenset(vars(model).get("_kvc_freed", ()))


def output_projection(model: Any, layer: int, n_in: int) -> Any:
    """The matrix [n_in, width] that a layer's attention output is multiplied by.

    Whatever its weights are stored as: it is what the projection makes of the identity. None where
    no projection by a known name is found. `n_in` is n_heads * head_dim.
    """
    for _, module in model.layers[layer].named_modules():
        linear = next((module[name] for name in OUTPUTS if name in module), None)
        if linear is not None and any(name in module for name in INPUTS):
            weight, bias = linear(mx.eye(n_in)), linear(mx.zeros((1, n_in)))
            return weight.astype(mx.float32) - bias.astype(mx.float32)
    return None


def _attention_of(block: Any) -> Any:
    """The module in a layer that has separate key and value projections; None if there is none."""
    modules = [m for _, m in block.named_modules() if "k_proj" in m and "v_proj" in m]
    return modules[0] if len(modules) == 1 else None
