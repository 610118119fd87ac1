"""What the Metal kernels move and take: `python -m tests.metal_table`.

Bytes that a launch loads and stores in device memory are counted in the simulator, over the least
possible: every byte of the op's inputs loaded once, every byte of its results stored once. What
launches of one op hand to each other counts as extra.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from kvc.methods import parse
from kvc.ops.attention import Partial, attend_coded, attend_dense, join
from kvc.ops.codec import arrays, encode
from kvc.ops.dispatch import mode
from kvc.ops.evict import Kernels, attend_state, fold_evicted
from kvc.ops.mass import attention_mass
from kvc.ops.merge import merge_pair
from kvc.ops.quant import quantize
from kvc.ops.residual import Seed
from kvc.store.coded import Coded
from kvc.store.store import KVStore
from tests import metalsim
from tests.metal import ATTENTION, op_of

B, H, HQ, D, SCALE = 1, 8, 32, 128, 128**-0.5
DTYPE = mx.float16
LENGTHS = (1000, 4096)
CODECS = {
    f"{name}, {bits} bits": (name, {"bits": bits})
    for name in ("kivi", "gear-l", "gear")
    for bits in (2, 4, 8)
} | {name: (name, {}) for name in ("kcvt", "token", "gear2")}
METHODS = ("kivi", "kcvt", "token", "gear-l", "gear-s", "gear", "gear2", "minicache",
           "minicache+gear", "streaming", "h2o", "tova", "h2o+token")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One op, or one step, at one length."""

    name: str
    T: int
    launches: int
    moved: int
    least: int
    threadgroup: int

    def __str__(self) -> str:
        ratio = f"{self.moved / self.least:.3f}"
        return (
            f"| {self.name} | {self.T} | {self.launches} | {self.moved / 1024:.1f} | {ratio} | "
            f"{self.threadgroup} |"
        )


def numbers(*shape: int, seed: int = 0, dtype: Any = DTYPE) -> Any:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def flat(x: Any) -> Iterator[Any]:
    """Every array in nested tuples."""
    if isinstance(x, mx.array):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from flat(y)


def nbytes(x: Any) -> int:
    return sum(y.nbytes for y in flat(x))


def measured(name: str, T: int, call: Any, inputs: Any, extra: int = 0) -> Row:
    """The row of an op: `inputs` are the arrays that it must read, or their bytes in `extra`."""
    mx.eval(list(flat(inputs)))
    with metalsim.simulate("check") as sim, mode("fused"):
        found = call()
        mx.eval(list(flat(found)))
    moved = sum(x.loaded + x.stored for x in sim.launches)
    top = max(x.threadgroup_bytes for x in sim.launches)
    return Row(name, T, len(sim.launches), moved, nbytes(inputs) + extra + nbytes(found), top)


def past(name: str, T: int, role: Any, **settings: Any) -> Coded:
    """Coded tokens: a prompt, and blocks behind it."""
    codec: Any = parse(name, settings).codec
    coded = Coded(codec, role, 0)
    blocks = 3 * codec.buffer
    prompt = (T - blocks) // codec.buffer * codec.buffer
    coded.append(numbers(B, H, prompt, D, seed=1), codec.prefill_rank)
    for i in range(3):
        coded.append(numbers(B, H, codec.buffer, D, seed=2 + i), codec.rank)
    return coded


def used(coded: Coded) -> int:
    """Bytes of the blocks in use."""
    return sum(x.nbytes // x.shape[0] * run.n for run in coded.runs for _, x in arrays(run.code))


def attention(T: int) -> Iterator[Row]:
    q, k, v = numbers(B, HQ, 1, D), numbers(B, H, T, D, seed=1), numbers(B, H, T, D, seed=2)
    yield measured("`attend_dense`", T, lambda: attend_dense(q, k, v, SCALE), (q, k, v))
    for label, (name, settings) in CODECS.items():
        with mode("reference"):
            keys, values = past(name, T, "k", **settings), past(name, T, "v", **settings)
            mx.eval(list(flat([run.code for x in (keys, values) for run in x.runs])))
        pieces = list(zip(keys.pieces(), values.pieces(), strict=True))

        def each(q: Any = q, pieces: Any = pieces) -> list[Partial]:
            return [attend_coded(q, key, value, SCALE) for key, value in pieces]

        extra = used(keys) + used(values) + (len(pieces) - 1) * q.nbytes
        yield measured(f"`attend_coded`, {label}", T, each, (q,), extra)
    mass = lambda: attention_mass(q, k, SCALE)  # noqa: E731
    yield measured("`attention_mass`, 1 query", T, mass, (q, k))
    lse = attend_dense(q, k, v, SCALE).lse
    mass = lambda: attention_mass(q, k, SCALE, lse=lse)  # noqa: E731
    yield measured("`attention_mass`, its denominator known", T, mass, (q, k, lse))


def others(T: int) -> Iterator[Row]:
    x, y = numbers(B, H, T, D), numbers(B, H, T, D, seed=1)
    q = numbers(B, HQ, 1, D)
    n = T // 64 * 64
    for bits in (2, 4, 8):
        call = lambda bits=bits: quantize(x[:, :, :n], bits, "k", "kivi", 64, DTYPE, DTYPE)  # noqa: E731
        yield measured(f"`quantize` keys, {bits} bits", n, call, (x[:, :, :n],))
    for name in ("kivi", "gear-l", "gear"):
        codec: Any = parse(name).codec
        call = lambda codec=codec: encode(  # noqa: E731
            x[:, :, :n], codec.spec("k", n, D), rank=codec.prefill_rank, outliers=codec.outliers,
            n_iter=codec.n_iter, seed=Seed(0, 0, 0),
        )  # fmt: skip
        yield measured(f"`encode` keys, {name}", n, call, (x[:, :, :n],))
    yield measured("`merge_pair`", T, lambda: merge_pair(x, y, 0.6), (x, y))
    M, R = 512, 8
    maps = Kernels(
        numbers(HQ, D, M), numbers(HQ, M, R), numbers(H, D, M), numbers(H, M, R),
        numbers(H, R, R), numbers(H, R), numbers(H, R),
    )  # fmt: skip
    state, norm = numbers(B, H, R, D, dtype=mx.float32), mx.abs(numbers(B, H, R, dtype=mx.float32))
    valid = mx.ones((B, H, T), mx.bool_)
    fold = lambda: fold_evicted(state, norm, x, y, valid, maps)  # noqa: E731
    yield measured("`fold_evicted`", T, fold, (state, norm, x, y, valid, *maps[2:]))
    ask = lambda: attend_state(q, state, norm, maps)  # noqa: E731
    yield measured("`attend_state`", T, ask, (q, state, norm, *maps[:2]))
    parts = [
        Partial(numbers(8, B, HQ, 1, D, dtype=mx.float32), numbers(8, B, HQ, 1, dtype=mx.float32))
    ]
    yield measured("`join` of 8", T, lambda: join(parts), parts)


def steps(T: int) -> Iterator[Row]:
    """Attention of one step of decoding, over all that the store holds."""
    for name in METHODS:
        settings = {"less.recent": T // 10} if name == "streaming" else {}
        if name in ("h2o", "h2o+token"):
            settings = {"less.heavy": T // 10, "less.recent": T // 10}
        if name.startswith("minicache"):
            settings = {"minicache.start": 0}
        if name == "tova":
            settings = {"less.heavy": T // 5}
        store = KVStore(parse(name, settings), 2)
        with mode("reference"):
            for length in (T, 1):
                for layer in (0, 1):
                    k, v = (numbers(B, H, length, D, seed=10 * layer + i) for i in (1, 2))
                    store.append(layer, k, v)
                    q = numbers(B, HQ, length, D)
                    store.observe(layer, q, SCALE) if length > 1 else None
            mx.eval(store.arrays())
        with metalsim.simulate("check") as sim, mode("fused"):
            out = store.attend(0, numbers(B, HQ, 1, D), SCALE)
            mx.eval(out)
        run = [x for x in sim.launches if op_of(x.name) in ATTENTION]
        yield Row(
            f"`{name}`", T, len(run), sum(x.loaded + x.stored for x in run),
            attended(store) + 2 * q.nbytes, max(x.threadgroup_bytes for x in run),
        )  # fmt: skip


def attended(store: KVStore) -> int:
    """Bytes that the first layer's attention must read."""
    total = 0
    for layer, (name, x, slack) in store._slot_of[0].parts():
        if layer == 0 and name not in ("positions", "scores", "queries", "thresholds"):
            used = x.nbytes - (slack() if callable(slack) else slack)
            total += used // 2 if name in ("norms", "retained") else used  # of either layer
    return int(total)


def table(title: str, rows: Iterable[Row]) -> None:
    print(f"\n## {title}\n")
    print("| | tokens | launches | KiB moved | over the least | threadgroup bytes |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(row, flush=True)


def main() -> None:
    """Prints the tables."""
    metalsim.need()
    print("# Metal kernels: bytes moved, launches, threadgroup memory\n")
    print(
        f"Counted in the simulator of `tests/metalsim`: batch {B}, {HQ} query heads, {H} heads of "
        f"keys and values, head_dim {D}, 16 bits. `python -m tests.metal_table` prints it."
    )
    for T in LENGTHS:
        table(f"Attention, {T} tokens", attention(T))
        table(f"Other ops, {T} tokens", others(T))
        table(f"Attention of one step and layer, {T} tokens", steps(T))


if __name__ == "__main__":
    main()
