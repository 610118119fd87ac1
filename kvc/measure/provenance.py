"""What made a row: the commit, and the packages that were installed."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with `+` behind it if files differ; KVC_COMMIT where git is not."""
    if not (ROOT / ".git").exists():
        return os.environ.get("KVC_COMMIT")
    try:
        head, changed = (
            subprocess.run(
                ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for args in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("KVC_COMMIT")
    return head + "+" * bool(changed)
