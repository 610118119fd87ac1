"""Compiles every variant of every Triton kernel ahead of time, for GPUs that are not there.

`python -m tests.triton_aot` compiles those that have changed and writes what they take to
`benchmarks/results/ptx.json`; with names of modules behind it only theirs, with `--all` the
unchanged ones too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "ptx.json"
SHARED = {80: 166912, 90: 232448}  # bytes of shared memory that a program can have
REGISTERS = 168  # of a thread, in programs of four warps: three of them fit
GROWTH = 1.1  # over what the same compiler has made of it


class Key(NamedTuple):
    """A variant and a compute capability."""

    module: str
    variant: str
    capability: int

    def __str__(self) -> str:
        return f"{self.module}/{self.variant}/sm_{self.capability}"


class Cost(NamedTuple):
    """What a compiled kernel takes."""

    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread that do not fit into them
    shared: int  # bytes
    source: str  # a hash of what was compiled
    triton: str  # the version that did


def keys(modules: Sequence[str] = ()) -> list[Key]:
    """The variants of these modules, or of all, for all devices."""
    from kvc.cuda_kernels import FUSED

    return [
        Key(module, variant, capability)
        for module in modules or sorted(FUSED)
        for variant in _variants(module)
        for capability in SHARED
    ]


def _variants(module: str) -> dict[str, Any]:
    made = list(import_module(f"kvc.cuda_kernels.{module}").variants())
    named = {variant.name: variant for variant in made}
    assert len(named) == len(made), f"{module}: two variants have one name"
    return named


def source(key: Key) -> str:
    """A hash of a variant: the text of the kernel and of all it calls, and its options."""
    variant = _variants(key.module)[key.variant]
    options = (sorted(variant.signature.items()), sorted(variant.constexprs.items(), key=str))
    text = "\n".join([*_texts(variant.kernel.fn), str(options), str(variant[-2:])])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _texts(function: Any) -> Iterator[str]:
    from triton.language import constexpr

    yield inspect.getsource(function)
    for name in sorted(set(function.__code__.co_names)):
        value = function.__globals__.get(name)
        if hasattr(value, "fn"):
            yield from _texts(value.fn)
        elif isinstance(value, (int, float, str, constexpr)):
            yield f"{name} = {value}"


def compiled(key: Key) -> Cost:
    """Compiles one variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = _variants(key.module)[key.variant]
    signature, attrs = {}, {}
    for i, name in enumerate(variant.kernel.arg_names):
        kind = "constexpr" if name in variant.constexprs else variant.signature[name]
        signature[name] = _plain(kind)
        for path in _multiples(kind, (i,)):
            attrs[path] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(variant.kernel, signature, dict(variant.constexprs), attrs),
        target=GPUTarget("cuda", key.capability, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    shared = binary.metadata.shared
    return Cost(
        variant.num_warps, registers, stack + local, shared, source(key), triton.__version__
    )


def _plain(kind: Any) -> Any:
    """Types without what is known of values."""
    return tuple(map(_plain, kind)) if isinstance(kind, tuple) else kind.removesuffix(":16")


def _multiples(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Where in the arguments multiples of 16 are."""
    if isinstance(kind, tuple):
        for i, inner in enumerate(kind):
            yield from _multiples(inner, (*path, i))
    elif kind.endswith(":16"):
        yield path


def costs(some: Sequence[Key]) -> dict[str, Cost]:
    """Compiles variants, as many at a time as there are CPUs."""
    spawn = multiprocessing.get_context("spawn")  # Triton's threads do not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        return dict(zip(map(str, some), pool.map(compiled, some), strict=True))


def faults(found: Mapping[str, Cost], kept: Mapping[str, Cost]) -> list[str]:
    """What is wrong with compiled kernels: limits, and growth over the kept figures."""
    said = []
    for name, cost in found.items():
        if cost.spilled:
            said.append(f"{name}: spills {cost.spilled} bytes")
        if cost.warps == 4 and cost.registers > REGISTERS:
            said.append(f"{name}: {cost.registers} registers, more than {REGISTERS}")
        if cost.shared > SHARED[int(name.rsplit("_", 1)[1])]:
            said.append(f"{name}: {cost.shared} bytes of shared memory do not fit")
        old = kept.get(name)
        for what in ("registers", "shared") if old and old.triton == cost.triton else ():
            now, before = getattr(cost, what), getattr(old, what)
            if now > GROWTH * before:
                said.append(f"{name}: {what} grew from {before} to {now}")
    return said


def kept() -> dict[str, Cost]:
    """The figures in the repository."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {name: Cost(**row) for name, row in rows.items()}


def stale(some: Sequence[Key], figures: Mapping[str, Cost]) -> list[Key]:
    """Those that have changed since their figures were kept."""
    return [k for k in some if str(k) not in figures or figures[str(k)].source != source(k)]


def main(*arguments: str) -> int:
    """Compiles and writes; returns 1 and says why if a kernel has a fault, or has grown."""
    modules = [name for name in arguments if name != "--all"]
    figures, every = kept(), keys(modules)
    found = costs(every if "--all" in arguments else stale(every, figures))
    names = {str(key) for key in every}
    others = {
        name: cost
        for name, cost in figures.items()
        if name in names or (modules and name.split("/")[0] not in modules)
    }
    rows = {**others, **found}
    lines = ",\n".join(f'"{name}": {json.dumps(rows[name]._asdict())}' for name in sorted(rows))
    RESULTS.write_text(f"{{\n{lines}\n}}\n")
    said = faults(found, figures)
    print("\n".join(said) or f"{len(found)} compiled, none spills")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
