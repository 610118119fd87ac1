"""`kvc info`: the backends of this machine, and which ops have kernels there; models; artifacts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules
from typing import Any

import click

from kvc.cli.artifact import show_artifact
from kvc.cli.run import in_units, load
from kvc.errors import BackendError, ConfigError

PACKAGES = {"mlx": ("mlx", "mlx-lm"), "cuda": ("torch", "transformers", "triton")}
PACKAGES["cpu"] = PACKAGES["cuda"][:2]


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device(name: str) -> tuple[bool, str]:
    """Whether a backend runs here, and on what, or why not."""
    from kvc.api import check_backend

    try:
        check_backend(name)
    except BackendError as error:
        return False, str(error)
    if name == "mlx":
        mx = import_module("mlx.core")
        return True, "Metal" if mx.metal.is_available() else str(mx.default_device().type.name)
    torch = import_module("torch")
    if name == "cpu":
        return True, f"{torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return False, "torch sees no GPU" if built else "this torch is built without CUDA"
    return True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def backends() -> dict[str, dict[str, Any]]:
    """Every backend: whether it runs here, on what, and the versions it has."""
    found = {}
    for name, packages in PACKAGES.items():
        works, what = device(name)
        found[name] = {"available": works, "device": what, "versions": versions(packages)}
    return found


def op_table(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, str | None]]:
    """For every op and backend why its definition runs there, or None where a kernel does.

    Args:
        found: From `backends`.
    """
    import kvc.ops
    from kvc.ops.dispatch import registered

    for module in iter_modules(kvc.ops.__path__):
        import_module(f"kvc.ops.{module.name}")
    ops = sorted(registered())
    return {op: {name: why_definition(op, name, row) for name, row in found.items()} for op in ops}


def why_definition(op: str, backend: str, row: dict[str, Any]) -> str | None:
    """Why a backend of this machine has no kernel for an op; None if it has one.

    A kernel may still refuse arguments; then the definition runs after all.
    """
    from kvc.api import BACKENDS
    from kvc.ops.dispatch import KERNELS, why_no_kernel

    library = BACKENDS[backend].library
    package = KERNELS[library]
    try:
        has_kernel = op in import_module(package).FUSED
    except ImportError as error:
        return f"{package} does not import: {(str(error).splitlines() or ['no reason'])[0]}"
    if not has_kernel:
        return why_no_kernel(op, library)
    if not row["available"] or backend == "cpu" or (backend == "mlx" and row["device"] != "Metal"):
        return f"{package} needs a {'Metal' if library == 'mlx' else 'CUDA'} GPU"
    return None


def show_ops(ops: dict[str, dict[str, str | None]]) -> None:
    """The table, and under it every reason with the ops that it holds for."""
    wide = max(map(len, ops)) + 2
    names = list(next(iter(ops.values())))
    click.echo(f"\n{'op':<{wide}}" + "".join(f"{name:<12}" for name in names).rstrip())
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, row in ops.items():
        cells = ("definition" if why else "kernel" for why in row.values())
        click.echo(f"{op:<{wide}}" + "".join(f"{cell:<12}" for cell in cells).rstrip())
        for name, why in row.items():
            if why:
                reasons.setdefault((name, why.removesuffix(f" for {op}")), []).append(op)
    if reasons:
        click.echo("\na definition runs because")
    for (name, why), where in reasons.items():
        which = "any op" if len(where) == len(ops) else ", ".join(where)
        click.echo(f"  {name}: {why} for {which}")


def model_facts(model: str, backend: str) -> dict[str, Any]:
    """The sizes of a model that a cache depends on, and what every preset costs there.

    Raises:
        KVCError: If the model or the backend is not there, or the model takes no cache of ours.
    """
    from kvc.api import cost_table

    engine = load(backend, model)
    shape = engine.shape
    return {
        "model": model,
        "backend": engine.name,
        "fingerprint": shape.fingerprint,
        "family": shape.family,
        "layers": dict(Counter(shape.layer_kinds)),
        "heads": shape.n_heads,
        "kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "context": shape.context_length,
        "dtype_bytes": shape.dtype_bytes,
        "methods": [asdict(row) for row in cost_table(shape)],
    }


def show_model(facts: dict[str, Any]) -> None:
    """The facts of a model, for a reader."""
    kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in facts["layers"].items())
    for name, text in (
        ("model", facts["model"]),
        ("id", facts["fingerprint"]),
        ("family", facts["family"]),
        ("layers", f"{sum(facts['layers'].values())} ({kinds})"),
        ("heads", f"{facts['heads']}, of keys and values {facts['kv_heads']}"),
        ("head_dim", facts["head_dim"]),
        ("context", f"{facts['context']} tokens" if facts["context"] else "not stated"),
        ("dtype", f"{facts['dtype_bytes']} bytes, on {facts['backend']}"),
    ):
        click.echo(f"{name:<10}{text}")
    wide = max(len(row["method"]) for row in facts["methods"]) + 2
    click.echo(f"\n{'method':<{wide}}{'bytes/token':>12}{'constant':>12}{'ratio':>8}")
    for row in facts["methods"]:
        if not (row["bytes_per_token"] or row["fixed_bytes"]):  # it has no price; its note says why
            click.echo(f"{row['method']:<{wide}}{row['note']}")
            continue
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        size = in_units(row["fixed_bytes"]) if row["fixed_bytes"] else "-"
        line = f"{row['method']:<{wide}}{row['bytes_per_token']:>12.1f}{size:>12}{ratio:>8}"
        click.echo(f"{line}  {row['note']}".rstrip())


@click.command()
@click.argument("artifact", required=False)
@click.option(
    "--model", help="A folder or a name on the Hugging Face hub: what presets cost there."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "mlx", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="What loads the model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(artifact: str | None, model: str | None, backend: str, as_json: bool) -> None:
    """Show the backends found, and which ops have kernels there; or a model; or ARTIFACT.

    ARTIFACT is a file of LESS kernels, a KVSharer map or a profile of kvc tune, or a repository of
    the Hugging Face hub with one; or a cache file.

    Example: kvc info --json
    """
    from kvc.api import presets
    from kvc.demo import path

    if artifact is not None and (model is not None or backend != "auto"):
        raise ConfigError(
            f"info: expected ARTIFACT or --model, got {artifact!r} and "
            f"{'--backend' if model is None else '--model'}"
        )
    if artifact is not None:
        show_artifact(artifact, as_json)
        return
    if model is None and backend != "auto":
        raise ConfigError("info: --backend says what loads --model, got no --model")
    if model is not None:
        facts = model_facts(model, backend)
        if as_json:
            click.echo(json.dumps(facts, indent=1))
        else:
            show_model(facts)
        return
    found = backends()
    ops = op_table(found)
    if as_json:
        cells = {
            op: {
                name: {"runs": "definition" if why else "kernel", "why": why}
                for name, why in row.items()
            }
            for op, row in ops.items()
        }
        facts = {"kvc": versions(("kvc",)), "model": str(path()), "methods": presets()}
        click.echo(json.dumps({**facts, "backends": found, "ops": cells}, indent=1))
        return
    for name, row in found.items():
        having = ", ".join(f"{p} {v}" for p, v in row["versions"].items())
        mark = "yes" if row["available"] else "no"
        click.echo(f"{name:<6}{mark:<5}{row['device']}{f' ({having})' if having else ''}")
    click.echo(f"\nbundled model: {path()}\nmethods: {', '.join(presets())}")
    show_ops(ops)
