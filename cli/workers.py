"""`kvc train less` in several processes, one for each GPU: layers learn independently."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import click

from kvc.cli.run import hush
from kvc.errors import BackendError, ConfigError

Worker = tuple["subprocess.Popen[bytes]", IO[str]]  # a process, and what it says


def count_gpus(backend: str) -> int:
    """How many GPUs there are for a backend; 1 where it uses none."""
    from kvc.api import best_backend

    if (best_backend() if backend == "auto" else backend) != "cuda":
        return 1
    return max(1, import_module("torch").cuda.device_count())


class Apart:
    """Ranges of layers, each trained by a process of its own.

    Args:
        ctx: Of the command.
        span: The layers to train, from the first up to the second.
        n: How many processes; fewer, if there are fewer layers.
        n_gpus: They take turns.

    Raises:
        BackendError: If the model is not there.
        ConfigError: If there are no such layers.
    """

    def __init__(self, ctx: click.Context, span: tuple[int, int], n: int, n_gpus: int) -> None:
        self.arguments = _arguments(ctx)
        layers = [i for i in _full_layers(ctx.params["model"]) if i in range(*span)]
        if not layers:
            raise ConfigError(
                f"--layers: expected some that keep all tokens, got {ctx.params['layers']!r}"
            )
        n = min(n, len(layers))
        edges = [len(layers) * i // n for i in range(n + 1)]
        self.ranges = [(layers[a], layers[b - 1] + 1) for a, b in pairwise(edges)]
        self.n_layers = len(layers)
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = (seen.split(",") if seen else [*map(str, range(n_gpus))])[:n_gpus]

    def train(self, out: Path, quiet: bool) -> None:
        """Trains every range into the folder beside `out`, and merges what comes.

        Raises:
            BackendError: If a process fails, with its last line; the others are stopped. What is
                done is kept.
            ConfigError: If another run has the folder.
        """
        from tqdm import tqdm

        from kvc.calibrate.less.training import merge
        from kvc.calibrate.work import work_folder

        claim = {"arguments": self.arguments, "ranges": [f"{a}:{b}" for a, b in self.ranges]}
        with work_folder(out, claim) as work:
            parts = [work / f"layers-{a}-{b}.safetensors" for a, b in self.ranges]
            running: list[Worker] = []
            bar = tqdm(
                total=self.n_layers, desc="training", unit="layer", leave=False,
                disable=quiet or None,
            )  # fmt: skip
            try:
                for i, part in enumerate(parts):
                    if not part.exists():  # else it was done before the run was killed
                        running.append(self._start(i, part))
                while any(process.poll() is None for process, _ in running):
                    _check(running)
                    bar.update(_done(work) - bar.n)
                    time.sleep(0.2)
                _check(running)
            finally:
                bar.close()
                for process, said in running:
                    if process.poll() is None:
                        process.terminate()
                    process.wait()
                    said.close()
            merge(parts, out)

    def _start(self, i: int, part: Path) -> Worker:
        a, b = self.ranges[i]
        # Threads of several processes on the same cores wait for each other.
        threads = str(max(1, (os.cpu_count() or 1) // len(self.ranges)))
        env = {"OMP_NUM_THREADS": threads, **os.environ}
        if len(self.gpus) > 1:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[i % len(self.gpus)]
        mine = ["--layers", f"{a}:{b}", "--out", str(part), "--workers", "1", "--quiet"]
        command = [sys.executable, "-m", "kvc", "train", "less", *self.arguments, *mine]
        said = TemporaryFile("w+")  # noqa: SIM115 - closed in `train`; a pipe would fill unread
        return subprocess.Popen(command, env=env, stdout=said, stderr=said), said


def _arguments(ctx: click.Context) -> list[str]:
    """The command's options as they were given, but for what each process has of its own."""
    given = []
    for option in ctx.command.params:
        value = ctx.params[str(option.name)]
        if value is None or option.name in ("layers", "out", "force", "workers", "quiet"):
            continue
        for item in value if option.multiple else (value,):
            given += [option.opts[0], str(item)]
    return given


def _full_layers(model: str | None) -> list[int]:
    """The layers that keep all their tokens, by the config alone: a process loads the weights.

    Raises:
        BackendError: If there is no such model.
    """
    from kvc.backends.base import FULL
    from kvc.demo import path

    hush()
    auto = import_module("transformers").AutoConfig
    try:
        config = auto.from_pretrained(model or str(path())).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise BackendError(f"cannot load a model from {model!r}: {first}") from None
    kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == FULL]


def _check(running: Sequence[Worker]) -> None:
    """Raises what a process said last, if one has failed."""
    for process, said in running:
        if process.poll():
            said.seek(0)
            lines = said.read().strip().splitlines()
            last = lines[-1] if lines else f"ended with {process.returncode}"
            raise BackendError(f"--workers: one of them failed: {last.removeprefix('kvc: ')}")


def _done(work: Path) -> int:
    """Layers whose kernels are on disk."""
    whole = [part.stem.split("-")[1:] for part in work.glob("layers-*.safetensors")]
    return sum(int(b) - int(a) for a, b in whole) + len([*work.glob("*.work/layer-*.safetensors")])
