"""Compiles a kernel with clang: the strict, check and fast passes, and the runtime; all cached."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tests.metalsim.lint import complaints
from tests.metalsim.rewrite import Parameter, parameters, rewrite

CLANG = "clang++-19"
HERE = Path(__file__).parent
KERNELS = "mlx/backend/metal/kernels/"  # where MLX's headers include each other from
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+(?:"([^"]+)"|<[^>]+>).*$', re.MULTILINE)
_OURS = ("bf16.h", "bf16_math.h", "complex.h", "logging.h")  # in our own words
_PREFIX = ("utils.h", "defines.h", "steel/utils/type_traits.h", *_OURS)
_LANGUAGE = shlex.split("""
-x c++ -std=c++17 -nostdinc -fno-exceptions -fno-rtti -fno-strict-aliasing -ffp-contract=off
-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none
-Xclang -cl-single-precision-constant -Xclang -fno-validate-pch
-fPIC -mavx2 -mfma -mf16c -g1
-Wno-everything -Wuninitialized -Wsometimes-uninitialized
""")
_PASSES = {
    "strict": shlex.split("""
        -DMETALSIM_STRICT -Wimplicit-float-conversion -Wno-implicit-int-float-conversion
    """),
    "check": shlex.split("""
        -O1 -fsanitize=thread -mllvm -tsan-instrument-func-entry-exit=0
        -mllvm -tsan-instrument-read-before-write=1 -fno-vectorize -fno-slp-vectorize
        -fsanitize=array-bounds,shift,integer-divide-by-zero,alignment
        -ftrivial-auto-var-init=pattern
    """),
    "fast": ["-O2"],
}
_DIAGNOSTIC = re.compile(r"^(\S+:\d+:\d+: )(?:fatal )?(error|warning|note)", re.MULTILINE)
_COUNT = re.compile(r"^\d+ (?:warning|error)s? .*generated\.$", re.MULTILINE)
_TO_BFLOAT = re.compile(r" to (?:'[^']*' \(aka )?'[^']*(?:bfloat|__bf16)'")  # Metal has none
# Words of C++ that Metal does not have
_POISON = "#pragma GCC poison double goto virtual new delete dynamic_cast typeid try catch throw\n"


class MetalError(Exception):
    """What is wrong with a kernel: the fault, the source line, and the thread that met it."""


class CompileError(MetalError):
    """A kernel that Metal would not compile."""


class Source(NamedTuple):
    """A kernel as text."""

    name: str  # of the file, in messages
    text: str  # in Metal
    kernel: str
    call: str  # the kernel with its template arguments


class Binary(NamedTuple):
    """A compiled kernel."""

    path: Path
    source: Source
    parameters: tuple[Parameter, ...]


def folder() -> Path:
    """The folder of compiled objects; each is named after everything that it was made of."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    objects = Path(base) / "kvc-metalsim"
    objects.mkdir(parents=True, exist_ok=True)
    return objects


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    return None if shutil.which(CLANG) else f"{CLANG} is not installed"


@cache
def _rules() -> list[str]:
    """What decides how a kernel is compiled, and whether it is accepted."""
    return [(HERE / name).read_text() for name in ("build.py", "lint.py")]


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, (CLANG, *parts))).encode()).hexdigest()[:24]


def _published(name: str, make: Callable[[Path], None]) -> Path:
    """A file of the cache; the first process that has it whole puts it there."""
    final = folder() / name
    if not final.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as own:
            made = Path(own) / name
            make(made)
            with suppress(FileExistsError):  # from another process, of the same content
                os.link(made, final)
    return final


def _start(*command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _finish(*processes: subprocess.Popen[str]) -> None:
    """Waits for all. Raises CompileError for what clang, or Metal, takes for an error."""
    said = [process.communicate()[1] for process in processes]
    for process, text in zip(processes, said, strict=True):
        blocks = _DIAGNOSTIC.split(text)[1:]  # kind, place and text, of each
        found, keep = [], False
        for place, kind, rest in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
            bfloat = "implicit" in rest and _TO_BFLOAT.search(rest)
            wrong = kind == "error" or "uninitialized" in rest or bfloat
            keep = bool(wrong) or (keep and kind == "note")
            if keep:
                found.append(f"{place}{'note' if kind == 'note' else 'error'}{rest}")
        if process.returncode or found:
            raise CompileError(_COUNT.sub("", "".join(found) or text).strip())


@cache
def runtime() -> Path:
    """The library that plays the GPU."""
    sources = sorted(HERE.glob("runtime/*.cpp"))
    texts = [p.read_text() for p in (*sources, *HERE.glob("runtime/*.h"), HERE / "include/abi.h")]

    flags = shlex.split("-std=c++17 -O2 -g1 -fPIC -shared -Wl,--no-as-needed -lm")

    def make(to: Path) -> None:
        _finish(_start(CLANG, *sources, *flags, "-o", to))

    return _published(f"runtime-{_digest(*flags, *texts)}.so", make)


def mlx_include() -> Path:
    """Where MLX ships the headers of its own kernels."""
    return Path(find_spec("mlx").submodule_search_locations[0]) / "include"


def flat(text: str, seen: set[str] | None = None) -> str:
    """The text with its includes in place, each once, less those of our prefix."""
    seen = {KERNELS + name for name in _PREFIX} if seen is None else seen

    def put(found: re.Match[str]) -> str:
        name = found[1]
        if not name or name in seen:
            return ""
        seen.add(name)
        own = HERE / "include" / name
        path = own if own.exists() else mlx_include() / name
        if not path.exists():
            raise CompileError(f"no file to include: {name}")
        return flat(path.read_text(), seen)

    return _INCLUDE.sub(put, re.sub(r"^#pragma once$", "", text, flags=re.MULTILINE))


@cache
def _prefix(mode: str) -> Path:
    """What comes before every kernel, precompiled for a pass."""
    parts = [HERE / "include/metal_stdlib", HERE / "include/mlx_prefix.h"]
    ours, mlx = (flat(part.read_text(), {KERNELS + name for name in _OURS}) for part in parts)
    text = ours + rewrite(mlx)
    flags = [*_LANGUAGE, *_PASSES[mode]]
    digest = _digest(text, *flags)
    header = _published(f"prefix-{digest}.h", lambda to: to.write_text(text) and None)

    def make(to: Path) -> None:
        _finish(_start(CLANG, *flags, "-x", "c++-header", header, "-o", to))

    return _published(f"prefix-{digest}.pch", make)


def build(
    source: Source, mode: str, constants: Mapping[int, object] | None = None, strict: bool = True
) -> Binary:
    """Compiles a kernel for the check or the fast pass.

    Args:
        source: The kernel.
        mode: "check" or "fast".
        constants: Values of function constants, by index.
        strict: Whether the check pass also compiles it with real address spaces.
    """
    return _build(source, mode, tuple((constants or {}).items()), strict and mode == "check")


@cache
def _build(
    source: Source, mode: str, constants: tuple[tuple[int, object], ...], strict: bool
) -> Binary:
    params = parameters(source.text, source.kernel)
    text = rewrite(source.text, dict(constants))
    body = f'{_POISON}#line 1 "{source.name}.metal"\n{text}\n#line 1 "entry"\n'
    arguments = ", ".join(
        f"msl::Attribute(MSL_{p.name})"
        if p.kind == "attribute"
        else f"msl::{p.kind.title()}{{b[{p.index}]}}"
        for p in params
    )
    entry = f'extern "C" MSL_PLAIN void msl_entry(void** b) {{ {source.call}({arguments}); }}\n'
    instance = (
        "" if source.call == source.kernel else f"template decltype({source.call}) {source.call};\n"
    )

    def make(to: Path) -> None:
        own = to.parent
        for line, what in complaints(source.text) if strict else ():
            raise CompileError(f"{source.name}.metal:{line}: error: {what}")
        compiled = own / "kernel.o"
        running = [_compile(own / f"{source.name}.metal", body + entry, mode, "-c", "-o", compiled)]
        if strict:  # first, for its messages are about the source
            check = _compile(
                own / f"strict-{source.name}.metal", body + instance, "strict", "-fsyntax-only"
            )
            running.insert(0, check)
        _finish(*running)
        # ours is the only runtime that answers the sanitizers' calls; it brings the math library
        _finish(_start("ld", "-shared", compiled, runtime(), "-o", to))

    made_of = [runtime(), _prefix(mode), *([_prefix("strict")] if strict else [])]
    digest = _digest(body, entry, *made_of, *_rules())
    return Binary(_published(f"kernel-{digest}.so", make), source, tuple(params))


def _compile(unit: Path, text: str, mode: str, *arguments: str | Path) -> subprocess.Popen[str]:
    unit.write_text(text)
    flags = [*_LANGUAGE, *_PASSES[mode], "-include-pch", _prefix(mode)]
    return _start(CLANG, *flags, *arguments, unit)
