"""Layers spread over processes, one for each GPU: they are independent of each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from kvc.calibrate.training import merge
from kvc.errors import BackendError


def ranges(n_layers: int, start: int, stop: int, n: int) -> list[tuple[int, int]]:
    """The layers from `start` up to `stop` in `n` runs of about equal length; fewer if few."""
    stop = min(stop, n_layers)
    n = max(1, min(n, stop - start))
    edges = [start + (stop - start) * i // n for i in range(n + 1)]
    return list(pairwise(edges))


def train_apart(
    arguments: Sequence[str],
    parts: Sequence[tuple[int, int]],
    devices: Sequence[str],
    out: Path,
    on_layers: Callable[[int], None],
) -> None:
    """Runs `kvc train less` once for every range of layers, side by side, and merges what comes.

    Args:
        arguments: Of the command, less `--layers` and `--out`.
        parts: The ranges.
        devices: What each process sees as CUDA_VISIBLE_DEVICES; empty where there is no GPU.
        out: The merged file.
        on_layers: Told how many layers are done.

    Raises:
        BackendError: If one of them fails, with its last line; the others are stopped. What is done
            is kept.
    """
    base = [sys.executable, "-m", "kvc", "train", "less", *arguments, "--quiet", "--workers", "1"]
    outs = [out.with_name(f"{out.stem}-{a}-{b}{out.suffix}") for a, b in parts]
    running = []
    for i, ((a, b), part) in enumerate(zip(parts, outs, strict=True)):
        if part.exists():  # from a run that was killed before the others were done
            continue
        # Threads of several processes on the same cores wait for each other.
        threads = str(max(1, (os.cpu_count() or 1) // len(parts)))
        env = {"OMP_NUM_THREADS": threads, **os.environ}
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = devices[i]
        command = [*base, "--layers", f"{a}:{b}", "--out", str(part)]
        said = TemporaryFile("w+")  # noqa: SIM115 - closed below; a pipe would fill unread
        running.append((subprocess.Popen(command, env=env, stdout=said, stderr=said), said))
    try:
        while any(process.poll() is None for process, _ in running):
            _check(running)
            on_layers(_done(outs, parts))
            time.sleep(0.2)
        _check(running)
    finally:
        for process, said in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
            said.close()
    on_layers(_done(outs, parts))
    merge(outs, out)
    for part in outs:
        part.unlink()


def _check(running: Sequence[tuple[subprocess.Popen[bytes], IO[str]]]) -> None:
    """Raises what a process said last, if one has failed."""
    for process, said in running:
        if process.poll():
            said.seek(0)
            lines = said.read().strip().splitlines()
            last = lines[-1] if lines else f"ended with {process.returncode}"
            raise BackendError(f"--workers: one of them failed: {last.removeprefix('kvc: ')}")


def _done(outs: Sequence[Path], parts: Sequence[tuple[int, int]]) -> int:
    """Layers whose kernels are on disk."""
    whole = sum(b - a for part, (a, b) in zip(outs, parts, strict=True) if part.exists())
    return whole + sum(len(list(Path(f"{part}.work").glob("layer-*"))) for part in outs)
