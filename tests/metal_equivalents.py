"""Mutants of the shaders that mean the same as the shader, and why: no test can tell them apart.

By shader: what stood there, what stands there instead, and the reason.
"""

_SPEED = "how tokens lie over lanes: slower, not different"
_GUARDED = "the body has a guard of its own against one round more"
_AHEAD = "one round more sees no token"
_PADDING = "the element behind the last is padding that nobody reads"
_OF: dict[str, dict[tuple[str, str], str]] = {
    "attend_coded": {
        ("RANK > 0", "true"): "the length of an array that nobody reads",
        ("K_GROUPS > 0", "true"): "the length of an array that nobody reads",
        ("other < SIMDS", "other <= SIMDS"): "one barrier more",
    },
    "attend_state": {("strip < PIECES", "strip <= PIECES"): _GUARDED},
    "coded": {
        (
            "e < E",
            "e <= E",
        ): "keeps one level more than is read; of 8 it is behind the array, which "
        "the simulator takes for one of open length, being a structure's last member",
    },
    "attend_dense": {
        ("LANES < 4", "true"): "tokens read ahead: slower, not different",
        ("tile < stop", "tile <= stop"): _AHEAD,
        ("tile + step < stop", "tile + step <= stop"): _AHEAD,
        ("f < FOURS", "f <= FOURS"): _GUARDED,
    },
    "softmax": {
        **{(f"pieces > {n}", x): _SPEED for n in (2, 4, 8, 16) for x in ("true", "false")},
        ("first < stack", "first <= stack"): _GUARDED,
        ("f < Shape", "f <= Shape"): _GUARDED,
        ("s < SIMDS", "s <= SIMDS"): "one barrier more",
    },
    "attention_mass": {
        ("first < end", "first <= end"): _AHEAD,
        ("first > older", "false"): "skips rows that see none of the keys: slower, not different",
        ("row < rows", "row <= rows"): _AHEAD,
        ("e < QUERIES * D", "e <= QUERIES * D"): _PADDING,
    },
    "attention_lse": {
        ("first < end", "first <= end"): _AHEAD,
        ("e < QUERIES * D", "e <= QUERIES * D"): _PADDING,
        ("i < BLOCKS", "i <= BLOCKS"): "fills a matrix behind a private array, which nobody reads",
    },
    "fold_evicted": {
        ("q0 < stop", "q0 <= stop"): _AHEAD,
        ("unit0 < M", "unit0 <= M"): _GUARDED,
        ("e < ROWS * R * D", "e <= ROWS * R * D"): _GUARDED,
    },
    "encode_fit": {
        ("step > 0", "false"): "columns that are orthonormal already span the same space",
        ("j < WIDE", "j <= WIDE"): _GUARDED,
        ("i < EACH", "i <= EACH"): _GUARDED,
    },
    "encode_dual": {
        ("j < WIDE", "j <= WIDE"): _GUARDED,
        ("pass < 2", "pass <= 2"): "a mean that is refined twice is not refined further",
        ("PER > EACH", "true"): "writes parts that nobody reads",
    },
    "quantize": {
        ("walk < 2", "walk <= 2"): "writes once more what it has written",
        ("at < stop", "at <= stop"): "a piece without tokens",
        ("stop - first > uint(piece)", "true"): "reads again what it has: slower, not different",
        ("index[row + k]) < end", "index[row + k]) <= end"): _PADDING,
    },
}
EQUIVALENT = {(name, *key): why for name, found in _OF.items() for key, why in found.items()}
