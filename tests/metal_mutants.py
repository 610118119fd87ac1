"""Mutation score of the shaders: `python -m tests.metal_mutants [SHADER ...]`.

Each barrier, comparison, loop bound and reduction of a shader is broken in turn, and the cases of
every op that runs it run again. A mutant lives if no case notices. `tests.metal_equivalents` names
those that may, because they mean the same.
"""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import pytest

import kvc.metal_kernels
from kvc.metal_kernels import kernel
from tests.metal_equivalents import EQUIVALENT

BARRIER = re.compile(r"(?:threadgroup|simdgroup)_barrier\([^;]*\);")
REDUCTION = re.compile(r"\bsimd_(?:sum|max|min|prefix_\w+|shuffle_\w+)\(")
COMPARISON = re.compile(r" (?:<|<=|>|>=) ")  # spaces tell them from template brackets
LOOP = re.compile(r"\b(?:for|while) \(")
COMMENT = re.compile(r"//[^\n]*")
LEFT, RIGHT = ("(", ",", ";", "{", "?", ":", "&&", "||", "= ", "return "), (")", ",", ";", "?", ":")


@dataclass(frozen=True)
class Mutant:
    """A change of one shader."""

    shader: str
    line: int
    kind: str
    before: str
    after: str
    text: str  # of the whole file

    def __str__(self) -> str:
        return f"{self.shader}.metal:{self.line} {self.kind}: `{self.before}` -> `{self.after}`"


def mutants(shader: str, text: str) -> Iterator[Mutant]:
    """Every mutant of a shader, in the order of its lines."""
    code = COMMENT.sub(lambda m: " " * len(m[0]), text)
    for start, stop, kind, after in sorted(_changes(code)):
        line = text.count("\n", 0, start) + 1
        changed = text[:start] + after + text[stop:]
        yield Mutant(shader, line, kind, text[start:stop], after, changed)


def _changes(code: str) -> Iterator[tuple[int, int, str, str]]:
    for m in BARRIER.finditer(code):
        yield *m.span(), "barrier", ";"
    for m in REDUCTION.finditer(code):
        stop = _closing(code, m.end() - 1)
        inside = code[m.end() : stop]
        yield m.start(), stop + 1, "reduction", f"({_arguments(inside)[0]})"
    loops = [(m.start(), _closing(code, m.end() - 1)) for m in LOOP.finditer(code)]
    for m in COMPARISON.finditer(code):
        start, stop = _operands(code, *m.span())
        if (
            code.rfind("\n", 0, start) < (at := code.rfind("#", 0, start))
            and "\n" not in code[at:start]
        ):
            continue  # the preprocessor's
        if any(a < start < b for a, b in loops):
            off = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}[m[0].strip()]
            yield start, stop, "loop", code[start : m.start() + 1] + off + code[m.end() - 1 : stop]
        elif "if constexpr" not in code[code.rfind("\n", 0, start) : start]:
            yield start, stop, "bound", "true"
            yield start, stop, "bound", "false"


def _closing(code: str, at: int) -> int:
    """Where the bracket at `at` is closed."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced bracket at {at}")


def _arguments(inside: str) -> list[str]:
    """What stands between commas of one level."""
    parts, depth = [""], 0
    for c in inside:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _operands(code: str, start: int, stop: int) -> tuple[int, int]:
    """The comparison around an operator, from its left operand to its right one."""
    depth, i = 0, start
    while i > 0:
        c = code[i - 1]
        depth += (c in ")]") - (c in "([")
        if depth < 0 or (depth == 0 and any(code.endswith(mark, 0, i) for mark in LEFT)):
            break
        i -= 1
    depth, j = 0, stop
    while j < len(code):
        c = code[j]
        if depth == 0 and (c in RIGHT or code.startswith((" &&", " ||", " ?", " :"), j)):
            break
        depth += (c in "([") - (c in ")]")
        j += 1
    while code[i] in " \n":
        i += 1
    return i, j


def survives(mutant: Mutant, check: Callable[[], None]) -> bool:
    """Whether the op's cases do not notice the mutant."""
    text = kernel.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernel, "text", lambda name: mutant.text if name == mutant.shader else text(name)
        )
        kernel._kernel.cache_clear()
        try:
            check()
        except Exception:  # whatever went wrong, it was noticed
            return False
        finally:
            kernel._kernel.cache_clear()
    return True


def checks() -> dict[str, list[Callable[[], None]]]:
    """For each shader the quick cases of every op that runs it."""
    found: dict[str, list[Callable[[], None]]] = {}
    for op in sorted(kvc.metal_kernels.FUSED):
        module = import_module(f"tests.test_metal_{op}")
        for shader in (op, *getattr(module, "INCLUDED", ())):
            found.setdefault(shader, []).append(module.check_quickly)
    return found


def lived(shader: str, start: int) -> Iterator[int]:
    """Which mutants of a shader live, from number `start` on, as another process finds out.

    A mutant may take the process with it; then it was noticed, and the next one gets a new process.
    """
    total = len([*mutants(shader, kernel.text(shader))])
    while start < total:
        command = [sys.executable, "-m", "tests.metal_mutants", f"{shader}:{start}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                start, verdict = int(line.split()[0]) + 1, line.split()[1]
                if verdict == "lives":
                    yield start - 1
        if process.returncode == 2:
            raise SystemExit(f"{shader}: the cases fail without a mutant")
        start += process.returncode != 0


def judge(shader: str, start: int) -> None:
    """Prints the number and the fate of each mutant from `start` on."""
    found = checks()[shader]
    try:
        for check in found:
            check()
    except Exception:
        traceback.print_exc()
        raise SystemExit(2) from None
    for i, mutant in enumerate(mutants(shader, kernel.text(shader))):
        if i >= start:
            alive = all(survives(mutant, check) for check in found)
            print(i, "lives" if alive else "dies", flush=True)


def main() -> None:
    """Prints the score of every shader, and every survivor."""
    shaders = sys.argv[1:] or sorted(checks())
    for shader in shaders:
        if ":" in shader:
            name, _, start = shader.partition(":")
            judge(name, int(start))
            continue
        every = list(mutants(shader, kernel.text(shader)))
        left = [every[i] for i in lived(shader, 0)]
        reasons = {m: EQUIVALENT.get((shader, m.before, m.after)) for m in left}
        same, killed = sum(why is not None for why in reasons.values()), len(every) - len(left)
        print(f"{shader}.metal: {len(every)} mutants, {killed} killed, {same} mean the same")
        for m, why in reasons.items():
            print(f"  {m}: {why or 'NOT KNOWN TO MEAN THE SAME'}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
