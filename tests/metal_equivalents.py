"""Mutants of the shaders that mean the same as the shader, and why: no test can tell them apart.

By shader: what stood there, what stands there instead, and the reason.
"""

_SPEED = "how tokens lie over lanes: slower, not different"
_GUARDED = "the body has a guard of its own against one round more"
_AHEAD = "one round more sees no token"
_MORE = "reads entries of other tokens too, which change nothing"
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
    "coded_rest": {
        **{
            (x, "false"): _MORE
            for x in (
                "place < begin",
                "place >= high",
                "vector >= 0",
                "vector < first",
                "vector < 0",
                "vector >= first + live * side.vectors",
            )
        },
        (
            "high.x < count",
            "true",
        ): "behind the last entry stands the block's end, which ends a tile",
        ("way < 0", "way <= 0"): "way is -1 or 1",
    },
    "coded_tile": {
        **{
            (f"{x} {mark} {n}", to): _SPEED
            for x, mark, n in (
                ("ROWS", ">", 4),
                ("D", "<=", 128),
                ("LANES", "<", 4),
                ("ROWS", "<", 4),
            )
            for to in ("true", "false")
        },
        ("round < S", "round <= S"): "one barrier more",
        ("round > 0", "true"): "one barrier more",
        ("step < S", "step <= S"): "a score that another lane has is found once more",
        ("step < piece.live", "step <= piece.live"): _AHEAD,
        ("a < S", "a <= S"): "a score that the next step finds, or nobody asks for",
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
