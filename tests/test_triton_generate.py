"""The bundled model written by transformers with every op in a Triton kernel, token by token."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvc.cuda_kernels
import kvc.demo
from kvc.methods import parse
from kvc.ops.dispatch import mode
from tests.backend_table import PROMPT
from tests.conftest import need
from tests.triton_device import kernels, launched, marks, on_gpu

pytestmark = marks()

ATTENTION = ("attend_", "join")  # what its kernels' names begin with
AT_MOST = 3  # launches of attention per layer and step
STEPS = 3  # of decoding; the first codes the prompt, the second a block, the third nothing


class Case(NamedTuple):
    """Settings at which a few tokens are compressed, and the launches of a step without coding."""

    settings: dict[str, Any]
    attention: int  # launches of attention per layer that compresses
    others: int = 0  # and other launches
    layers: int = 8  # that compress
    prompt: int = 47  # tokens: two blocks, and a third that lacks one


BLOCKS = {"gear.group_size": 16, "gear.buffer": 16}
FIT = {"gear.n_iter": 1, "gear.prefill_rank": 2, "gear.rank": 1}
FEW = {"less.heavy": 12, "less.recent": 12}
SHARED = {"kvsharer.map": "7:3,6:2"}
# a prompt's block and those of decoding are two launches where the one is longer than the others
METHODS = {
    "kivi": Case(BLOCKS, 3),
    "kcvt": Case(BLOCKS, 3),
    "token": Case(BLOCKS, 3),
    "gear-l": Case({**BLOCKS, **FIT}, 3),
    "gear-s": Case(BLOCKS, 3),
    "gear": Case({**BLOCKS, **FIT}, 3),
    "gear2": Case({"gear.sink": 4, "gear.window": 0, "gear.buffer": 64}, 2, prompt=67),
    "streaming": Case({"less.recent": 12}, 2),
    "h2o": Case(FEW, 2, 1),
    "tova": Case({"less.heavy": 24}, 2),
    "less": Case(FEW, 3, 3),
    "minicache": Case({}, 2, 1, layers=4),
    "kvsharer": Case(SHARED, 0),  # which compresses nothing: the library attends
    "minicache+gear": Case({**BLOCKS, **FIT}, 3),
    "kvsharer+gear": Case({**BLOCKS, **FIT, **SHARED}, 3),
    "h2o+token": Case({**FEW, **BLOCKS}, 2, 3),
}


@pytest.fixture(scope="module")
def engine() -> Any:
    need("torch")
    need("transformers")
    need("triton")
    from kvc.api import load_engine

    return load_engine("cuda" if on_gpu() else "cpu", str(kvc.demo.path()), "float32")


def write(engine: Any, name: str, case: Case) -> tuple[list[int], int, Counter[str]]:
    """Greedy tokens behind the start of the prompt, the bytes held, the last step's launches."""
    cache = engine.make_cache(parse(name, case.settings))
    ids, found = engine.encode(PROMPT)[: case.prompt], []
    for _ in range(1 + STEPS):
        with launched() as made:
            logits = engine.logits(np.array([ids]), cache)
        ids = [int(logits[0, -1].argmax())]
        found += ids
    return found, engine.store(cache).nbytes, Counter(made)


@pytest.mark.parametrize(("name", "case"), METHODS.items(), ids=METHODS)
def test_kernels_write_what_definitions_write(engine: Any, name: str, case: Case) -> None:
    with mode("reference"):
        want, nbytes, _ = write(engine, name, case)
    # CPython asks for memory again and again at some depths of calls; a thread begins at none
    with kernels(), mode("fused"), ThreadPoolExecutor(1) as thread:
        got, held, made = thread.submit(write, engine, name, case).result()
    assert got == want
    assert held == nbytes
    if on_gpu():  # where launches are not counted
        return
    attending = sum(n for kernel, n in made.items() if kernel.startswith(ATTENTION))
    assert attending == case.attention * case.layers
    assert case.attention <= AT_MOST
    assert made.total() - attending == case.others * case.layers
