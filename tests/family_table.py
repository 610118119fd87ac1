"""How models take each method, tried: `python -m tests.family_table [mlx] [torch]`.

Of each library a Markdown table; a cell says how attention reads the cache, or that the method is
refused, with the reason below.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

from tests.families import LIBRARIES, LIMITS, library, outcome


def table(name: str, folder: Path) -> str:
    """One library's table, and what is remarkable in it."""
    of = library(name)
    families = sorted({**of.HANDLE, **of.DENSE}) + sorted(of.REFUSED)
    reasons: dict[str, int] = {}
    ties = []
    lines = [f"| {name} | {' | '.join(LIMITS)} |", "|---" * (len(LIMITS) + 1) + "|"]
    for family in families:
        row = []
        for method in LIMITS:
            cell, note, tie = outcome(of, family, method, folder)
            if note:
                reason = note.replace(f"kvc: {method} evicts", "kvc: METHOD evicts")
                reason = reason.replace(f" of {family} cannot", " of FAMILY cannot")
                cell += f" [{reasons.setdefault(reason, len(reasons) + 1)}]"
            if tie:
                ties.append(f"{family} with {method}")
            row.append(cell)
        lines.append(f"| {family} | {' | '.join(row)} |")
    lines += ["", *(f"{n}. {reason}" for reason, n in reasons.items())]
    lines += ["", f"Tokens that differ at a near tie of logits: {', '.join(ties) or 'none'}."]
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Prints the tables of the libraries named, or of all."""
    warnings.simplefilter("ignore")  # of the model libraries, on such small models
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        for name in names or LIBRARIES:
            print(table(name, Path(folder)), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
