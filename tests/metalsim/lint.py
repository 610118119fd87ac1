"""What Apple's compiler refuses and clang cannot see: found in the tokens of the source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.metalsim.rewrite import SPACES, VECTORS, blank, tokens, type_names

_SCALARS = {"bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half"}
_TYPES = VECTORS | _SCALARS | {"float", "bfloat", "bfloat16_t", "size_t", "float16_t"}
_TYPES |= {f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)}
_BESIDE = {"const", "volatile", "metal", "::", "static", "inline", "constexpr", "METAL_FUNC"}


def complaints(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each error.

    A pointer or reference without an address space, and a threadgroup variable outside of a kernel.
    """
    numbered, line = [], 1
    for token in tokens(source):
        if not blank(token):
            numbered.append((token, line))
        line += token.count("\n")
    t = [token for token, _ in numbered]
    types = _TYPES | type_names(tokens(source))
    functions = _enclosing(t)
    for i, (token, line) in enumerate(numbered):
        if token in "*&" and i and t[i - 1] in types and _declares(t, i) and not _placed(t, i - 1):
            yield line, f"`{t[i - 1]}{token}` names no address space, thread or another"
        if token == "threadgroup" and t[i - 1] in ";{}" and functions[i] == "function":
            end = t.index(";", i)
            bracket = t.index("[", i) if "[" in t[i:end] else end
            if not {"*", "&", "("} & {*t[i:bracket]}:
                yield line, "a threadgroup variable can only be declared in a kernel"


def _declares(t: Sequence[str], i: int) -> bool:
    """Whether `*` or `&` after a type belongs to it: `T* x`, `T*)`, and not `sizeof(T) * 2`."""
    after = t[i + 1]
    return (after.isidentifier() or after in ("*", ")", ",")) and t[i - 2] not in (".", "->")


def _placed(t: Sequence[str], i: int) -> bool:
    """Whether an address space stands among the words of a declaration that ends at `i`."""
    while i > 0 and (t[i - 1] in _BESIDE or t[i - 1] in SPACES):
        i -= 1
        if t[i] in SPACES:
            return True
    return t[i - 1] == "<" and t[i - 2] != "static_cast"  # an argument of a template: any type


def _enclosing(t: Sequence[str]) -> list[str]:
    """For each token what it is in: "kernel", "function" or "" for neither."""
    inside: list[str] = [""]
    kinds, start = [], 0
    for i, token in enumerate(t):
        kinds.append(inside[-1])
        if token == "{":
            words = {*t[start:i]}
            if inside[-1]:
                kind = inside[-1]
            elif {"namespace", "struct", "class", "union", "enum"} & words and ")" not in t[i - 1]:
                kind = ""
            elif "(" in words:
                kind = "kernel" if "kernel" in words else "function"
            else:
                kind = ""
            inside.append(kind)
        elif token == "}" and len(inside) > 1:
            inside.pop()
        if token in ";{}":
            start = i + 1
    return kinds
