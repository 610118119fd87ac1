"""Room that bits leave: more of the newest tokens stay exact."""

from __future__ import annotations

from kvc.calibrate.tune.sizes import Sizes
from kvc.calibrate.tune.space import choice_of
from kvc.measure.choice import Choice
from kvc.methods import MiniCache

GRAIN = 8  # tokens by which a window is widened


def wider(sizes: Sizes, choice: Choice, budget: float) -> Choice | None:
    """The method with the widest window found that fits a budget; None if it has no wider one.

    Bytes fall a little wherever a whole buffer more stays exact, so that halving may miss some
    tokens, and never finds too many.
    """
    method = choice.method
    if method.codec is None or method.memory or isinstance(method.layout, MiniCache):
        return None

    def at(steps: int) -> Choice:
        return choice_of(choice.name, {**choice.settings, "gear.window": str(steps * GRAIN)})

    low = first = -(-method.codec.window // GRAIN)
    high = sizes.context // GRAIN
    while high - low > 1:
        half = (low + high) // 2
        if sizes.of(at(half).method) <= budget:
            low = half
        else:
            high = half
    return at(low) if low > first else None
