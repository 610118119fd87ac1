"""Tables of the rows of `benchmarks.kvsharer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """All tables as Markdown, figures only from the rows."""
    (about,) = _of(rows, "about")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    head = (
        "# KVSharer on the bundled model\n\n"
        f"`python -m benchmarks.kvsharer`: {about['dtype']} on {about['device']}, "
        f"threads: {about['threads']}, {versions}. Maps are searched on 30 sentences of 64 tokens "
        f"of {about['train']}, with the acceptance test at 0.5, and measured on "
        f"{about['tokens']:,} tokens of {about['text']} in contexts of {about['context']}: one "
        f"pass through the cache, and {about['facts']} planted facts to be told again.\n"
    )
    return "\n".join([head, *_maps(rows), "", *_pairs(rows), "", *_times(rows), ""])


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _maps(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Maps"
    yield ""
    yield (
        "Lost: nats per token over the full cache, and its standard error over contexts. Digits: "
        "right ones of the facts' numbers; facts: those with four right. Cosine: of the last pair "
        "accepted. Rejected: pairs that the acceptance test turned down."
    )
    yield ""
    yield (
        "| share | order | distance | map | perplexity | lost | digits | facts | cosine "
        "| rejected |"
    )
    yield "|---" * 10 + "|"
    maps = _of(rows, "map")
    for row in maps:
        order = row["order"] + (f", seed {row['seed']}" if row["order"] == "random" else "")
        figures = f"{row['ppl']:.2f} | {row['lost_nats']:.3f} ± {row['error_nats']:.3f}"
        known = f"{100 * row['digits']:.0f} % | {100 * row['numbers']:.0f} %"
        if order == "full":
            yield f"| - | full cache | - | - | {row['ppl']:.2f} | - | {known} | - | - |"
            continue
        rest = f"{row['similarity']:.3f} | {row['rejected']}"
        yield (
            f"| {100 * row['share']:g} % | {order} | {row['distance']} | {row['map']} | {figures} "
            f"| {known} | {rest} |"
        )
    yield ""
    yield (
        "Lost, by order (positionwise; random: mean of the seeds, least to most). The paper finds "
        "dissimilar best on models of 7 to 20 billion parameters, and random at 25 % with 1.4 to "
        "5.6 times its perplexity."
    )
    yield ""
    yield "| share | dissimilar | similar | random | best to worst here |"
    yield "|---|---|---|---|---|"
    for share in sorted({row["share"] for row in maps} - {0.0}):
        of = [row for row in maps if row["share"] == share and row["distance"] == "positionwise"]
        lost = {
            o: [r["lost_nats"] for r in of if r["order"] == o] for o in ("dissimilar", "similar")
        }
        many = [row["lost_nats"] for row in of if row["order"] == "random"]
        cells = " | ".join(f"{values[0]:.3f}" for values in lost.values())
        mean = {o: float(np.mean(values)) for o, values in {**lost, "random": many}.items()}
        yield (
            f"| {100 * share:g} % | {cells} | {mean['random']:.3f} ({min(many):.3f} to "
            f"{max(many):.3f}) | {', '.join(sorted(mean, key=mean.__getitem__))} |"
        )


def _pairs(rows: Sequence[Row]) -> Iterator[str]:
    pairs = _of(rows, "pair")
    lost = [row["lost_nats"] for row in pairs]
    yield "## Single pairs"
    yield ""
    yield (
        f"All {len(pairs)} maps of one pair. The rank correlation of what a pair loses with its "
        "distance would be negative if dissimilar layers were the better ones to share; with its "
        "cosine, negative if the acceptance test's measure foretold the loss."
    )
    yield ""
    yield "| ranked by | correlation with the loss |"
    yield "|---|---|"
    for how in pairs[0]["distances"]:
        found = spearman([row["distances"][how] for row in pairs], lost)
        yield f"| distance, {how} | {found:+.2f} |"
    yield f"| cosine | {spearman([row['similarity'] for row in pairs], lost):+.2f} |"
    yield ""
    ordered = sorted(pairs, key=lambda row: row["lost_nats"])
    first = max(pairs, key=lambda row: row["distances"]["positionwise"])
    place = ordered.index(first) + 1
    best, worst = (":".join(map(str, row["pair"])) for row in (ordered[0], ordered[-1]))
    yield (
        f"The best pair is {best}, {ordered[0]['lost_nats']:.3f} nats, the worst {worst}, "
        f"{ordered[-1]['lost_nats']:.3f}. The pair that the method takes first, "
        f"{':'.join(map(str, first['pair']))}, is number {place} of {len(pairs)}, "
        f"{first['lost_nats']:.3f}."
    )


def _times(rows: Sequence[Row]) -> Iterator[str]:
    timed = _of(rows, "time")
    yield "## Skipped projections"
    yield ""
    yield (
        f"25 % of the layers share; a prompt of {timed[0]['prompt']} tokens, then "
        f"{timed[0]['new']} tokens one by one, the three kinds by turns. Ratios are to the run "
        "beside it with the projections skipped, median and quartiles: above 1 is slower. MLX is "
        "lazy and computes nothing that nobody reads, so there is nothing to skip."
    )
    yield ""
    yield "| model | device | cache | runs | prefill | ratio | decode, a token | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in timed:
        a, b = (f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in row["ratios"])
        arm = row["arm"] if row["arm"] == "full" else f"25 %, {row['arm']}"
        prefill, decode = 1000 * row["prefill_s"], 1000 * row["decode_s_per_token"]
        yield (
            f"| {row['model']} | {row['device']} | {arm} | {row['repeats']} | {prefill:.1f} ms "
            f"| {a} | {decode:.2f} ms | {b} |"
        )


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks."""
    a, b = (np.argsort(np.argsort(values)) for values in (x, y))
    return float(np.corrcoef(a, b)[0, 1])
