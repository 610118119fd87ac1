"""How the tests run the command line, and what they hold true of every error."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvc import demo
from kvc.cli import main
from tests.conftest import need

PROMPT = "The code of Anna is 4821. The code of Anna is"
MODULES = {"cpu": ("torch", "transformers"), "mlx": ("mlx", "mlx_lm")}
both = pytest.mark.parametrize("backend", list(MODULES))


def kvc_run(*args: str, **kwargs: Any) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, args, **kwargs)


def need_backend(backend: str) -> None:
    """Skips where a backend is not installed."""
    for module in MODULES[backend]:
        need(module)


def generate(backend: str, *args: str, **kwargs: Any) -> Result:
    """`kvc generate`, eight tokens unless the arguments say otherwise."""
    need_backend(backend)
    return kvc_run("generate", "--backend", backend, "--max-tokens", "8", *args, **kwargs)


def generate_json(backend: str, *args: str, **kwargs: Any) -> dict[str, Any]:
    """What `kvc generate --json` prints."""
    result = generate(backend, "--json", *args, **kwargs)
    assert result.exit_code == 0, result.output
    row: dict[str, Any] = json.loads(result.stdout)
    return row


def error_line(result: Result) -> str:
    """The one line of an error of the user's."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("kvc: ")
    return result.stderr


def copied_model(folder: Path, **config: Any) -> Path:
    """The bundled model in another folder, with changes to its config."""
    for path in demo.path().glob("*.json"):
        shutil.copy(path, folder)
    (folder / "model.safetensors").symlink_to(demo.path() / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder
