"""The folder beside a file that is being made: what is done already, for one process at a time."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvc.errors import ConfigError
from kvc.files import write_whole

SCRATCH = "scratch-"  # how folders begin that are of no use to a later run


@contextmanager
def work_folder(out: Path, claim: Mapping[str, Any]) -> Iterator[Path]:
    """`OUT.work`, which nobody else works in; it is gone when all went well.

    Args:
        out: What the run makes.
        claim: What makes it this run, as plain data.

    Raises:
        ConfigError: If another run's results are in it, another process works there, or it cannot
            be made.
    """
    work = Path(f"{out}.work")
    try:
        work.mkdir(exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"{work}: cannot work there: {error.strerror}") from None
    with lock:  # the system lets go of it when the process ends, however that comes
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{work}: another run is at work there; wait for it, or take another --out"
            ) from None
        for left in work.glob(f"{SCRATCH}*"):  # by a run that was killed
            shutil.rmtree(left)
        _claim(work / "run.json", claim)
        yield work
        shutil.rmtree(work)


def _claim(path: Path, claim: Mapping[str, Any]) -> None:
    """Notes whose folder it is, or checks that.

    Raises:
        ConfigError: If it is another run's.
    """
    if not path.exists():
        write_whole(path, json.dumps(claim, indent=1).encode())
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        before = {}
    if other := [key for key in claim if before.get(key) != claim[key]]:
        raise ConfigError(
            f"{path.parent}: expected what this run has done, got that of one with {other[0]} "
            f"{before.get(other[0])} in place of {claim[other[0]]}; remove it, or take another "
            "--out"
        )
