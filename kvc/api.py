"""The few functions that a program calls. Libraries are imported when one is needed."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvc.errors import BackendError, ConfigError
from kvc.methods import PRESETS, Method, Part, method_of, parse

if TYPE_CHECKING:
    from kvc.backends.base import Engine, ModelShape
    from kvc.measure.memory import Cost
    from kvc.store.report import Report


class Backend(NamedTuple):
    """Where a model runs: the packages it takes, and the extra of kvc that installs them."""

    library: str
    modules: tuple[str, ...]
    extra: str


BACKENDS = {
    "mlx": Backend("mlx", ("mlx.core", "mlx_lm"), "mlx"),
    "cuda": Backend("torch", ("torch", "transformers"), "torch"),
    "cpu": Backend("torch", ("torch", "transformers"), "torch"),
}


def make_cache(
    model: Any,
    method: str | Method | Part = "gear",
    prefill: str = "exact",
    *,
    free: bool = False,
    graph: bool = False,
    **params: Any,
) -> Any:
    """A compressed cache for a model of mlx-lm or transformers, of the kind its library takes.

    mlx-lm takes the result as `prompt_cache=`, transformers as `past_key_values=`.

    Args:
        model: As `mlx_lm.load` or `from_pretrained` return it.
        method: A preset's name, several joined by `+`, what `parse` returns, or its parts as
            values, such as `KVSharer("map.json") + Gear(bits=2)`.
        prefill: `exact` keeps the prompt dense until it ends; `stream` compresses its pieces.
        free: Free the weights that the method makes useless, KVSharer's projections, for good.
        graph: On a CUDA GPU, with transformers: record steps of one token as a CUDA graph, which
            the host starts at once. For methods that code whole buffers.
        params: The method's, such as `bits=2`; with several methods `**{"gear.bits": 2}`.

    Raises:
        ConfigError: If the method, its parameters and the model do not go together.
    """
    if isinstance(method, str):
        method = parse(method, params)
    elif params:
        raise ConfigError(
            f"make_cache: a parsed method has its parameters, got {', '.join(params)} as well; "
            "give them to parse"
        )
    if isinstance(method, Part):
        method = method_of(method)
    library = _library_of(model, "make_cache")
    return import_module(f"kvc.backends.{library}.cache").make_cache(
        model, method, prefill, free=free, graph=graph
    )


def _library_of(model: Any, who: str) -> str:
    roots = {c.__module__.split(".")[0] for c in type(model).__mro__}
    library = next((name for name in ("mlx", "torch") if name in roots), None)
    if library is None:
        got = f"{type(model).__module__}.{type(model).__name__}"
        raise ConfigError(f"{who}: expected a model of mlx-lm or transformers, got {got}")
    return library


def save_cache(
    cache: Any,
    path: str | Path,
    tokens: Sequence[Any],
    *,
    model: Any,
    deflate: bool = False,
    notes: str = "",
) -> None:
    """Writes a cache to a file, whole or not at all; either library can go on from it.

    What is not compressed yet is written as it is: a prompt's tokens stay as they came until the
    first token after it, unless the store's `trim(0)` and `settle()` end it.

    Args:
        cache: From `make_cache`; it stays as it is.
        path: Where to.
        tokens: The ids of all tokens in the cache, or a list of them for each row, padding too.
        model: That the cache is of: its fingerprint goes into the file.
        deflate: Write codes entropy-coded: smaller, slower, and not mapped in loading.
        notes: Any text to keep with it, for `kvc.saving.notes_of`.

    Raises:
        CacheFileError: If it cannot be written, or the tokens are not those of the cache.
    """
    entries = cache if isinstance(cache, list | tuple) else [cache]
    if not any(hasattr(entry, "store") for entry in entries):
        got = type(cache).__name__
        raise ConfigError(f"save_cache: expected a cache from kvc.make_cache, got a {got}")
    library = _library_of(model, "save_cache")
    import_module("kvc.saving").save(library, model, cache, path, tokens, deflate, notes)


def load_cache(
    model: Any,
    path: str | Path,
    *,
    kernels: str | Path | None = None,
    free: bool = False,
    graph: bool = False,
) -> tuple[Any, list[Any]]:
    """A cache that goes on where the one in a file ends, and its tokens; the file stays as it is.

    The cache has the method of the file. On transformers its arrays are read from the file when
    they are needed; do not change the file in place meanwhile, replace it.

    Args:
        model: The model that the cache was made for, on either library and in the same dtype.
        path: A file of `save_cache`.
        kernels: The file of LESS's kernels, if it is not where it was when the cache was made.
        free: As `make_cache` takes it.
        graph: As `make_cache` takes it.

    Returns:
        The cache, as `make_cache` returns it, and its tokens as `save_cache` took them.

    Raises:
        CacheFileError: If the file is missing or damaged, of a newer format, of another model or
            dtype, or made with other kernels.
    """
    library = _library_of(model, "load_cache")
    found: tuple[Any, list[Any]] = import_module("kvc.saving").load(
        library, model, path, kernels, free=free, graph=graph
    )
    return found


def report(cache: Any) -> Report:
    """The bytes of a cache from `make_cache`, by part and by layer, and the dense cache's.

    It says of each of the model's layers what it keeps.

    Raises:
        ConfigError: If the cache is none of ours.
    """
    entries = cache if isinstance(cache, list | tuple) else [cache]
    entry = next((e for e in entries if hasattr(e, "store")), None)
    if entry is None:
        got = type(cache).__name__
        raise ConfigError(f"report: expected a cache from kvc.make_cache, got a {got} of another")
    result: Report = dataclasses.replace(entry.store.report(), kinds=list(entry.kinds))
    return result


def presets() -> tuple[str, ...]:
    """The names that `parse` and `make_cache` take, alone or joined by `+`."""
    return tuple(PRESETS)


def cost_table(shape: ModelShape) -> list[Cost]:
    """Bytes per token of every preset for a model, `Engine.shape`, as measured on stores."""
    table: list[Cost] = import_module("kvc.measure.memory").cost_table(shape)
    return table


def load_engine(backend: str, model_path: str, dtype: str | None = None) -> Engine:
    """Loads a model and what runs it.

    Args:
        backend: `mlx`, `cuda`, `cpu`, or `auto`: the best of those that are installed.
        model_path: A folder, or a name on the Hugging Face hub.
        dtype: `float32`, `float16` or `bfloat16`; without it the backend's choice.

    Raises:
        BackendError: If the backend, its device or the model is not there.
    """
    name = best_backend() if backend == "auto" else backend
    check_backend(name)
    engine: Engine = import_module(f"kvc.backends.{BACKENDS[name].library}.engine").load(
        str(model_path), name, dtype
    )
    return engine


def best_backend() -> str:
    """What `auto` means here: `mlx` on Apple silicon, else `cuda`, else `cpu`, else `mlx`.

    Raises:
        BackendError: If neither library is installed.
    """
    found = {b.library for b in BACKENDS.values() if all(find_spec(_top(m)) for m in b.modules)}
    if not found:
        raise BackendError(
            "no backend: expected mlx-lm or transformers with torch, found neither; "
            "pip install 'kvc[mlx]' or 'kvc[torch]'"
        )
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if "torch" not in found or (apple and "mlx" in found):
        return "mlx"
    check_backend("cpu")
    return "cuda" if import_module("torch").cuda.is_available() else "cpu"


def check_backend(name: str) -> None:
    """Imports what a backend needs.

    Raises:
        BackendError: If there is no such backend or something it needs does not import.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend: expected {', '.join(BACKENDS)} or auto, got {name!r}")
    for module in BACKENDS[name].modules:
        try:
            import_module(module)
        except ImportError as error:
            why = (str(error).splitlines() or ["no reason"])[0]
            raise BackendError(
                f"{name}: {module} does not import ({why}); "
                f"pip install 'kvc[{BACKENDS[name].extra}]'"
            ) from error


def _top(module: str) -> str:
    return module.partition(".")[0]
