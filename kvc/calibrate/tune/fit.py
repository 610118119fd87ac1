"""Whether a model with a long context fits a machine: weights, cache, and what a pass takes beside.

Weights are counted and the cache's bytes are measured. What a pass takes beside them is the peak of
a run at two lengths, less the cache; at other lengths it is taken to lie on the line through both.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine
from kvc.errors import ConfigError
from kvc.measure.held import hold
from kvc.measure.peak import check_peak
from kvc.measure.tasks import DECODED
from kvc.methods import Method

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Fit(NamedTuple):
    """Bytes that a model needs at a context, and those that there are."""

    weights: int
    cache: int
    beside: int | None  # of a pass; None where no peak can be watched
    lengths: tuple[int, int]  # tokens at which that was measured
    memory: int  # of the device or the machine, in all

    @property
    def needed(self) -> int:
        """In all, as far as it is known."""
        return self.weights + self.cache + (self.beside or 0)

    @property
    def fits(self) -> bool:
        """Whether there are as many."""
        return self.needed <= self.memory


def fit(engine: Engine, ids: NDArray[np.int32], method: Method, context: int, cache: int) -> Fit:
    """Measures what a model needs.

    Args:
        engine: With the model.
        ids: Tokens [n] that are read; half of them first.
        method: How the cache is compressed.
        context: Tokens that are asked about.
        cache: Bytes of the cache at that context.
    """
    lengths = (len(ids) // 2, len(ids))
    weights, memory = weight_bytes(engine), device_memory(engine)
    try:
        check_peak(engine)
    except ConfigError:
        return Fit(weights, cache, None, lengths, memory)
    beside = []
    for n in lengths:
        held = hold(engine, ids[:n], method, n - DECODED, peak=True)
        assert held.peak is not None
        beside.append(max(0, held.peak - held.report.nbytes))
    slope = (beside[1] - beside[0]) / (lengths[1] - lengths[0])
    there = max(beside[1], round(beside[1] + slope * (context - lengths[1])))
    return Fit(weights, cache, there, lengths, memory)


def weight_bytes(engine: Engine) -> int:
    """Bytes of a model's weights, as they are loaded."""
    model = engine.model
    if engine.name == "mlx":
        flat = import_module("mlx.utils").tree_flatten(model.parameters())
        return sum(int(x.nbytes) for _, x in flat)
    every = {x.data_ptr(): x for x in (*model.parameters(), *model.buffers())}  # tied ones once
    return sum(int(x.nbytes) for x in every.values())


def device_memory(engine: Engine) -> int:
    """Bytes of memory where a model runs, those that are taken already among them."""
    if engine.name == "cuda":
        return int(import_module("torch").cuda.mem_get_info()[1])
    if engine.name == "mlx":
        mx = import_module("mlx.core")
        if mx.metal.is_available():
            return int(mx.device_info()["max_recommended_working_set_size"])
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _LIMITS:  # of a container
        if path.exists() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            found.append(int(text))
    return min(found)
