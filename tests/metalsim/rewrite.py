"""Metal to C++: what clang cannot read in Metal's syntax, rewritten token by token.

Lines stay where they are, so that every message names the line of the source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | [A-Za-z_]\w* | \d[\w.]*
    | \s+ | :: | -> | \[\[ | \]\] | .""",
    re.DOTALL | re.VERBOSE,
)
SPACES = ("device", "constant", "threadgroup", "thread")
_SCALARS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half")
VECTORS = {f"{scalar}{n}" for scalar in (*_SCALARS, "bfloat", "float") for n in (2, 3, 4)}
_CLOSING = {"(": ")", "<": ">", "[": "]", "{": "}"}


class Parameter(NamedTuple):
    """A parameter of a kernel: a buffer, by pointer or by reference, or a thread attribute."""

    name: str
    kind: str  # "pointer", "reference" or "attribute"
    index: int  # of its buffer; -1 for an attribute


def tokens(source: str) -> list[str]:
    """The source in pieces; joined again they are the source."""
    return _TOKEN.findall(source)


def blank(token: str) -> bool:
    return token.isspace() or token.startswith(("//", "/*"))


def _next(t: Sequence[str], i: int) -> int:
    """The first token from `i` on that is neither space nor comment."""
    while i < len(t) and blank(t[i]):
        i += 1
    return i


def _closed(t: Sequence[str], i: int) -> int:
    """Where the bracket that opens at `i` closes."""
    depth, opening, closing = 0, t[i], _CLOSING[t[i]]
    for j in range(i, len(t)):
        depth += (t[j] == opening) - (t[j] == closing)
        if opening == "[" and t[j] == "]]":
            depth -= 2
        if depth <= 0:
            return j
    raise ValueError(f"`{opening}` is never closed")


def _split(t: Sequence[str]) -> list[list[str]]:
    """Parts between commas that are in no bracket."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in t:
        depth += (token in "(<[{") - (token in ")>]}") if len(token) == 1 else 0
        depth += 2 * ((token == "[[") - (token == "]]"))
        if token == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def rewrite(source: str, constants: Mapping[int, object] | None = None) -> str:
    """The source as C++ for clang and our metal_stdlib.

    Constructors and casts of vectors become calls, threadgroup arrays ask the runtime for memory,
    attributes go, and function constants (by their index) are as they are given, else false.
    """
    t = tokens(source)
    out: list[str] = []
    types = VECTORS | type_names(t)
    before, i = ";", 0  # the last token that is not blank
    while i < len(t):
        token = t[i]
        done = None  # the rewritten text, and where to go on
        if blank(token):
            out.append(token)
            i += 1
            continue
        if token in types:
            done = _constructor(t, i, before)
        elif token == "vec":
            done = _vec(t, i, out)
        elif token == "static_cast":
            done = _cast(t, i)
        elif token == "[[":
            done = "", t.index("]]", i) + 1
        elif token == "template" and t[_next(t, i + 1)] == "[[":
            done = _lines(t[i : t.index(";", i) + 1]), t.index(";", i) + 1  # a host_name
        elif token == "threadgroup" and before in (";", "{", "}", ")"):
            done = _threadgroup(t, i)
        elif token == "constant":
            done = _function_constant(t, i, constants or {})
        if done is None and token in SPACES and before in ("(", ","):
            done = _array_parameter(t, i)
        if done is None and token in SPACES and before in (")", "const"):
            follows = t[_next(t, i + 1)]
            done = ("", i + 1) if follows in (":", "{", ";", "->") else None  # of a method
        text, i = done or (token, i + 1)
        out.append(text)
        before = token
    return "".join(out)


def type_names(t: Sequence[str]) -> set[str]:
    """Names that may stand for a vector: aliases and template parameters."""
    names = set()
    for i, token in enumerate(t):
        if token == "using" and t[_next(t, _next(t, i + 1) + 1)] == "=":
            names.add(t[_next(t, i + 1)])
        elif token in ("typename", "class"):
            name = t[_next(t, i + 1)]
            if t[_next(t, _next(t, i + 1) + 1)] in (",", ">", "="):
                names.add(name)
        elif token == "typedef":
            end = t.index(";", i)
            names.update([x for x in t[i:end] if not blank(x)][-1:])
    return {name for name in names if name.isidentifier()}


def _lines(t: Sequence[str]) -> str:
    return "\n" * "".join(t).count("\n")


def _constructor(t: Sequence[str], i: int, before: str) -> tuple[str, int] | None:
    j = _next(t, i + 1)
    if j >= len(t) or t[j] != "(" or before in ("operator", "~", ".", "->", "typedef"):
        return None
    if t[_next(t, j + 1)] in ("&", "*"):
        return None  # the declarator of a reference or a pointer to an array
    return f"msl::make<{t[i]}>", i + 1


def _vec(t: Sequence[str], i: int, out: list[str]) -> tuple[str, int] | None:
    j = _next(t, i + 1)
    if j >= len(t) or t[j] != "<":
        return None
    end = _closed(t, j)
    if t[_next(t, end + 1)] != "(":
        return None
    if out[-2:] == ["metal", "::"]:
        del out[-2:]
    return f"msl::make<metal::vec{''.join(t[j : end + 1])}>", end + 1


def _cast(t: Sequence[str], i: int) -> tuple[str, int] | None:
    j = _next(t, i + 1)
    end = _closed(t, j)
    if {"*", "&"} & {*t[j:end]}:
        return None  # only of values: clang would reinterpret a vector's bits
    return f"msl::make{rewrite(''.join(t[j : end + 1]))}", end + 1


def _threadgroup(t: Sequence[str], i: int) -> tuple[str, int] | None:
    """`threadgroup float a[N], b[M]` as two arrays of the runtime; None if it is no array."""
    end = t.index(";", i)
    words = [token for token in t[i + 1 : end] if not token.startswith(("//", "/*"))]
    first, *others = _split(words)
    bracket = first.index("[") if "[" in first else len(first)
    if {"*", "&", "(", "="} & {*first[:bracket]}:
        return None
    name = max(k for k in range(bracket) if first[k].isidentifier())
    kind = "".join(first[:name]).strip()
    arrays = [(first[name], first[name + 1 :])]
    for words in others:
        k = _next(words, 0)
        arrays.append((words[k], words[k + 1 :]))
    text = "; ".join(
        f"MSL_THREADGROUP(({kind}), {name}, {''.join(dims).strip()})" for name, dims in arrays
    )
    return text + "\n" * ("".join(t[i:end]).count("\n") - text.count("\n")), end


def _array_parameter(t: Sequence[str], i: int) -> tuple[str, int] | None:
    """`constant int x[2]` as the pointer that it is; clang knows no address space of an array."""
    part = _split(t[i : i + 32])[0]
    end = next((k for k, token in enumerate(part) if token in "()*&"), 0)
    if not end or part[end] != ")" or "[" not in part[:end]:
        return None
    words = [token for token in part[: part.index("[")] if not blank(token)]
    return " ".join((*words[:-1], "*", words[-1])), i + end


def _function_constant(
    t: Sequence[str], i: int, constants: Mapping[int, object]
) -> tuple[str, int] | None:
    """`constant bool name [[function_constant(3)]];` with its value."""
    end = t.index(";", i) if ";" in t[i:] else len(t)
    found = re.fullmatch(
        r"constant\s+([\w:]+)\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)\s*\]\]\s*",
        "".join(t[i:end]),
    )
    if not found:
        return None
    kind, name, index = found.groups()
    value = constants.get(int(index), False)
    value = str(value).lower() if isinstance(value, bool) else value
    return f"static constexpr {kind} {name} = {value}" + _lines(t[i:end]), end


def parameters(source: str, kernel: str) -> list[Parameter]:
    """The parameters of a kernel, in order."""
    t = [token for token in tokens(source) if not blank(token)]
    for i, token in enumerate(t):
        if token == kernel and t[i - 1] == "void" and t[i + 1] == "(":
            return [_parameter(part) for part in _split(t[i + 2 : _closed(t, i + 1)])]
    raise ValueError(f"no kernel {kernel}")


def _parameter(t: Sequence[str]) -> Parameter:
    at = t.index("[[")
    attribute, name = t[at + 1], t[at - 1]
    if attribute != "buffer":
        return Parameter(attribute, "attribute", -1)
    return Parameter(name, "pointer" if "*" in t[:at] else "reference", int(t[at + 3]))
