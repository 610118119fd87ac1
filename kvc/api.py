"""What users import: caches for their models, reports, and engines by a backend's name."""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.util import find_spec
from typing import Any, cast

from kvc.backends.base import Engine
from kvc.errors import BackendError
from kvc.methods import Method, parse
from kvc.store.store import KVStore, Report

BACKENDS = ("auto", "mlx", "cuda", "cpu")


def make_cache(
    model: Any, method: str | Method = "gear", prefill: str = "exact", **params: Any
) -> Any:
    """The cache that the model's library takes: a list for mlx-lm, a `Cache` for transformers.

    Args:
        model: a model loaded by mlx-lm or transformers.
        method: a name such as `gear` or `kvsharer+gear`, or a `Method`.
        prefill: `exact` holds the prompt dense until the first token after it; `stream` compresses
            each piece of it as it comes.
        params: the method's parameters, where `method` is a single name.

    Raises:
        ConfigError: if the method, a parameter or the model does not fit.
    """
    library = (
        "torch" if any(c.__module__.startswith("torch.") for c in type(model).__mro__) else "mlx"
    )
    chosen = parse(method, params) if isinstance(method, str) else method
    return importlib.import_module(f"kvc.backends.{library}.cache").make_cache(
        model, chosen, prefill
    )


def report(cache: Any) -> Report:
    """The bytes of a cache that `make_cache` made, by part and by layer."""
    if isinstance(cache, list):
        cache = next(entry for entry in cache if hasattr(entry, "store"))
    return cast("KVStore", cache.store).report()


def choose_backend(name: str = "auto") -> str:
    """`mlx`, `cuda` or `cpu`; `auto` takes the fastest that this machine has.

    Raises:
        BackendError: if it is unknown or not installed, saying what to install.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    has_mlx, has_torch = bool(find_spec("mlx_lm")), bool(find_spec("transformers"))
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        if has_mlx and (apple or not has_torch):
            return "mlx"
        if not has_torch:
            raise BackendError('no backend is installed; pip install "kvc[torch]" or "kvc[mlx]"')
        return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"
    if not (has_mlx if name == "mlx" else has_torch):
        extra = "mlx" if name == "mlx" else "torch"
        raise BackendError(f'backend {name} is not installed; pip install "kvc[{extra}]"')
    return name


def load_engine(backend: str, path: str, dtype: str | None = None) -> Engine:
    """A model with its tokenizer on a backend, from a folder or by its name on the hub.

    Raises:
        BackendError: if the backend, its device or the model is not there.
    """
    name = choose_backend(backend)
    library = "mlx" if name == "mlx" else "torch"
    engine = importlib.import_module(f"kvc.backends.{library}.engine")
    return cast("Engine", engine.load(path, name, dtype))
