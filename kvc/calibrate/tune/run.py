"""A tuning from its goal to the profile that is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvc.calibrate.rows import Rows
from kvc.calibrate.tune.fit import Fit, fit
from kvc.calibrate.tune.quality import Score
from kvc.calibrate.tune.search import Search, Tried
from kvc.errors import ConfigError
from kvc.files import ProfileFile, map_text
from kvc.methods import KVSharer


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked for: bytes, or quality; shares of the full cache's."""

    memory: float | None = None  # of the dense cache's bytes, at most
    ppl_increase: float | None = None  # of perplexity, at most

    def __post_init__(self) -> None:
        """Raises ConfigError unless one of them is given."""
        if (self.memory is None) == (self.ppl_increase is None):
            got = "neither" if self.memory is None else "both"
            raise ConfigError(f"tune: expected --memory or --max-ppl-increase, got {got}")


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning found."""

    best: Tried
    front: list[Tried]
    fit: Fit
    profile: ProfileFile


def tune(search: Search, rows: Rows, goal: Goal, model: str = "", seed: int = 0) -> Tuned:
    """Searches, and measures what was found.

    Args:
        search: On the model and the rows.
        rows: Calibration tokens.
        goal: What is asked for.
        model: Its name as the user gave it, for the file.
        seed: Of the choice of rows, for the file.

    Raises:
        ConfigError: If the goal cannot be met.
    """
    sizes, engine = search.sizes, search.engine
    if goal.memory is not None:
        best = search.within(goal.memory * sizes.dense)
    else:
        assert goal.ppl_increase is not None
        best = search.for_increase(goal.ppl_increase)
    front = search.front(best)
    needs = fit(engine, rows.ids[0], best.choice.method, sizes.context, best.nbytes)
    n, length = rows.ids.shape
    asked = {
        "memory": goal.memory,
        "max_ppl_increase": goal.ppl_increase,
        "methods": list(search.presets),
        "rows": n,
        "length": length,
        "seed": seed,
        "backend": engine.name,
        "model": model,
    }
    profile = ProfileFile(
        best.choice.name,
        settings(search, best),
        engine.shape.fingerprint,
        measured(search, best),
        [point(search, tried) for tried in front],
        {key: value for key, value in asked.items() if value is not None},
        rows.digest,
    )
    return Tuned(best, front, needs, profile)


def settings(search: Search, best: Tried) -> dict[str, str]:
    """A method's settings, with a map that needs no file."""
    found = dict(best.choice.settings)
    layout = best.choice.method.check(search.shape).layout
    if isinstance(layout, KVSharer):
        found["kvsharer.map"] = map_text(layout.pairs)
    return found


def measured(search: Search, best: Tried) -> dict[str, Any]:
    """What a method costs at the context, and in quality on all rows."""
    sizes, method = search.sizes, best.choice.method
    half = sizes.context // 2
    slope = (best.nbytes - sizes.of(method, half)) / (sizes.context - half)
    return {
        "context": sizes.context,
        "dtype_bytes": search.shape.dtype_bytes,
        "nbytes": best.nbytes,
        "dense_bytes": sizes.dense,
        "share": best.nbytes / sizes.dense,
        "bytes_per_token": slope,
        "fixed_bytes": round(best.nbytes - slope * sizes.context),
        "quality": quality(best.score),
    }


def quality(score: Score) -> dict[str, float]:
    """A score as the file has it: nats, perplexities, and shares."""
    return {
        "kl": score.kl,
        "kl_error": score.kl_error,
        "ppl": score.ppl,
        "ppl_increase": score.ppl_increase,
    }


def point(search: Search, tried: Tried) -> dict[str, Any]:
    """A point of the front."""
    return {
        "method": tried.choice.name,
        "settings": dict(tried.choice.settings),
        "nbytes": tried.nbytes,
        "share": tried.nbytes / search.sizes.dense,
        **quality(tried.score),
    }
