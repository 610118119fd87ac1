"""The checkout, the mapping in pyproject.toml and the wheel show the same packages."""

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("backends", "metal_kernels", "cuda_kernels", "cli")
TOP = {"kvc", *LINKED, "tests", "benchmarks", "pyproject.toml", "README.md", "LICENSE"}
MAX_LINES = 300
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = SETTINGS["tool"]["setuptools"]


def sources() -> list[Path]:
    """Every module of the packages, once: links are not followed."""
    found = [
        path
        for folder in ("kvc", *LINKED)
        for path in (ROOT / folder).rglob("*.py")
        if not any((ROOT / "kvc" / name) in path.parents for name in LINKED)
    ]
    return sorted(found)


def module_path(path: Path) -> Path:
    """Where a source file lies in the wheel."""
    relative = path.relative_to(ROOT)
    return relative if relative.parts[0] == "kvc" else Path("kvc") / relative


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    shown = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in shown.stdout.split("\0") if name]


@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative_and_stands(name: str) -> None:
    link = ROOT / "kvc" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


def test_every_package_is_listed() -> None:
    found = {
        ".".join(module_path(path).parent.parts) for path in sources() if path.name == "__init__.py"
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


@pytest.mark.parametrize("name", LINKED)
def test_linked_package_is_mapped(name: str) -> None:
    assert SETUPTOOLS["package-dir"][f"kvc.{name}"] == name


def test_top_level_is_fixed() -> None:
    names = {name.split("/")[0] for name in tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP


def test_modules_are_short() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources()
    }
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


@pytest.mark.slow
def test_wheel_has_every_module_and_data_file(tmp_path: Path) -> None:
    try:
        have = version("setuptools")
    except PackageNotFoundError:
        pytest.skip("setuptools is not installed")
    if int(have.split(".")[0]) < 77:
        pytest.skip(f"setuptools 77 or newer is needed, {have} is installed")
    checkout = tmp_path / "checkout"  # a copy, so that the build leaves nothing behind
    checkout.mkdir()
    for name in ("kvc", *LINKED):
        shutil.copytree(
            ROOT / name,
            checkout / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(checkout)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("kvc-*.whl")
    with ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}

    data = [
        *(
            path
            for pattern in ("*.json", "*.safetensors", "*.md", "*.txt")
            for path in (ROOT / "kvc" / "demo").glob(pattern)
        ),
        *(ROOT / "metal_kernels").glob("*.metal"),
        ROOT / "kvc" / "py.typed",
    ]
    expected = {module_path(path).as_posix() for path in [*sources(), *data]}
    assert inside == expected
