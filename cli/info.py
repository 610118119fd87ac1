"""`kvc info`: the backends of this machine, and the ops with their kernels."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import click

import kvc.ops.codec  # noqa: F401 - registers its ops
from kvc.ops.dispatch import KERNELS, registered

LIBRARIES = {"mlx": ("mlx", "mlx-lm"), "torch": ("torch", "transformers", "triton")}


@click.command()
def info() -> None:
    """Show the libraries that are installed, and which op has a kernel where."""
    for backend, packages in LIBRARIES.items():
        click.echo(f"{backend}: " + ", ".join(f"{name} {_version(name)}" for name in packages))
    click.echo(f"\n{'op':16}" + "".join(f"{library:14}" for library in KERNELS))
    for name in registered():
        cells = [
            "kernel" if name in importlib.import_module(package).FUSED else "definition"
            for package in KERNELS.values()
        ]
        click.echo(f"{name:16}" + "".join(f"{cell:14}" for cell in cells))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
