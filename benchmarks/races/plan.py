"""The races in the order of their importance, each in a process of its own with a share of time.

A kernel that reads outside its memory breaks the CUDA context of its process, and one may hang:
then the race starts again behind the row that broke, and nothing else is lost.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.races.rows import Row, Rows, Task
from kvc.measure.speed.clock import NotRaced

GRACE = 8.0  # seconds past its time after which a race is killed
LEAST = 12.0  # seconds for which a broken race is started again
START = 60.0  # seconds for the imports, at most
BROKEN = 75  # exit status of a process whose device takes nothing any more
PRELOADED = ["torch", "transformers", "benchmarks.races.generate", "benchmarks.races.kernel"]


class Race(NamedTuple):
    """A module of this package, or one of its sets of cases, and the seconds it may take."""

    name: str
    module: str
    seconds: float
    cases: str = ""  # the field of Sizes that its `race` takes


RACES = (
    Race("tests", "correctness", 90),
    Race("kernel", "kernel", 105),
    Race("step", "step", 105, "steps"),
    Race("memory", "memory", 40),
    Race("encode", "encode", 30),
    Race("growth", "step", 40, "growth"),
    Race("generate", "generate", 50),
    Race("less", "less", 20),
    Race("sharing", "sharing", 30),
)
SECONDS = sum(race.seconds for race in RACES)


@dataclass(frozen=True)
class Options:
    """What holds for the whole run."""

    path: Path
    dry: bool
    wish: Any  # the mode: fused or reference
    common: Row


def run_all(names: tuple[str, ...], options: Options, seconds: float) -> None:
    """The races of these names, or all; unused time goes to the next ones."""
    races = [race for race in RACES if not names or race.name in names]
    scale = seconds / sum(race.seconds for race in races)
    end = time.monotonic() + seconds
    context = None if options.dry else starting()
    for i, race in enumerate(races):
        own = end - scale * sum(later.seconds for later in races[i + 1 :])
        if options.dry:
            run_race(race, options, own)
        else:
            guarded(race, options, own, context)


def starting() -> Any:
    """How processes start: forked off one that has imported everything, which is quick, or anew.

    A process in which an import has asked the driver for GPUs leaves its children without any.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks without the driver
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    trial = context.Process(target=touch)
    trial.start()
    trial.join(START)
    if trial.is_alive():
        trial.kill()
        trial.join()
    return context if trial.exitcode == 0 else multiprocessing.get_context("spawn")


def touch() -> None:
    """Uses the GPU."""
    import torch

    torch.zeros(1, device="cuda").item()


def guarded(
    race: Race, options: Options, end: float, context: Any, run: Callable[..., None] | None = None
) -> None:
    """One race in its process, by `run_race` or `run`, started again if it breaks in time."""
    rows = Rows(options.path, options.common)
    while True:
        hear, tell = context.Pipe(duplex=False)
        process = context.Process(target=run or run_race, args=(race, options, end, tell))
        process.start()
        tell.close()
        process.join(max(0.0, end + GRACE - time.monotonic()))
        if hung := process.is_alive():
            process.kill()
            process.join()
        key = last(hear)
        if process.exitcode == 0:
            return
        if key not in rows.done(race.name):
            why = "killed" if hung else f"its process ended with {process.exitcode}"
            rows.write(race.name, key, {"failed": why})
        if hung or key == "" or end - time.monotonic() < LEAST:
            return


def last(hear: Connection) -> str:
    """The key of the task that a process began last; empty if it began none."""
    key = ""
    while hear.poll():
        try:
            key = hear.recv()
        except EOFError:
            break
    return key


def run_race(race: Race, options: Options, end: float, tell: Connection | None = None) -> None:
    """All tasks of a race that have no row yet, until its time is up."""
    from benchmarks.races.device import Device
    from benchmarks.races.lab import Lab
    from benchmarks.races.sizes import DRY, FULL

    device = Device("cpu" if options.dry else "cuda")
    lab = Lab(device, DRY if options.dry else FULL, options.wish, end)
    rows = Rows(options.path, {**options.common, "device": device.title})
    done = rows.done(race.name)
    module: Any = import_module(f"benchmarks.races.{race.module}")
    if tell:
        gc.freeze()  # what is imported stays; looking through it takes longer than a row
    cases = (getattr(lab.sizes, race.cases),) if race.cases else ()
    for task in module.race(lab, *cases):
        if task.key in done:
            continue
        if lab.left() <= 0:
            rows.write(race.name, task.key, {"not_raced": "the race's time was up"})
            return
        if tell:
            tell.send(task.key)
        found = measured(task)
        rows.write(race.name, task.key, found)
        print(f"{race.name}: {task.key}: {brief(found)}", flush=True)
        del task
        device.tidy()
        if device.broken():
            sys.exit(BROKEN)


def measured(task: Task) -> Row:
    """The row of a task, whatever happens in it."""
    start = time.monotonic()
    try:
        found = task.run()
    except NotRaced as why:
        found = {"not_raced": str(why)}
    except Exception as error:  # kernels, compilers and libraries of all kinds
        lines = str(error).splitlines() or ["no reason"]
        found = {"failed": f"{type(error).__name__}: {lines[0]}"}
        found["where"] = [line.strip() for line in traceback.format_exc().splitlines()[-12:]]
    return found | {"took_s": round(time.monotonic() - start, 2)}


def brief(found: Row) -> str:
    """A row in a few words."""
    if why := found.get("not_raced"):
        return f"not raced: {why}"
    if why := found.get("failed"):
        return f"FAILED: {why}"
    shown: tuple[str, ...] = (
        "mode",
        "ms",
        "share_of_copy",
        "floor_ms",
        "error",
        "tokens_per_s",
        "over_cache",
    )
    shown += ("passed", "failed_tests", "ratio", "took_s")
    cells = [(name, found[name]) for name in shown if found.get(name) is not None]
    return ", ".join(
        f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in cells
    )
