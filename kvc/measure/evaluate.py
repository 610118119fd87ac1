"""Every task for every method, each once: rows go to the results as they are made."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from kvc.backends.base import Engine, ops_of
from kvc.errors import ConfigError
from kvc.measure.choice import Choice
from kvc.measure.inputs import Inputs
from kvc.measure.layers import check_layers
from kvc.measure.peak import check_peak
from kvc.measure.results import Results, Row, identity
from kvc.measure.tasks import PASSES, TASKS, USUAL, Pass
from kvc.methods import parse
from kvc.version import __version__

VERSION = 1  # of the rows' keys
# Told of what is being done, how much of all is done, and how much there is to do.
OnProgress = Callable[[str, float, int], None]


def read_tasks(text: str | None) -> tuple[str, ...]:
    """The tasks of a list such as `ppl,kl`, in the order in which they are done.

    Raises:
        ConfigError: If one is none.
    """
    if text is None:
        return USUAL
    wanted = [name.strip() for name in text.split(",")]
    if wanted == ["all"]:
        return TASKS
    for name in wanted:
        if name not in TASKS:
            raise ConfigError(f"--tasks: expected some of {','.join(TASKS)} or all, got {name!r}")
    return tuple(task for task in TASKS if task in wanted)


def check(inputs: Inputs, choices: Sequence[Choice], tasks: Collection[str]) -> None:
    """That everything can be done, before any of it is.

    Raises:
        KVCError: If a method and the model do not go together, or a task cannot be done here.
    """
    for choice in choices:
        inputs.engine.make_cache(choice.method)
    if "recall" in tasks:
        assert inputs.facts  # made once; it says whether they fit
    if "layers" in tasks:
        check_layers(inputs.engine, inputs.ids)
    if "memory" in tasks:
        check_peak(inputs.engine)


def evaluate(
    inputs: Inputs,
    choices: Sequence[Choice],
    tasks: Collection[str],
    results: Results,
    model: str,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[Row]:
    """Makes the rows that are missing; returns all that were asked for, by method.

    Args:
        inputs: What the model reads.
        choices: The methods, the full cache first.
        tasks: Of `TASKS`.
        results: Where rows go, and what was made before.
        model: Its name as the user gave it.
        on_progress: May raise, as Ctrl-C does: rows that are made stay.

    Raises:
        KVCError: If a probability is no number.
    """
    about = common(inputs, model)
    todo = [
        (choice, each, missing)
        for choice, each, rows in _asked(inputs, choices, tasks, about)
        if (missing := {task: row for task, row in rows.items() if results.get(row) is None})
    ]

    def show(what: str, at: int, done: int, total: int) -> None:
        on_progress(what, at + done / total, len(todo))

    for at, (choice, each, missing) in enumerate(todo):
        what = f"{choice.label}: {', '.join(missing)}"
        on_progress(what, at, len(todo))
        start = time.monotonic()
        found = each.run(inputs, choice.method, missing, partial(show, what, at))
        seconds = round(time.monotonic() - start, 2)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        for task, row in missing.items():
            made = {"date": date, "seconds": seconds, "result": plain(found[task])}
            results.add({**row, **made})
        on_progress(what, at + 1, len(todo))
    asked = _asked(inputs, choices, tasks, about)
    return [results.rows[identity(row)] for _, _, rows in asked for row in rows.values()]


def common(inputs: Inputs, model: str) -> Row:
    """What all rows of a run say."""
    engine = inputs.engine
    cache = engine.make_cache(parse("none"))
    engine.logits(inputs.ids[:1, :2], cache)
    keys, _ = engine.store(cache).read(0)
    return {
        "version": VERSION,
        "kvc": __version__,
        "model": model,
        "fingerprint": engine.shape.fingerprint,
        "backend": engine.name,
        "dtype": ops_of(keys).dtype_name(keys),
        "device": device(engine),
        "context": inputs.sizes.context,
        "rows": inputs.sizes.rows,
        "text": inputs.text,
        "seed": inputs.sizes.seed,
    }


def device(engine: Engine) -> str:
    """What the model runs on, in words."""
    if engine.name == "cuda":
        return str(import_module("torch").cuda.get_device_name())
    if engine.name == "mlx" and import_module("mlx.core").metal.is_available():
        return f"Metal, {platform.machine()}"
    return platform.machine()


def plain(x: Any) -> Any:
    """Arrays and NumPy's numbers as JSON takes them, floats to seven digits."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple | np.ndarray):
        return [plain(value) for value in x]
    if isinstance(x, float | np.floating):
        return float(f"{float(x):.7g}")
    return int(x) if isinstance(x, np.integer) else x


def _asked(
    inputs: Inputs, choices: Sequence[Choice], tasks: Collection[str], about: Row
) -> Iterator[tuple[Choice, Pass, dict[str, Row]]]:
    """Every way through the model, with the rows of the tasks that it answers, without results."""
    for choice in choices:
        mine = {
            **about,
            "method": choice.name,
            "settings": dict(choice.settings),
            "label": choice.label,
        }
        for each in PASSES:
            rows = {task: {**mine, "task": task} for task in each.tasks if task in tasks}
            if "drift" in rows:
                rows["drift"]["length"] = inputs.sizes.length
            if rows and (choice.method.layout or "maps" not in rows):
                yield choice, each, rows
