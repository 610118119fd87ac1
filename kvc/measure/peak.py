"""The most memory that was held since a moment, on each backend."""

from __future__ import annotations

import ctypes
import gc
from importlib import import_module
from pathlib import Path

from kvc.backends.base import Engine
from kvc.errors import ConfigError

_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def check_peak(engine: Engine) -> None:
    """That the high-water mark can start again.

    Raises:
        ConfigError: If it cannot, as that of a process on a Mac.
    """
    if engine.name == "cpu" and not _REFS.exists():
        raise ConfigError(
            "memory: expected a system that forgets a process's peak, as Linux does; leave out "
            "this task, or take the mlx backend"
        )


class Peak:
    """Begins to watch when it is made."""

    def __init__(self, engine: Engine) -> None:
        check_peak(engine)
        self._engine = engine
        if engine.name == "mlx":
            mx = import_module("mlx.core")
            mx.clear_cache()
            mx.reset_peak_memory()
            self._before = int(mx.get_active_memory())
        elif engine.name == "cuda":
            torch = import_module("torch")
            torch.cuda.reset_peak_memory_stats()
            self._before = int(torch.cuda.memory_allocated())
        else:
            gc.collect()
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # what glibc keeps for later would hide what is taken now
            forget_peak()
            self._before = resident()

    def above(self) -> int:
        """Bytes above those at the beginning: of the device, or of the process."""
        cpu = self._engine.name == "cpu"
        peak = resident(peak=True) if cpu else self._engine.peak_memory()
        return max(0, peak - self._before)


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since the last `forget_peak` (Linux)."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    field = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def forget_peak() -> None:
    """Lets the high-water mark start again from what is resident now (Linux)."""
    _REFS.write_text("5", encoding="ascii")
