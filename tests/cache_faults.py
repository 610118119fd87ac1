"""Damage to cache files: cut short, bits turned over, headers edited, some with a new seal."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from random import Random
from typing import Any

from kvc.files.header import canonical

NUMBERS = (0, 1, -1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, -1e308, 1e-320)
OTHERS = (None, True, False, "", "x", "2", [], [0], {}, {"a": 1}, [[0], 1], [[[0], 3]])
DTYPES = ("F64", "F32", "F16", "BF16", "U32", "I32", "I16", "U8", "I64", "BOOL", "F8_E4M3", "?")


def cut(data: bytes, rng: Random) -> bytes:
    """The beginning of a file."""
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: Random) -> bytes:
    """A few bits turned over, half of the time in the header."""
    x, end = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 8)):
        x[rng.randrange(end if rng.random() < 0.5 else len(x))] ^= 1 << rng.randrange(8)
    return bytes(x)


def edit(data: bytes, rng: Random, sealed: bool) -> bytes:
    """Something in the header changed; sealed, the checksum is that of the new content."""
    n = int.from_bytes(data[:8], "little")
    table, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    meta = table["__metadata__"]
    where = rng.random()
    if where < 0.4:
        inner = json.loads(meta["state"])
        change(inner, rng)
        meta["state"] = json.dumps(inner)
    elif where < 0.55:
        inner = json.loads(meta["method"])
        change(inner, rng)
        meta["method"] = json.dumps(inner)
    elif where < 0.65:
        key = rng.choice(sorted(meta))
        meta[key] = rng.choice(["", "x", "2", "float16", "float64", "NaN", "{}", "[" * 9999])
    elif where < 0.9:
        change_tensor(table, body, rng)
    else:
        numbers = bytearray(body)
        for _ in range(64):
            numbers[rng.randrange(len(body))] = rng.randrange(256)
        body = bytes(numbers)
    if sealed:
        with suppress(ValueError, TypeError, KeyError, IndexError):  # of what is no table
            meta["checksum"] = seal(table, body)
    return joined(table, body)


def change(x: Any, rng: Random) -> None:
    """A value somewhere in JSON changed, or a key taken away or given another name."""
    while x:
        key = rng.choice(sorted(x) if isinstance(x, dict) else range(len(x)))
        if isinstance(x[key], dict | list) and x[key] and rng.random() < 0.7:
            x = x[key]
            continue
        roll = rng.random()
        if roll < 0.1 and isinstance(x, dict):
            del x[key]
        elif roll < 0.2 and isinstance(x, dict):
            x[f"{key}s"] = x.pop(key)
        elif roll < 0.4 and isinstance(x[key], int):
            x[key] += rng.choice([-1, 1])
        else:
            x[key] = rng.choice(NUMBERS if roll < 0.8 else OTHERS)
        return


def change_tensor(table: dict[str, Any], body: bytes, rng: Random) -> None:
    """An entry of the table changed."""
    name, other = (rng.choice(sorted(set(table) - {"__metadata__"})) for _ in range(2))
    entry, roll = table[name], rng.random()
    if roll < 0.15:
        table[name], table[other] = table[other], table[name]
    elif roll < 0.3:
        table[rng.choice([f"{name}s", f"{name}.deflated", "tokens", "layers.7.k.window"])] = (
            table.pop(name)
        )
    elif roll < 0.4:
        entry["dtype"] = rng.choice(DTYPES)
    elif roll < 0.7 and entry["shape"]:
        axis, new = rng.randrange(len(entry["shape"])), rng.choice(NUMBERS)
        if rng.random() < 0.5:
            rng.shuffle(entry["shape"])
        else:
            entry["shape"][axis] = new
    elif roll < 0.8:
        entry["shape"] = [1, *entry["shape"]] if rng.random() < 0.5 else entry["shape"][1:]
    else:
        entry["data_offsets"] = [rng.choice([0, len(body), *NUMBERS]) for _ in range(2)]


def seal(table: dict[str, Any], body: bytes) -> str:
    """The checksum, as the format defines it."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    names |= {"U32": "uint32", "I32": "int32", "I16": "int16", "U8": "uint8"}
    meta = {key: x for key, x in table["__metadata__"].items() if key != "checksum"}
    digest = hashlib.sha256(canonical(meta))
    entries = [(name, x) for name, x in table.items() if name != "__metadata__"]
    for name, x in sorted(entries, key=lambda item: item[1]["data_offsets"][0]):
        digest.update(canonical([name, names[x["dtype"]], x["shape"]]))
        digest.update(body[slice(*x["data_offsets"])])
    return digest.hexdigest()


def joined(table: dict[str, Any], body: bytes) -> bytes:
    """A file of a table and the bytes behind it."""
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + body
