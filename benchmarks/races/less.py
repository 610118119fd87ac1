"""LESS at 5 % of the context: the cache and the time of a step behind short and long texts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from benchmarks.races.lab import Lab
from benchmarks.races.rows import Row, Task
from benchmarks.races.sizes import LLAMA3_8B
from benchmarks.races.step import ours
from kvc.backends.torch.cache import shape_of
from kvc.files import write_kernels
from kvc.methods import Less, method_of
from kvc.ops.dispatch import mode
from kvc.ops.evict import Kernels

RANK = 8  # of the state, as the paper's


class Kept:
    """H2O with a state whose kernels are random numbers; they cost what learned ones cost."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.path = lab, folder / "kernels.safetensors"

    @cached_property
    def less(self) -> Less:
        """The method, with the file of its kernels."""
        with mode("reference"):
            shape = shape_of(self.lab.model(LLAMA3_8B))
        rng, M, D = np.random.default_rng(0), self.lab.sizes.hidden, shape.head_dim
        Hq, H = shape.n_heads, shape.n_kv_heads
        sizes = ((Hq, D, M), (Hq, M, RANK), (H, D, M), (H, M, RANK), (H, RANK, RANK))
        arrays = [rng.standard_normal(size, "float32") * size[-2] ** -0.5 for size in sizes]
        scales = [np.full((H, RANK), 0.1, "float32") for _ in range(2)]
        kernels = Kernels(*(x.astype("float16") for x in (*arrays, *scales)))
        every = dict.fromkeys(shape.full_layers, kernels)
        write_kernels(self.path, every, shape.fingerprint, {})
        half = self.lab.sizes.budget // 2
        return Less("h2o", heavy=half, recent=half, kernels=str(self.path))

    def row(self, n: int) -> Row:
        """A step behind n tokens."""
        return ours(self.lab, LLAMA3_8B, method_of(self.less), 1, n) | {
            "budget": self.lab.sizes.budget
        }


def race(lab: Lab) -> Iterator[Task]:
    """A row for each length."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(lab, Path(folder))
        for n in lab.sizes.flat:
            yield Task(f"less {n}", partial(kept.row, n))
