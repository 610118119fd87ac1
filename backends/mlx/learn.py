"""Gradients and Adam in MLX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import Adam

Numbers = np.ndarray[Any, Any]


class Learner:
    """Parameters that are moved to where a loss is small.

    Args:
        params: Where they begin.
        loss: Of the parameters and of what `step` and `loss` are given; a scalar.
        like: Unused: MLX has one device per machine.
    """

    def __init__(
        self, params: Sequence[Numbers], loss: Callable[..., mx.array], like: mx.array
    ) -> None:
        self._params = {str(i): mx.array(x) for i, x in enumerate(params)}
        self._loss: Any = lambda params, *batch: loss(list(params.values()), *batch)
        self._gradient: Any = mx.value_and_grad(self._loss)
        # PyTorch's corrects the bias of its first steps, and so does the paper's
        self._adam = Adam(1e-3, bias_correction=True)

    def step(self, rate: float, *batch: Numbers) -> float:
        """One step of Adam; returns the loss before it."""
        self._adam.learning_rate = rate
        loss, gradients = self._gradient(self._params, *map(mx.array, batch))
        self._params = self._adam.apply_gradients(gradients, self._params)
        mx.eval(loss, self._params, self._adam.state)
        return float(loss.item())

    def loss(self, *batch: Numbers) -> float:
        """The loss of the parameters as they are."""
        return float(self._loss(self._params, *map(mx.array, batch)).item())

    @property
    def params(self) -> list[Numbers]:
        """A copy of the parameters."""
        return [np.array(x) for x in self._params.values()]
