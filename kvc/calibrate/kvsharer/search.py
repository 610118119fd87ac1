"""KVSharer's search for a map: pairs of layers down a ranking, each with a test of the model.

Yang et al. 2024, arXiv:2410.18517, algorithm 1. Pairs (i, j), i > j, are tried from the most
dissimilar on. Layer i reads the cache of layer j from then on if the last hidden states are still
like the full model's: if their cosine is above a threshold. It ends when enough layers share.

*Departures*: the full model's states are computed once, not for every pair. Distances and
cosines count to six digits. A layer that shares already is passed over, as the authors' code has it
and the paper does not; a map with fewer sharers than were asked for is a result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvc.backends.base import Engine, ops_of
from kvc.calibrate.kvsharer.distances import Distances, Mean, measure, ranked
from kvc.calibrate.kvsharer.likeness import Hidden, check_compresses, passes, similarity
from kvc.calibrate.rows import Rows
from kvc.errors import ArtifactError, ConfigError
from kvc.files import map_text, sharers, write_map, write_whole
from kvc.methods import KVSharer, Method, method_of, parse


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides about a map, but for the model and the text."""

    share: float  # of the layers that keep all their tokens
    threshold: float = 0.5  # the cosine must be above it
    distance: str = "positionwise"  # see kvc.calibrate.kvsharer.distances
    similarity: str = "per_sentence"  # see kvc.calibrate.kvsharer.likeness
    order: str = "dissimilar"
    seed: int = 0  # of a random order
    method: Method | None = None  # compresses what is shared while pairs are tried

    def __post_init__(self) -> None:
        """Raises ConfigError for a threshold that nothing compares with."""
        if not isfinite(self.threshold):
            raise ConfigError(f"--threshold: expected a cosine such as 0.5, got {self.threshold}")

    def count(self, n_layers: int) -> int:
        """How many of so many layers are to share.

        Raises:
            ConfigError: If the share gives none, or leaves no layer to read from.
        """
        if n_layers < 2:
            raise ConfigError(
                f"search: expected two layers that keep all tokens, got {n_layers}; one alone "
                "has none to share with"
            )
        exact = Decimal(str(self.share)) * n_layers
        n = int(exact.quantize(Decimal(1), ROUND_HALF_UP))
        if not 1 <= n < n_layers:
            raise ConfigError(
                f"--share {100 * self.share:g}%: expected 1 to {n_layers - 1} of the {n_layers} "
                f"layers that keep all tokens, got {n}; ask for {'more' if n < 1 else 'less'}"
            )
        return n


class Tried(NamedTuple):
    """A pair that was tried: `layer` was to read the cache of `owner`, and what came of it."""

    layer: int
    owner: int
    distance: float
    similarity: float
    accepted: bool


class Search:
    """A search on one model and text; numbers of layers are the model's.

    `prepare` ranks the pairs, `run` tries them, `write` writes the map.

    Args:
        engine: With the model.
        rows: The sentences.
        settings: What decides.
        model: Its name as the user gave it, for the file.

    Raises:
        ConfigError: If the model cannot share as much, or so; nothing was computed then.
    """

    def __init__(self, engine: Engine, rows: Rows, settings: Settings, model: str = "") -> None:
        self.engine, self.rows, self.settings, self.model = engine, rows, settings, model
        self.shape = engine.shape
        KVSharer("0:0").check(self.shape)
        self.numbers = self.shape.full_layers
        self.count = settings.count(len(self.numbers))
        length = rows.ids.shape[1]
        if settings.method is not None:
            check_compresses(engine, length, settings.method)
        self.ranked: Distances = {}
        self.tried: list[Tried] = []
        self._full: Hidden | None = None

    @property
    def accepted(self) -> list[Tried]:
        """The pairs of the map."""
        return [tried for tried in self.tried if tried.accepted]

    @property
    def owners(self) -> tuple[int, ...]:
        """The map so far: the owner of each of the model's layers."""
        pairs = [(tried.layer, tried.owner) for tried in self.accepted]
        return _layout(pairs).owners(self.shape.n_layers)

    @property
    def text(self) -> str:
        """The same as `kvsharer.map` takes it."""
        return map_text(sharers(self.owners))

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the map depends on, as plain data."""
        known = asdict(self.settings)
        parts = self.settings.method.parts if self.settings.method else ()
        known["with"] = {part.section: asdict(part) for part in parts}  # type: ignore[call-overload]
        del known["method"]
        n, length = self.rows.ids.shape
        cache = self.engine.make_cache(parse("none"))
        self.engine.hidden(self.rows.ids[:1, :2], cache)
        keys, _ = self.engine.store(cache).read(0)
        return {
            **known,
            "n_sharers": self.count,
            "sentences": n,
            "length": length,
            "dtype": ops_of(keys).dtype_name(keys),
            "backend": self.engine.name,
            "model": self.model,
        }

    def prepare(self, on_rows: Callable[[int], None] = lambda n: None) -> None:
        """One pass of the full model: its states, and the ranking unless a checkpoint had it.

        Args:
            on_rows: Told of every few sentences, how many they are.

        Raises:
            ConfigError: If the model's states are no numbers.
        """
        mean, states = Mean(), []
        for store, hidden in passes(self.engine, self.rows.ids, parse("none")):
            mean.add(store, self.numbers)
            states.append(hidden)
            on_rows(len(hidden))
        self._full = np.concatenate(states)
        distances = measure(mean.states(), self.settings.distance)
        if not np.isfinite(self._full).all() or not np.isfinite([*distances.values()]).all():
            raise ConfigError(
                f"search: expected numbers from the model in {self.config['dtype']}, got NaN or "
                "infinity; try another --dtype"
            )
        self.ranked = self.ranked or ranked(distances, self.settings.order, self.settings.seed)

    def run(self, checkpoint: str | Path | None = None) -> Iterator[Tried]:
        """Tries pairs down the ranking until enough layers share; yields those of before as well.

        Args:
            checkpoint: A file that is written after every pair; `write` removes it.

        Raises:
            ArtifactError: If the checkpoint cannot be written.
        """
        if self._full is None:
            self.prepare()
        yield from self.tried
        known = {(tried.layer, tried.owner) for tried in self.tried}
        self._save(checkpoint)
        for (i, j), distance in self.ranked.items():
            sharing = [tried.layer for tried in self.accepted]
            if len(sharing) == self.count:
                break
            if i in sharing or (i, j) in known:
                continue
            found = self._similarity(i, j)
            self.tried.append(Tried(i, j, distance, found, found > self.settings.threshold))
            self._save(checkpoint)
            yield self.tried[-1]

    def resume(self, checkpoint: str | Path) -> bool:
        """Takes up what a checkpoint holds; False if there is none.

        Raises:
            ArtifactError: If it is damaged, or of a search with other settings.
        """
        path = Path(checkpoint)
        if not path.exists():
            return False
        mend = "remove it, or take another --out"
        try:
            held = json.loads(path.read_bytes())
            of, pairs, before = dict(held["of"]), held["ranked"], held["tried"]
            distances = {(int(i), int(j)): float(distance) for i, j, distance in pairs}
            tried = [Tried(*row) for row in before]
            if any(distances[row.layer, row.owner] != row.distance for row in tried):
                raise ValueError
        except OSError as error:
            raise ArtifactError(f"{path}: cannot read it: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ArtifactError(f"{path}: expected a checkpoint of a search; {mend}") from None
        for key, wanted in self._identity().items():
            if (got := of.get(key)) != wanted:
                raise ArtifactError(
                    f"{path}: expected a search with {key} {wanted}, got one with {got}; {mend}"
                )
        self.ranked, self.tried = distances, tried
        return True

    def write(self, path: str | Path, note: str = "", checkpoint: str | Path | None = None) -> None:
        """Write the map that was found, and remove the checkpoint, which nobody needs then.

        Raises:
            ConfigError: If there is none: no pair was accepted.
            ArtifactError: If the file cannot be written.
        """
        if self.accepted:
            accepted = [
                {key: value for key, value in tried._asdict().items() if key != "accepted"}
                for tried in self.accepted
            ]
            config = {**self.config, "accepted": accepted}
            write_map(path, self.owners, self.shape.fingerprint, config, self.rows.digest, note)
        if checkpoint is not None:
            with suppress(OSError):
                Path(checkpoint).unlink()
        if not self.accepted:
            best = max((tried.similarity for tried in self.tried), default=0.0)
            raise ConfigError(
                f"search: none of {len(self.tried)} pairs is above the threshold "
                f"{self.settings.threshold:g}, the best has {best:g}; lower --threshold"
            )

    def _similarity(self, i: int, j: int) -> float:
        """How like the full model's the states are when i reads j's cache too."""
        layout = _layout([*((tried.layer, tried.owner) for tried in self.accepted), (i, j)])
        method, extra = method_of(layout), self.settings.method
        if extra is not None:
            method = method + extra
        found = passes(self.engine, self.rows.ids, method, compress=extra is not None)
        states = np.concatenate([hidden for _, hidden in found])
        assert self._full is not None
        return similarity(self._full, states, self.settings.similarity)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, as JSON gives it back."""
        of = {**self.config, "layers": self.shape.fingerprint, "text": self.rows.digest}
        return dict(json.loads(json.dumps(of)))

    def _save(self, checkpoint: str | Path | None) -> None:
        if checkpoint is None:
            return
        held = {
            "of": self._identity(),
            "ranked": [[i, j, distance] for (i, j), distance in self.ranked.items()],
            "tried": self.tried,
        }
        write_whole(checkpoint, (json.dumps(held) + "\n").encode())


def _layout(pairs: list[tuple[int, int]]) -> KVSharer:
    return KVSharer(map_text(dict(pairs)) or "0:0")
