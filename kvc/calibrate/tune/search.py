"""The search of `kvc tune`: from what each layer bears to one method that was measured.

Kinds of codes are ranked by what sensitivities foretell at the budget. The best are measured on one
row, and the errors of the very best layer by layer; then with several numbers of exact tokens. The
best of all, presets among them, are measured on all rows. Room that is left goes to newest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvc.backends.base import Engine
from kvc.calibrate.rows import Rows
from kvc.calibrate.tune.allocate import BITS, best_within
from kvc.calibrate.tune.others import others
from kvc.calibrate.tune.quality import Level, Quality, Score
from kvc.calibrate.tune.sensitivity import Sensitivity
from kvc.calibrate.tune.sizes import Sizes
from kvc.calibrate.tune.space import LAYOUTS, Kind, exacts, kinds, takes
from kvc.calibrate.tune.widen import wider
from kvc.errors import ConfigError
from kvc.measure.choice import Choice, read_choice
from kvc.measure.results import Results
from kvc.methods import PRESETS, Less

LEAST = 256  # tokens of a row, of which the half that is compressed fills a buffer
KINDS, VARIED, FINAL = 4, 2, 3  # kinds that are measured, varied; methods read on all rows
LADDER = (0.07, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5)  # of the dense bytes, for the front
STEPS = 5  # budgets that are tried for a perplexity
TIE = 1e-6  # nats that float32 does not tell apart; the fewer bytes win

# Told of what is being done, and how many tokens were read of how many in all.
OnProgress = Callable[[str, int, int], None]


class Tried(NamedTuple):
    """A method with its measured bytes and quality; `kind` is what it was made from, if bits."""

    choice: Choice
    nbytes: int
    score: Score
    kind: Kind | None = None


class Search:
    """A search on one model and text.

    Args:
        engine: With the model.
        rows: Calibration tokens.
        context: Tokens that bytes are measured at.
        presets: Names that may be used.
        results: Where scores are kept; by default in memory.
        on_progress: May raise, as Ctrl-C does: what was measured stays.

    Raises:
        ConfigError: If rows are too short, or the presets leave nothing that the model takes.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Rows,
        context: int,
        presets: Sequence[str],
        results: Results | None = None,
        on_progress: OnProgress = lambda what, done, total: None,
    ) -> None:
        n, length = rows.ids.shape
        if length < LEAST:
            raise ConfigError(f"tune: expected rows of at least {LEAST} tokens, got {length}")
        self.engine, self.presets, self.on_progress = engine, presets, on_progress
        self.shape = engine.shape
        self.low = Level(-(-n // 2), max(LEAST, length // 4))
        self.middle, self.high = Level(1, length), Level(n, length)
        self.sizes = Sizes(engine, rows.ids[0], context)
        self.quality = Quality(engine, rows.ids, results or Results(), self._read)
        self.kinds: dict[str, list[Kind]] = {}
        for layout in LAYOUTS:
            allowed = not layout or (
                layout in presets and takes(self.shape, read_choice(layout).method)
            )
            if allowed and (found := kinds(self.shape, presets, layout)):
                self.kinds[layout] = found
        self.evicts = any(PRESETS[name][0] is Less for name in presets)
        if not self.kinds and not self.evicts:
            raise ConfigError(
                f"tune: expected presets that code or evict, and that this {self.shape.family} "
                f"model takes, got {','.join(presets)}"
            )
        self.sensitivities = {
            layout: Sensitivity(self.quality, self.sizes, self.low, found[0], layout)
            for layout, found in self.kinds.items()
        }
        self.tried: dict[Level, dict[str, Tried]] = {self.middle: {}, self.high: {}}
        self._what, self._done, self._total = "", 0, 1

    def least(self) -> tuple[int, str]:
        """The fewest bytes that these presets can have, and the name of that method."""
        found = []
        for every in self.kinds.values():
            for kind in every:
                bare = kind.keeping(sink="0", window="0").uniform(BITS[0], BITS[0])
                found.append((self.sizes.of(bare.method), f"{kind.name} in {BITS[0]} bits"))
        return min(found)

    def check(self, budget: float) -> None:
        """That a budget can be met, before anything is measured.

        Raises:
            ConfigError: If it cannot, with the least that can.
        """
        if self.evicts:  # as few tokens as one likes
            return
        nbytes, name = self.least()
        if nbytes > budget:
            dense = self.sizes.dense
            raise ConfigError(
                f"tune: expected a budget of at least {percent(nbytes / dense)} of the dense "
                f"cache at {self.sizes.context} tokens, the least that these methods have "
                f"({name}: {nbytes} bytes), got {percent(budget / dense)}"
            )

    def within(self, budget: float) -> Tried:
        """The best method of at most so many bytes.

        Raises:
            ConfigError: If there is none.
        """
        self.check(budget)
        self._foresee()
        ranked = self._ranked(budget)[:KINDS]
        found = [tried for kind in ranked for tried in self._at(kind, budget, self.middle)]
        found.sort(key=order)
        if found:
            found += self._closer(found[0].kind, budget)
            found.sort(key=order)
        few = [*dict.fromkeys(tried.kind for tried in found if tried.kind)][:VARIED]
        for kind in few if few and found[0].score.kl > TIE else ():
            found += self._varied(kind, budget)
        bound = min((tried.score.kl for tried in found), default=math.inf)
        sizes, quality = self.sizes, self.quality
        for choice in others(sizes, quality, self.low, self.presets, few, budget, bound):
            found.append(self._measure(choice, self.middle))
        if not found:
            raise ConfigError(
                f"tune: none of the methods has at most {budget:.0f} bytes at "
                f"{sizes.context} tokens; allow more"
            )
        found = sorted(found, key=order)[:FINAL]
        best = [self._measure(tried.choice, self.high, tried.kind) for tried in found]
        winner = min(best, key=order)
        if winner.score.kl > TIE and (more := wider(self.sizes, winner.choice, budget)):
            best.append(self._measure(more, self.high))
        return min(best, key=order)

    def for_increase(self, share: float) -> Tried:
        """The smallest method found whose perplexity is at most so much above the full cache's.

        Neither what was measured may be above it, nor what the divergence foretells.

        Raises:
            ConfigError: If none is that good.
        """
        self._foresee()
        target = math.log1p(share)
        good = [
            plan.nbytes
            for layout, every in self.kinds.items()
            if self.sensitivities[layout].of_layout <= target
            for kind in every
            for plan in self.sensitivities[layout].plans(kind)
            if plan.loss <= target
        ]
        first = self.within(1.1 * min(good, default=self.sizes.dense))
        passed = [first] if first.score.sure_increase <= share else []
        low, high = (0, first.nbytes) if passed else (first.nbytes, self.sizes.dense)
        for _ in range(STEPS):
            found = self._again(first, (low + high) / 2 if low else 0.85 * high, self.high)
            if found is not None and found.score.sure_increase <= share:
                passed.append(found)
                high = min(high, found.nbytes)
            else:
                low = int((low + high) / 2 if low else 0.85 * high)
            if high - low < 0.01 * high:
                break
        if not passed:
            best = min(self.tried[self.high].values(), key=lambda t: t.score.sure_increase)
            raise ConfigError(
                f"tune: expected a perplexity at most {percent(share)} above the full cache's, "
                f"found {percent(best.score.sure_increase)} at best ({best.choice.label}); "
                "allow more"
            )
        return min(passed, key=lambda tried: tried.nbytes)

    def front(self, best: Tried) -> list[Tried]:
        """What was measured on one row and is best at its bytes; some budgets are added."""
        if kind := best.kind:
            for share in LADDER:
                self._at(kind, share * self.sizes.dense, self.middle)
        self._measure(best.choice, self.middle, best.kind)
        kept: list[Tried] = []
        for tried in sorted(self.tried[self.middle].values(), key=lambda t: (t.nbytes, t.score.kl)):
            if not kept or tried.score.kl < kept[-1].score.kl - TIE:
                kept.append(tried)
        return kept

    def _ranked(self, budget: float) -> list[Kind]:
        """Kinds that fit a budget, the one that is foretold to lose least first."""
        found: list[tuple[float, Kind]] = []
        for layout, every in self.kinds.items():
            sensitivity = self.sensitivities[layout]
            if found and layout and sensitivity.of_layout > min(loss for loss, _ in found):
                continue  # without any code it is worse already
            for kind in every:
                self._what = f"what layers bear: {kind.name}"
                if plan := best_within(sensitivity.plans(kind), budget):
                    found.append((plan.loss, kind))
        return [kind for _, kind in sorted(found, key=lambda each: each[0])]

    def _again(self, best: Tried, budget: float, level: Level) -> Tried | None:
        """At another budget: the same kind with other bits, or else the one that is foretold."""
        for kind in (*((best.kind,) if best.kind else ()), *self._ranked(budget)):
            for tried in self._at(kind, budget, level):
                return tried
        return None

    def _closer(self, kind: Kind | None, budget: float) -> list[Tried]:
        """A kind with the bits that its own errors ask for, layer by layer."""
        if kind is None or kind is self.sensitivities[kind.layout].first:
            return []
        self.sensitivities[kind.layout] = self.sensitivities[kind.layout].of(kind)
        return self._at(kind, budget, self.middle)

    def _varied(self, kind: Kind, budget: float) -> Iterator[Tried]:
        """A kind with other exact tokens, where the bits that are left for the rest may do."""
        loss = self._foretold(kind, budget)
        for variant in exacts(kind, self.shape):
            if self._foretold(variant, budget) <= 2 * loss + TIE:
                yield from self._at(variant, budget, self.middle)

    def _foretold(self, kind: Kind, budget: float) -> float:
        plan = best_within(self.sensitivities[kind.layout].plans(kind), budget)
        return plan.loss if plan else math.inf

    def _at(self, kind: Kind, budget: float, level: Level) -> list[Tried]:
        """A kind with the best bits for a budget, measured; nothing if it does not fit."""
        plan = best_within(self.sensitivities[kind.layout].plans(kind), budget)
        return [self._measure(kind.with_bits(plan.bits), level, kind)] if plan else []

    def _measure(self, choice: Choice, level: Level, kind: Kind | None = None) -> Tried:
        self._what = choice.label
        key = choice.label
        if key not in self.tried[level]:
            nbytes = self.sizes.of(choice.method)
            self.tried[level][key] = Tried(choice, nbytes, self.quality(choice, level), kind)
        return self.tried[level][key]

    def _foresee(self) -> None:
        """How many tokens there are to read, about."""
        layers, n = len(self.shape.full_layers), len(next(iter(self.kinds.values()), ()))
        variants = KINDS + VARIED * 3 + len(LADDER) + 3
        self._total = (
            self.low.tokens * 4 * (2 * layers + n)
            + self.middle.tokens * variants
            + self.high.tokens * (FINAL + 1)
        )

    def _read(self, tokens: int) -> None:
        self._done += tokens
        self._total = max(self._total, self._done)
        self.on_progress(self._what, self._done, self._total)


def order(tried: Tried) -> tuple[int, int]:
    """The better the smaller: by divergence, and where that is equal by bytes."""
    return round(tried.score.kl / TIE), tried.nbytes


def percent(share: float) -> str:
    """A share as people read it."""
    return f"{100 * share:.3g}%"
