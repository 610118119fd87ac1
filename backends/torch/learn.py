"""Gradients and Adam in PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Numbers = np.ndarray[Any, Any]


class Learner:
    """Parameters that are moved to where a loss is small.

    Args:
        params: Where they begin.
        loss: Of the parameters and of what `step` and `loss` are given; a scalar.
        like: A tensor on the device that computes.
    """

    def __init__(
        self, params: Sequence[Numbers], loss: Callable[..., torch.Tensor], like: torch.Tensor
    ) -> None:
        self._device = like.device
        self._params = [torch.tensor(x, device=self._device, requires_grad=True) for x in params]
        self._loss = loss
        self._adam = torch.optim.Adam(self._params)

    def step(self, rate: float, *batch: Numbers) -> float:
        """One step of Adam; returns the loss before it."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.zero_grad()
        loss = self._loss(self._params, *self._tensors(batch))
        loss.backward()
        self._adam.step()
        return loss.item()

    @torch.no_grad()
    def loss(self, *batch: Numbers) -> float:
        """The loss of the parameters as they are."""
        return self._loss(self._params, *self._tensors(batch)).item()

    @property
    def params(self) -> list[Numbers]:
        """A copy of the parameters."""
        return [x.detach().cpu().numpy().copy() for x in self._params]

    def _tensors(self, batch: Sequence[Numbers]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(x)).to(self._device) for x in batch]
