"""What codes cost on a CPU, against dense tokens and against MLX's own quantized cache.

`python -m benchmarks.cpu` races one step of decoding, attention over 8192 tokens of a Llama-3-8B
layer in float32, in PyTorch and MLX, and encoding a prompt of as many tokens against that layer's
prefill. All arms take turns in one run, so that what else the machine does meets them alike: the
ratios are medians of those within each turn. Rows go to `benchmarks/results/cpu.jsonl`, and the
table that is printed to `cpu.md` beside it. `--quick` takes fewer tokens and turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.races.rows import PACKAGES, Row, Rows, read
from kvc.measure.provenance import commit, versions
from kvc.measure.speed.clock import Times
from kvc.methods import Gear, parse
from kvc.ops.attention import attend_coded, attend_dense
from kvc.ops.codec import arrays, encode
from kvc.ops.dispatch import mode
from kvc.ops.residual import Seed
from kvc.store.coded import Coded

RESULTS = Path(__file__).with_name("results")
HEADS, KV_HEADS, D = 32, 8, 128
SCALE = D**-0.5
BLOCK = 64
PIECE = 2048  # tokens of the prefill at a time
THREADS = 2
BITS = (2, 4, 8)
CODECS = ("kivi", "gear-l", "gear")
Numbers = np.ndarray[Any, Any]


class Arm(NamedTuple):
    """One of those that take turns."""

    key: str
    run: Callable[[], Any]
    rival: str  # the key of the arm that its time is divided by; "" for a rival
    facts: Row  # bytes, error and the ratio that is asked for


def attended(q: Numbers, k: Numbers, v: Numbers) -> Numbers:
    """Attention in float64, by definition."""
    with mode("reference"):
        x, y, z = (a.astype(np.float64) for a in (q, k, v))
        out: Numbers = attend_dense(x, y, z, SCALE).out
        return out


def off(got: Numbers, want: Numbers) -> float:
    """The largest error over the largest number."""
    return float(
        np.abs(got.astype(np.float64).reshape(want.shape) - want).max() / np.abs(want).max()
    )


def coded(codec: Gear, k: Any, v: Any, size: int) -> tuple[Coded, Coded]:
    """K and V in blocks of `size`, the only one of all tokens coded as a prompt's."""
    pasts = Coded(codec, "k", 0), Coded(codec, "v", 0)
    n = k.shape[2]
    for past, x in zip(pasts, (k, v), strict=True):
        for start in range(0, n, size):
            rank = codec.prefill_rank if size == n else codec.rank
            past.append(x[:, :, start : start + size], rank)
    return pasts


def ours(
    library: str, xp: Any, q: Any, k: Any, v: Any, done: Callable[[Any], Any]
) -> Iterator[tuple[str, int, Arm]]:
    """Our codecs, in one block and in blocks of decoding, by bits; `done` awaits an array."""
    n = k.shape[2]
    for bits in BITS:
        for name in CODECS:
            codec = parse(name, {"bits": bits}).codec
            assert isinstance(codec, Gear)
            for how, size in (("one block", n), (f"blocks of {BLOCK}", BLOCK)):
                past = coded(codec, k, v, size)
                held = [x[: run.n] for one in past for run in one.runs for _, x in arrays(run.code)]
                for x in held:
                    done(x)

                def run(past: tuple[Coded, Coded] = past) -> Any:
                    return done(attend_coded(q, *past, SCALE).out)

                decoded = [xp.to_numpy(x.read(0, n)) for x in past]
                facts = {
                    "bytes": sum(x.nbytes for x in held),
                    "error": off(xp.to_numpy(run()), attended(xp.to_numpy(q), *decoded)),
                    "bits": bits,
                }
                yield name, bits, Arm(f"{library} {name} {bits} bits, {how}", run, "", facts)


def of_torch(q: Numbers, k: Numbers, v: Numbers) -> Iterator[Arm]:
    """Ours against SDPA with a head's queries packed, which is faster than its own way."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from kvc.backends.torch import ops

    torch.set_num_threads(THREADS)
    x, y, z = (torch.from_numpy(a) for a in (q, k, v))

    def dense() -> Any:
        return sdpa(x.reshape(1, KV_HEADS, -1, D), y, z)

    rival = "torch SDPA, float32"
    error = off(dense().numpy(), attended(q, k, v))
    yield Arm(rival, dense, "", {"bytes": k.nbytes + v.nbytes, "error": error})
    for name, bits, arm in ours("torch", ops, x, y, z, lambda a: a):
        target = {"target": 2.0} if bits == 4 and name != "gear" else {}
        yield arm._replace(rival=rival, facts=arm.facts | target)


def of_mlx(q: Numbers, k: Numbers, v: Numbers) -> Iterator[Arm]:
    """Ours against mlx-lm's attention over its quantized cache, of the same bits and groups."""
    import mlx.core as mx
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as quantized

    from kvc.backends.mlx import ops

    def done(a: Any) -> Any:
        mx.eval(a)
        return a

    x, y, z = (mx.array(a) for a in (q, k, v))
    rivals = {}
    for bits in BITS:
        codes = [mx.quantize(a, BLOCK, bits) for a in (y, z)]
        done(codes)

        def run(bits: int = bits, codes: Any = codes) -> Any:
            return done(
                quantized(x * 1, *codes, scale=SCALE, mask=None, group_size=BLOCK, bits=bits)
            )

        decoded = [np.array(mx.dequantize(*code, BLOCK, bits)) for code in codes]
        facts = {
            "bytes": sum(part.nbytes for code in codes for part in code),
            "error": off(np.array(run()), attended(q, *decoded)),
            "bits": bits,
        }
        rivals[bits] = f"mlx-lm quantized {bits} bits"
        yield Arm(rivals[bits], run, "", facts)
    for name, bits, arm in ours("mlx", ops, x, y, z, done):
        target = {"target": 1.0} if bits == 4 and name == "kivi" else {}
        yield arm._replace(rival=rivals[bits], facts=arm.facts | target)


def of_encoding(n: int) -> Iterator[Arm]:
    """Encoding K and V of a prompt, against the prefill of a layer with random weights."""
    import torch
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        hidden_size=HEADS * D, intermediate_size=14336, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=n,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    layer, rotary = LlamaDecoderLayer(config, 0).eval(), LlamaRotaryEmbedding(config)
    x = torch.randn(1, n, HEADS * D, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def prefill() -> Any:
        cache = DynamicCache(config=config)
        for start in range(0, n, PIECE):
            some = x[:, start : start + PIECE]
            where = torch.arange(start, start + some.shape[1])[None]
            seen = torch.arange(start + some.shape[1])[None] <= where[0, :, None]
            layer(
                some, attention_mask=seen[None, None], position_ids=where, past_key_values=cache,
                position_embeddings=rotary(some, where),
            )  # fmt: skip
        return cache

    cache = prefill().layers[0]
    kv = cache.keys.contiguous(), cache.values.contiguous()
    rival = f"prefill of a Llama-3-8B layer, {n} tokens"
    yield Arm(rival, prefill, "", {"bytes": sum(a.nbytes for a in kv)})
    for name in CODECS:
        codec = parse(name, {"bits": 4}).codec
        assert isinstance(codec, Gear)

        def run(codec: Gear = codec) -> Any:
            specs = codec.spec("k", n, D), codec.spec("v", n, D)
            how: Row = {"rank": codec.prefill_rank, "outliers": codec.outliers}
            how |= {"n_iter": codec.n_iter, "seed": Seed(0, 0, 0)}
            return [encode(a, spec, **how) for a, spec in zip(kv, specs, strict=True)]

        facts: Row = {"bytes": sum(a.nbytes for code in run() for _, a in arrays(code))}
        facts |= {"target": 0.15} if codec.prefill_rank else {}
        yield Arm(f"encoding it with {name} 4 bits", run, rival, facts | {"bits": 4})


def taken(arms: Sequence[Arm], turns: int) -> Iterator[tuple[Arm, Row]]:
    """Each arm's times, and their ratios to its rival's in the same turn."""
    times: dict[str, list[float]] = {arm.key: [] for arm in arms}
    for turn in range(turns + 1):
        for arm in arms:
            start = time.perf_counter()
            arm.run()
            if turn:  # the first warms up
                times[arm.key].append(time.perf_counter() - start)
    for arm in arms:
        found = Times.of(times[arm.key]).fields("ms")
        if arm.rival:
            pairs = zip(times[arm.key], times[arm.rival], strict=True)
            found |= {"rival": arm.rival, "ratio": statistics.median(a / b for a, b in pairs)}
        yield arm, found


def table(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = ["# Codes on a CPU", ""]
    first = rows[0]
    packages = ", ".join(f"{name} {x}" for name, x in first["versions"].items())
    lines += [f"{first['threads']} threads; {packages}; commit {first['commit']}.", ""]
    lines += [
        "| | ms | quartiles | of its rival's | asked for | MiB | error |",
        "|---|" + "---|" * 6,
    ]
    for row in rows:
        if why := row.get("not_raced"):
            lines.append(f"| {row['key']}: not raced, {why} |" + " - |" * 6)
            continue
        low, high = row["ms_spread"]
        ratio = f"{row['ratio']:.3g}" if "ratio" in row else "-"
        goal = f"<= {row['target']}" if "target" in row else "-"
        error = f"{row['error']:.0e}" if "error" in row else "-"
        lines.append(
            f"| {row['key']} | {row['ms']:.2f} | {low:.2f} to {high:.2f} | {ratio} | {goal} | "
            f"{row['bytes'] / 2**20:.1f} | {error} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "cpu.jsonl",
    show_default="benchmarks/results/cpu.jsonl",
    help="The file of the rows; the table goes beside it.",
)
@click.option("--quick", is_flag=True, help="1024 tokens and few turns.")
def main(out: Path, quick: bool) -> None:
    """Race, and write rows and a table."""
    n, turns, fewer = (1024, 3, 1) if quick else (8192, 15, 2)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, HEADS, 1, D)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, KV_HEADS, n, D)).astype(np.float32)
    peers = ("mlx", "mlx-lm")
    has_mlx = all(find_spec(name.replace("-", "_")) for name in peers)
    packages = versions(PACKAGES) | {name: version(name) for name in peers if has_mlx}
    common: Row = {"commit": commit(), "versions": packages, "device": "cpu", "threads": THREADS}
    common |= {
        "tokens": n,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": D,
        "mode": "reference",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    rows = Rows(out, common)
    with mode("reference"):
        attention = [*of_torch(q, k, v), *(of_mlx(q, k, v) if has_mlx else ())]
        for arm, found in taken(attention, turns):
            rows.write("attention", arm.key, found | arm.facts)
        del attention
        for arm, found in taken([*of_encoding(n)], fewer):
            rows.write("encoding", arm.key, found | arm.facts)
        if not has_mlx:
            rows.write("attention", "mlx-lm", {"not_raced": "mlx-lm is not installed"})
    text = table(list(read(out)))
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
