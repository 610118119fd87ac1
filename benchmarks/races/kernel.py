"""Race of the decode kernels: attention over n tokens of one layer, for one query in each row.

Ours read codes; the peers read the same tokens as they came. Every run is replayed as one CUDA
graph, from an L2 that holds other data; what a launch costs the CPU stands apart. The least bytes
are those of the arrays in use, each once, of q and of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch

from benchmarks.races.inputs import attend, coded, error, wide
from benchmarks.races.lab import Lab, shape_fields
from benchmarks.races.peers import PEERS
from benchmarks.races.rows import Row, Task
from benchmarks.races.sizes import ARMS, KIVI, LLAMA3_8B, LOW_RANK
from kvc.methods import Gear, parse
from kvc.ops.attention import attend_coded, join
from kvc.ops.dispatch import Mode, mode
from kvc.ops.quant import Role

OURS = (*KIVI, *LOW_RANK, "gear 2 bits", "gear2")


class Case:
    """The tokens and queries of one size; all rows hold the same tokens, each its own copy."""

    def __init__(self, lab: Lab, batch: int, n: int) -> None:
        self.lab, self.batch, self.n = lab, batch, n
        self.about = shape_fields(lab, LLAMA3_8B, batch, n) | {"layers": 1}
        self.heads, self.kv_heads, D = (self.about[f] for f in ("heads", "kv_heads", "head_dim"))
        self.scale, self.size = D**-0.5, (self.kv_heads, n, D)

    @cached_property
    def q(self) -> torch.Tensor:
        """The queries of all rows."""
        return self.lab.randn(self.batch, self.heads, 1, self.size[-1], seed=1)

    @cached_property
    def one(self) -> list[torch.Tensor]:
        """K and V of one row."""
        return [self.lab.randn(1, *self.size, seed=seed) for seed in (2, 3)]

    @cached_property
    def dense(self) -> list[torch.Tensor]:
        """K and V of all rows."""
        return [x.repeat(self.batch, 1, 1, 1) for x in self.one]

    @cached_property
    def truth(self) -> torch.Tensor:
        """The answer of the first row over the tokens as they came, in float64."""
        return attend(*(x.double() for x in (self.q[:1], *self.one)))

    def peer(self, name: str) -> Row:
        """The row of another library."""
        run = PEERS[name](self.q, *self.dense)
        least = sum(x.nbytes for x in (*self.dense, self.q, self.q))
        found = {**self.about, "mode": "library", "error": error(run()[:1], self.truth)}
        return found | timed(self.lab, run, least)

    def ours(self, name: str) -> Row:
        """The row of one codec, whose codes are made by the definitions."""
        method = parse(*ARMS[name])
        assert isinstance(method.codec, Gear)
        roles: tuple[Role, Role] = ("k", "v")
        with mode("reference"):
            k, v = (
                coded(method.codec, role, x, self.batch)
                for role, x in zip(roles, self.one, strict=True)
            )
            few_k, few_v = (wide(x.rows([0])) for x in (k, v))
            truth, _ = join([attend_coded(self.q[:1].double(), few_k, few_v, self.scale)])
        parts = [part for past in (k, v) for part in past.parts()]
        least = sum(x.nbytes - slack for _, x, slack in parts) + 2 * self.q.nbytes
        self.lab.device.tidy()

        def run() -> torch.Tensor:
            answer = attend_coded(self.q, k, v, self.scale)
            return join([answer], dtype=self.q.dtype).out

        def measure(how: Mode) -> Row:
            return {
                "error": error(run()[:1], truth),
                "loss_of_codes": error(truth, self.truth),
                **timed(self.lab, run, least, graphed=how == "fused"),
            }

        return {**self.about, **self.lab.in_mode(measure)}


def timed(lab: Lab, run: Callable[[], Any], least: int, *, graphed: bool = True) -> Row:
    """Times of a kernel, the bytes that it must move, and its share of the copy's rate."""
    device = lab.device
    found: Row = {"bytes": least, "copy_rate": device.copy_rate}
    eager = device.sample(run, seconds=0.15, least=3)
    found |= {**eager.fields("eager_ms"), "host_ms": device.host(run)}
    best = eager
    if graphed and device.on_gpu:
        best = device.sample(device.graph(run), seconds=0.3, least=10)
        found |= best.fields("graph_ms")
    rate = least / best.median
    return found | {"ms": 1e3 * best.median, "rate": rate, "share_of_copy": rate / device.copy_rate}


def race(lab: Lab) -> Iterator[Task]:
    """All sizes; at each the peers and ours take turns by importance."""
    for batch, n in lab.sizes.kernel:
        case = Case(lab, batch, n)
        for name in PEERS:
            yield Task(f"{batch} x {n} {name}", partial(case.peer, name))
        vars(case).pop("dense", None)
        for name in OURS:
            yield Task(f"{batch} x {n} {name}", partial(case.ours, name))
