"""Race of peak memory above the weights, while a prompt is taken and a few tokens follow.

Where the peak is the process's, on PyTorch's CPU, each arm has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from kvc.api import load_engine
from kvc.errors import KernelUnavailable
from kvc.measure.choice import read_choice
from kvc.measure.peak import Peak
from kvc.measure.speed.bench import Bench
from kvc.measure.speed.clock import NotRaced
from kvc.measure.speed.generate import Arm

Result = dict[str, Any]
NEW = 8  # tokens behind the prompt


@dataclass(frozen=True, slots=True)
class Task:
    """One arm, in words that a process can be told.

    Attributes:
        name: Of a cache of the library's own; empty for a store.
        label: Of the method of a store.
    """

    backend: str
    path: str
    dtype: str | None
    wish: str
    name: str
    label: str
    prefill: str
    batch: int
    n: int


def measure(task: Task, bench: Bench | None = None) -> Result:
    """What a row says of it; in this process if the peak can be forgotten here.

    Raises:
        NotRaced: If the cache cannot be had, or its process fails.
    """
    if bench is not None and bench.engine.name != "cpu":
        return _measure(task, bench)
    code = "from kvc.measure.speed.memory import child; child()"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -2:
        raise KeyboardInterrupt
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise NotRaced(f"its process failed: {lines[-1]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    if why := found.get("not_raced"):
        raise NotRaced(why)
    return found


def child() -> None:
    """One arm, told by the command line, in a process of its own; prints its row."""
    task = Task(**json.loads(sys.argv[1]))
    bench = Bench(load_engine(task.backend, task.path, task.dtype), task.wish)
    try:
        found = _measure(task, bench)
    except (NotRaced, KernelUnavailable) as why:
        found = {"not_raced": str(why)}
    print(json.dumps(found))


def _measure(task: Task, bench: Bench) -> Result:
    choice = read_choice(task.label) if task.label else None
    arm = Arm(bench, task.name, choice, task.prefill, (task.batch, task.n, NEW))
    arm.warm_up()
    arm.cache = None
    peak = Peak(bench.engine)
    arm.run()
    above = peak.above()
    found = {"peak_bytes": above, "dense_bytes": arm.dense_bytes}
    return {**arm.how.fields, **found, **arm.held()}
