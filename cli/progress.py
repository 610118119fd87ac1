"""The bars of a training."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvc.calibrate.less.layer import Epoch


class Bars:
    """Two bars: of the rows whose activations are captured, and of a layer's epochs."""

    def __init__(self, n_epochs: int, quiet: bool) -> None:
        from tqdm import tqdm

        # disable=None: no bar where stderr is no terminal
        self._bar = partial(tqdm, leave=False, disable=quiet or None)
        self._n_epochs = n_epochs
        self._rows: Any = None
        self._epochs: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (self._rows, self._epochs):
            if bar is not None:
                bar.close()

    def captured(self, row: int, n_rows: int) -> None:
        """Moves the bar of rows."""
        if row == 1:
            self._rows = self._bar(total=n_rows, desc="activations", unit="row")
        self._rows.update(1)
        if row == n_rows:
            self._rows.close()

    def trained(self, layer: int, epoch: Epoch) -> None:
        """Moves the bar of epochs, with the errors so far relative to the bare policy's."""
        if not epoch.number:
            self._epochs = self._bar(total=self._n_epochs, desc=f"layer {layer}", unit="epoch")
        bare, plus, now = epoch.errors
        self._epochs.set_postfix_str(
            f"error {now / bare:.3f} of the policy's, Baseline+ {plus / bare:.3f}", refresh=False
        )
        self._epochs.update(epoch.number - self._epochs.n)
        if epoch.number == self._n_epochs:
            self._epochs.close()
