"""What `kvc info` says of a file: LESS kernels, a KVSharer map, a profile, a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from kvc.cli.profile import front_lines, profile_rows
from kvc.cli.run import hush, in_units


def show_artifact(name: str, as_json: bool) -> None:
    """Explains an artifact or a cache file, for a reader or as one JSON object.

    An artifact is a file or one of the hub.

    Raises:
        ArtifactError: If there is none, it cannot be had, or it is damaged.
    """
    from kvc.cli.cache import show
    from kvc.files import KERNELS, PROFILE, facts
    from kvc.files.cache import is_cache
    from kvc.hub import load_artifact

    hush()
    if is_cache(name):
        from kvc import saving

        show(saving.facts(name), as_json)
        return
    found = {"artifact": name, **facts(load_artifact(name))}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    own = {KERNELS: _kernels, PROFILE: profile_rows}.get(found["kind"], _map)(found)
    rows = {
        "artifact": name,
        "kind": found["kind"],
        "model": found["model"],
        **own,
        "data": f"SHA-256 {found['calibration']}" if found["calibration"] else "not stated",
        "written": f"by kvc {found['version']}",
    }
    for key, text in rows.items():
        click.echo(f"{key:<12}{text}")
    config = dict(found["config"])
    tables = [lines_of(config.pop(key, ())) for key, lines_of in TABLES.items()]
    if config:
        click.echo("\nmade with")
    wide = max(map(len, config), default=0) + 2
    for key, x in config.items():
        click.echo(f"  {key:<{wide}}{x if isinstance(x, str) else json.dumps(x)}")
    if found["kind"] == PROFILE:
        tables.append(front_lines(found["front"]))
    for lines in filter(None, tables):
        click.echo("\n" + "\n".join(lines))


def _kernels(found: dict[str, Any]) -> dict[str, str]:
    config, under = found["config"], found["sharers"]
    layers, dtypes = found["layers"], ", ".join(found["dtype"])
    shown = {
        "layers": f"{len(layers)}: {', '.join(map(str, layers))}",
        "rank": _numbers(found["rank"]),
        "hidden": _numbers(found["hidden"]),
        "parameters": f"{found['parameters']:,} in {dtypes}, {in_units(found['bytes'])}",
    }
    if "policy" in config:
        shown["policy"] = str(config["policy"])
    if {"heavy", "recent"} <= config.keys():
        shown["budget"] = f"{config['heavy']} heavy and {config['recent']} recent tokens"
    if under:
        shown["map"] = f"trained under {_pairs(under)}"
    return shown


def _map(found: dict[str, Any]) -> dict[str, str]:
    shared, n = found["sharers"], found["layers"]
    return {
        "layers": f"{n}, of which {len(shared)} read another one's cache ({found['share']:.1%})",
        "map": _pairs(shared) or "every layer reads its own",
        "ratio": f"{found['ratio']:.2f}",
        **({"note": found["note"]} if found["note"] else {}),
    }


def _pairs(shared: dict[int, int]) -> str:
    return ", ".join(f"{layer} reads {owner}" for layer, owner in shared.items())


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values))


def error_lines(errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What training left of every layer's error, relative to the bare policy's."""
    if not errors:
        return []
    lines = [f"{'layer':<7}{'policy':>10}{'Baseline+':>11}{'LESS':>8}{'epoch':>7}"]
    for layer, found in errors.items():
        plus, less = (found[key] / found["bare"] for key in ("plus", "less"))
        lines.append(
            f"{layer:<7}{found['bare']:>10.3g}{plus:>11.3f}{less:>8.3f}{found['epoch']:>7}"
        )
    return lines


def _pair_lines(pairs: Sequence[Mapping[str, float]]) -> list[str]:
    """The pairs of a search in the order in which they were accepted."""
    if not pairs:
        return []
    lines = [f"{'layer':<7}{'reads':>6}{'distance':>10}{'similarity':>12}"]
    for pair in pairs:
        numbers = f"{pair['distance']:>10.4g}{pair['similarity']:>12.4f}"
        lines.append(f"{pair['layer']:<7}{pair['owner']:>6}{numbers}")
    return lines


TABLES: dict[str, Callable[[Any], list[str]]] = {"errors": error_lines, "accepted": _pair_lines}
