"""Files of caches between two runs of a server, for one model and one method."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from kvc.api import load_cache, save_cache
from kvc.errors import ConfigError
from kvc.saving import written

if TYPE_CHECKING:
    from kvc.backends.base import Engine
    from kvc.methods import Method

LOG = logging.getLogger("uvicorn.error")


class Folder:
    """A folder of cache files, in one of its own for each model with a method.

    Args:
        root: The folder; made if it is not there.
        engine: Whose caches they are.
        method: Of the caches.
        model: A folder or a name on the hub: what the engine was loaded from. Files of other
            weights are left alone, even of a model of the same sizes.

    Raises:
        ConfigError: If the folder cannot be made.
    """

    def __init__(self, root: Path, engine: Engine, method: Method, model: str) -> None:
        self.engine = engine
        facts = (engine.shape.fingerprint, written(method), weights(model))
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.path = root / name
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are private
        except OSError as error:
            raise ConfigError(f"--cache-dir {root}: cannot make it: {error.strerror}") from None

    def files(self) -> Iterator[tuple[Sequence[int], Path]]:
        """What is there, with its tokens, the least recently used first.

        Only tokens are read; the whole file is checked when it is needed.
        """
        for path in sorted(self.path.glob("*.kvc"), key=lambda path: path.stat().st_mtime):
            try:
                with safe_open(path, framework="numpy") as file:
                    ids = file.get_tensor("tokens")
            except (OSError, SafetensorError) as error:
                LOG.warning("%s: left alone: %s", path, error)
                continue
            yield np.ravel(ids).tolist(), path

    def write(self, ids: Sequence[int], cache: Any) -> Path:
        """Keeps a cache.

        Raises:
            CacheFileError: If it cannot be written.
        """
        name = hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:32]
        path = self.path / f"{name}.kvc"
        save_cache(cache, path, ids, model=self.engine.model)
        return path

    def read(self, path: Path) -> Any:
        """Brings one back.

        Raises:
            CacheFileError: If it is damaged, or not of this model.
        """
        cache, _ = load_cache(self.engine.model, path, free=True)
        os.utime(path)
        return cache


def weights(model: str) -> list[Any]:
    """What tells weights from others of the same sizes: names, bytes and times of their files."""
    folder = Path(model)
    if not folder.is_dir():
        config = try_to_load_from_cache(model, "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [str(folder.absolute()), stats]
