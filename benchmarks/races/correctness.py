"""The correctness tests on the device; a speed beside a failure is no result."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec

from benchmarks.races.lab import Lab
from benchmarks.races.rows import ROOT, Row, Task
from kvc.measure.speed.clock import NotRaced

WORKERS = 8  # most of the time goes to compiling
MARGIN = 8  # seconds to end what runs too long
TAIL = 4000  # characters


def row(lab: Lab) -> Row:
    """What `pytest -m cuda` says.

    Raises:
        NotRaced: if there is no GPU or no pytest.
    """
    if not lab.device.on_gpu:
        raise NotRaced("there is no GPU")
    if not find_spec("pytest"):
        raise NotRaced("pytest is not installed")
    spread = ["-n", str(WORKERS)] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-rfE", "--tb=line", "tests"]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", *spread]
    return ran(command, lab.left() - MARGIN)


def ran(command: Sequence[str], seconds: float) -> Row:
    """What a run of pytest says; one that takes longer is cut, and still says how far it came."""
    start = time.monotonic()
    # a shell's background job ignores SIGINT, and so would what it starts
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=heard,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds))
        cut = False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=MARGIN)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        cut = True
    found = re.findall(r"(\d+) (passed|failed|skipped|error)s?\b", said)
    counts = {word: int(n) for n, word in found}
    return {
        "command": " ".join(["python", *command[1:]]),
        "seconds": time.monotonic() - start,
        "exit_status": process.returncode,
        "cut": cut,
        "passed": counts.get("passed", 0),
        "failed_tests": counts.get("failed", 0),
        "skipped": counts.get("skipped", 0),
        "errors": counts.get("error", 0),
        "said": said[-TAIL:],
    }


def race(lab: Lab) -> Iterator[Task]:
    """One row."""
    yield Task("pytest -m cuda", partial(row, lab))
