"""Text as markup, and numbers as text. Whatever comes from rows is escaped here, and only here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from html import escape
from typing import Any
from unicodedata import east_asian_width

THIN = "\u202f"  # a narrow space that does not break, between a number and its unit
MINUS = "\u2212"
NONE = "\u2013"  # what is not known
ROUNDING = 1e-8  # what sums of float32 leave where nothing is
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# these turn the text around them, so that a label could pass for another's number
_TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def words(text: Any) -> str:
    """Text that is not markup, as markup: for contents and for attributes."""
    return escape(_TURNING.sub("", _ILLEGAL.sub("\ufffd", str(text))), quote=True)


def tag(name: str, *inside: str, **attributes: Any) -> str:
    """An element. `inside` is markup; attributes are text, left out where None.

    Underscores at the end of an attribute's name are dropped, others become hyphens.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{words(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{''.join(inside)}</{name}>"


def short(text: str, most: int) -> str:
    """Text of `most` characters at most: settings differ at the end, so the middle is left out."""
    head = most // 3
    return text if len(text) <= most else f"{text[:head]}\u2026{text[head + 1 - most :]}"


def width(text: str, size: float = 12.0) -> float:
    """How wide a line of text is at most in the usual sans serifs, about; as `size` is."""
    wide = sum(east_asian_width(letter) in "WF" for letter in text)
    capital = sum(letter.isupper() or letter in "mw%@" for letter in text)
    thin = sum(letter in "iljtf.,:;'|!()[] " + THIN for letter in text)
    plain = len(text) - wide - capital - thin
    return size * (1.0 * wide + 0.86 * capital + 0.37 * thin + 0.635 * plain)


def known(x: Any) -> bool:
    """Whether that is a number, and a finite one."""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def number(x: Any, digits: int = 4) -> str:
    """A number to so many digits; whole ones of up to seven places are kept whole."""
    if not known(x):
        return NONE
    if 0 < abs(x) < ROUNDING:
        return "≈ 0"
    if x == int(x) and abs(x) < 10**7:
        text = f"{int(x):,}".replace(",", THIN)
    elif 1e-4 <= abs(x) < 10**7:
        text = _grouped(f"{x:.{max(digits - 1 - math.floor(math.log10(abs(x))), 0)}f}")
    else:
        base, _, power = f"{x:.{digits - 2}e}".partition("e")
        text = f"{base}e{int(power)}"
    return text.replace("-", MINUS)


def three(x: Any) -> str:
    """A number to three digits."""
    return number(x, 3)


def _grouped(text: str) -> str:
    """With thin spaces between thousands."""
    whole, dot, rest = text.partition(".")
    return f"{int(whole):,}".replace(",", THIN) + dot + rest if len(whole) > 4 else text


def percent(x: Any, places: int = 1) -> str:
    """A share as percent; with more places where it would read as 0 or as 100 and is not."""
    if not known(x):
        return NONE
    while places < 4 and x not in (0, 1) and float(f"{100 * x:.{places}f}") in (0.0, 100.0):
        places += 1
    text = "0" if x == 0 else "100" if x == 1 else f"{100 * x:.{places}f}"
    return f"{text}{THIN}%".replace("-", MINUS)


def tick(x: float) -> str:
    """A round number, with no more digits than it needs."""
    whole, point, rest = number(x, 6).partition(".")
    base, e, power = rest.partition("e")
    base = base.rstrip("0")
    return f"{whole}{point if base else ''}{base}{e}{power}"


def tick_percent(x: float) -> str:
    """A round share."""
    return f"{tick(round(100 * x, 6))}{THIN}%"


def signed(x: float, form: str) -> str:
    """That text with a plus before what is not negative."""
    return form if x < 0 else f"+{form}"


def size(x: Any) -> str:
    """Bytes, in the unit that suits them."""
    if not known(x):
        return NONE
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(abs(x)).bit_length() - 1, 0) // 10, 4)
    return f"{number(x / 1024**power, 3)}{THIN}{units[power]}"


def listed(texts: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last
