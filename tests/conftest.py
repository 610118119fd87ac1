"""What every test runs under: offline, few threads, no progress bars; and the fixtures.

`xp` are the verbs of each backend, `metal` runs Metal kernels, `sim` counts what they do.
"""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
)  # before any of these libraries is imported

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

BACKENDS = ("numpy", "mlx", "torch")
# clang++ for the simulator, the GPU of a Mac, a browser, the harness of evaluations
KNOWN = (*BACKENDS, "clang", "metal", "chromium", "lm_eval")
REQUIRED = {name.strip() for name in os.environ.get("KVC_REQUIRE", "").split(",")} - {""}

if unknown := REQUIRED - set(KNOWN):
    raise pytest.UsageError(f"KVC_REQUIRE: expected names of {KNOWN}, got {sorted(unknown)}")

if find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # ops this small wait for each other longer than they run

if not find_spec("mlx"):
    collect_ignore_glob = ["test_metal_*.py"]  # they build MLX's arrays where they are read


def need(library: str) -> None:
    """Skips a test whose library is missing; fails it where KVC_REQUIRE names the library."""
    try:
        import_module("mlx.core" if library == "mlx" else library)
    except ImportError as error:
        if library in REQUIRED:
            pytest.fail(f"KVC_REQUIRE names {library}, which does not import: {error}")
        pytest.skip(f"{library} does not import: {error}")


@pytest.fixture(params=BACKENDS)
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """The verbs of one backend."""
    need(request.param)
    return import_module(f"kvc.backends.{request.param}.ops")


@pytest.fixture
def metal() -> Iterator[None]:
    """Metal kernels run, and nothing else: on the GPU of a Mac, in the simulator elsewhere."""
    from tests.metal import on_metal

    with on_metal():
        yield


@pytest.fixture
def sim() -> Iterator[Any]:
    """The simulator in its check pass, for what only it can count."""
    need("mlx")
    from kvc.ops.dispatch import mode
    from tests import metalsim

    metalsim.need()
    with metalsim.simulate("check") as simulation, mode("fused"):
        yield simulation


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what a Mac proves: `pytest -m metal`."""
    for item in items:
        if "metal" in getattr(item, "fixturenames", ()):
            item.add_marker("metal")
