"""`kvc info`: the backends of this machine, and which ops have kernels there."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules
from typing import Any

import click

from kvc.errors import BackendError

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
        return False, "torch sees no GPU"
    return True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def backends() -> dict[str, dict[str, Any]]:
    """Every backend: whether it runs here, on what, and the versions it has."""
    found = {}
    for name, packages in PACKAGES.items():
        works, what = device(name)
        found[name] = {"available": works, "device": what, "versions": versions(packages)}
    return found


def op_table() -> dict[str, dict[str, str]]:
    """For every op and library: `kernel`, or `definition` where it has no kernel."""
    import kvc.ops
    from kvc.ops.dispatch import KERNELS, registered

    for module in iter_modules(kvc.ops.__path__):
        import_module(f"kvc.ops.{module.name}")
    fused = {library: _fused(package) for library, package in KERNELS.items()}
    return {
        op: {lib: "kernel" if op in names else "definition" for lib, names in fused.items()}
        for op in sorted(registered())
    }


def _fused(package: str) -> set[str]:
    try:
        return set(import_module(package).FUSED)
    except (ImportError, AttributeError):
        return set()


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show the backends found, and which ops have kernels there.

    Example: kvc info --json
    """
    from kvc.api import presets

    found, ops = backends(), op_table()
    if as_json:
        click.echo(json.dumps({"kvc": versions(("kvc",)), "backends": found, "ops": ops}, indent=1))
        return
    for name, row in found.items():
        having = ", ".join(f"{p} {v}" for p, v in row["versions"].items())
        mark = "yes" if row["available"] else "no"
        click.echo(f"{name:<6}{mark:<5}{row['device']}{f' ({having})' if having else ''}")
    click.echo(f"\nmethods: {', '.join(presets())}")
    if not ops:
        return
    wide = max(map(len, ops)) + 2
    click.echo(f"\n{'op':<{wide}}" + "".join(f"{lib:<12}" for lib in next(iter(ops.values()))))
    for op, row in ops.items():
        click.echo(f"{op:<{wide}}" + "".join(f"{what:<12}" for what in row.values()).rstrip())
