"""What every test runs under: offline, few threads, no progress bars; and the fixture `xp`."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
)  # before any of these libraries is imported

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest

BACKENDS = ("numpy", "mlx", "torch")
REQUIRED = {name.strip() for name in os.environ.get("KVC_REQUIRE", "").split(",")} - {""}

if unknown := REQUIRED - set(BACKENDS):
    raise pytest.UsageError(f"KVC_REQUIRE: expected names of {BACKENDS}, got {sorted(unknown)}")

if find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # ops this small wait for each other longer than they run


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
