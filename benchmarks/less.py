"""LESS against its bare policy, and against that with the tokens that its state's bytes buy.

`python -m benchmarks.less --text BOOK` reads rows of the book token by token through the cache of
the bundled model: the full cache, the bare policy, the policy with more tokens (Baseline+), and
LESS. Perplexity is over the positions behind the budget, where tokens are gone. Every measurement
goes to `benchmarks/results/less.jsonl` at once, and is not made again while nothing that it rests
on has changed; the tables are in `less.md` beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

import kvc.demo
from kvc.api import BACKENDS, load_engine
from kvc.backends.base import ModelShape
from kvc.calibrate.less.layer import more_tokens
from kvc.calibrate.rows import read_rows
from kvc.cli.run import in_units
from kvc.errors import KVCError
from kvc.files import read_kernels, write_whole
from kvc.measure.perplexity import perplexity
from kvc.measure.recall import recall
from kvc.methods import Less, Method
from kvc.methods.base import method_of
from kvc.methods.less import Policy
from kvc.ops.dispatch import mode
from kvc.text import read_text, split_start

RESULTS = Path(__file__).with_name("results")
COLUMNS = ("full", "bare", "baseline+", "less")
HALVES = "baseline+ in halves"  # what the state's bytes buy where the cache has 16 bits a number


@dataclass(frozen=True)
class Case:
    """One line of the table: a policy at a budget, over rows of one length."""

    length: int
    policy: Policy
    percent: int
    kernels: Path
    rank: int  # of their state
    shape: ModelShape

    @property
    def budget(self) -> int:
        """Tokens that the bare policy keeps."""
        return self.length * self.percent // 100

    def method(self, column: str) -> Method:
        """What a column of the table measures."""
        if column == "full":
            return Method()
        less = Less.of_budget(self.policy, self.budget)
        if column in ("baseline+", HALVES):
            shape = self.shape if column == "baseline+" else replace(self.shape, dtype_bytes=2)
            less = more_tokens(less, self.rank, shape)
        return method_of(replace(less, kernels=str(self.kernels)) if column == "less" else less)


class Bench:
    """Measures what is not among the results yet."""

    def __init__(self, backend: str, out: Path) -> None:
        folder = kvc.demo.path()
        self.engine = load_engine(backend, str(folder), "float32")
        packages = ("mlx", "mlx-lm") if backend == "mlx" else ("torch", "transformers")
        self.made_by = {package: version(package) for package in packages}
        self.common = {
            "model": file_hash(folder / "model.safetensors"),
            "backend": backend,
            "mode": "reference",
        }
        self.path = out / "less.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def row(self, settings: dict[str, Any], method: Method, measure: Any) -> dict[str, Any]:
        """The row with these settings; `measure(on_step)` makes what is missing."""
        less = method.memory
        key = {
            **self.common,
            **settings,
            "method": None if less is None else {**asdict(less), "kernels": None},
            "kernels": file_hash(Path(less.kernels)) if less and less.kernels else None,
        }
        for row in self.rows:
            if row["key"] == key:
                return row
        start = time.monotonic()
        name = f"{less.policy} {less.heavy:g}+{less.recent:g}" if less else "full"
        what = f"{settings['kind']} {settings['length']} {name}{' less' if key['kernels'] else ''}"
        with tqdm(desc=what, unit="token", leave=False) as bar, mode("reference"):

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = measure(show)
        seconds = round(time.monotonic() - start, 1)
        row = {"key": key, "versions": self.made_by, "seconds": seconds, **found}
        self.rows.append(row)
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return row

    def perplexity(self, method: Method, text: Path, n: int, length: int, starts: list[int]) -> Any:
        """-log p of each row behind `starts`, in nats, and the bytes of one row's cache."""
        rows = read_rows(self.engine, [text], n, length)

        def measure(on_step: Any) -> dict[str, Any]:
            found = perplexity(self.engine, rows.ids, method, on_step=on_step)
            nll = {str(t): found.rows[:, t:].mean(1).round(6).tolist() for t in starts}
            return {"nll": nll, "nbytes": found.nbytes // n, "dense_bytes": found.dense_bytes // n}

        settings = {"kind": "perplexity", "text": text.name, "ids": rows.digest}
        settings |= {"length": length, "rows": n, "starts": starts}
        return self.row(settings, method, measure)

    def recall(self, method: Method, text: Path, n: int, length: int) -> Any:
        """Recall of facts told in the text, over contexts of so many tokens."""
        _, ids = split_start(self.engine, self.engine.encode(read_text(text)))

        def measure(on_step: Any) -> dict[str, Any]:
            found = recall(self.engine, [ids], method, n=n, length=length, on_step=on_step)
            return {**asdict(found), "nbytes": found.nbytes // n}

        digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()
        settings = {"kind": "recall", "text": text.name, "ids": digest}
        return self.row({**settings, "length": length, "rows": n}, method, measure)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_cases(
    bench: Bench, folder: Path, lengths: Any, policies: Any, percents: Any
) -> list[Case]:
    """The lines of the table; each needs its kernels, whose rank decides what Baseline+ gets."""
    shape, cases = bench.engine.shape, []
    for length in lengths:
        for policy in policies:
            for percent in percents:
                path = folder / f"less-{policy}-{percent}.safetensors"
                rank = next(iter(read_kernels(path).layers.values())).s1.shape[-1]
                cases.append(Case(length, policy, percent, path, rank, shape))
    return cases


def compare(bench: Bench, cases: list[Case], text: Path, n: int) -> list[str]:
    """The table of perplexities.

    Raises:
        RuntimeError: If Baseline+ and LESS differ by a token's bytes or more.
    """
    kernels = in_units(cases[0].kernels.stat().st_size)
    lines = [
        f"Perplexity behind the budget, {n} rows of each length. *Share*: of the gap in nats to "
        "the full cache, what LESS recovers. The last difference has its standard error over rows. "
        "Baseline+ has the tokens that the bytes of the state, in float32, buy in this cache, in "
        "float32 too; in a cache of 16 bits they buy twice as many. Kernels take "
        f"{kernels} once, for all sequences, and are not counted.",
        "",
        "| tokens | policy | budget | full | bare | Baseline+ | with twice as many | LESS | "
        "share of bare's gap | share of Baseline+'s | LESS less Baseline+, nats | bytes bare | "
        "bytes Baseline+ | bytes LESS |",
        "|---:|---|---:|" + "---:|" * 11,
    ]
    for case in cases:
        own = case.budget + 1  # the first prediction that a token is missing for
        starts = sorted({c.budget + 1 for c in cases if c.length == case.length})
        rows = {}
        for column in (*COLUMNS, HALVES):
            at = starts if column == "full" else [own]
            rows[column] = bench.perplexity(case.method(column), text, n, case.length, at)
        nll = {name: np.array(row["nll"][str(own)]) for name, row in rows.items()}
        full, bare, plus, less, halves = (nll[name].mean() for name in (*COLUMNS, HALVES))
        off = nll["less"] - nll["baseline+"]
        error = off.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
        nbytes = [rows[name]["nbytes"] for name in COLUMNS[1:]]
        shape = bench.engine.shape
        spare = (nbytes[1] - nbytes[2]) / (shape.n_layers * shape.n_kv_heads)
        token = 2 * shape.head_dim * shape.dtype_bytes + 4 + 4 * (case.policy == "h2o")
        if not 0 <= spare < token:
            raise RuntimeError(f"Baseline+ has {spare} bytes in each head more than LESS: {case}")
        lines.append(
            f"| {case.length} | {case.policy} | {case.percent} % | "
            + " | ".join(f"{math.exp(x):.3f}" for x in (full, bare, plus, halves, less))
            + f" | {share(bare, less, full)} | {share(plus, less, full)} | {off.mean():+.4f} ± "
            + f"{error:.4f} | " + " | ".join(map(str, nbytes)) + " |"
        )  # fmt: skip
    return lines


def share(worse: float, better: float, full: float) -> str:
    """What of the gap to the full cache is recovered; where there is a gap."""
    return f"{(worse - better) / (worse - full):.1%}" if worse > full else "no gap"


def compare_recall(bench: Bench, cases: list[Case], text: Path, n: int) -> list[str]:
    """The table of recall."""
    lines = [
        f"Planted facts, {n} contexts of eight: share of numbers, and of digits, that are right.",
        "",
        "| tokens | policy | budget | full | bare | Baseline+ | LESS |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        cells = []
        for column in COLUMNS:
            found = bench.recall(case.method(column), text, n, case.length)
            cells.append(f"{found['numbers']:.1%}, {found['digits']:.1%}")
        head = f"| {case.length} | {case.policy} | {case.percent} % | "
        lines.append(head + " | ".join(cells) + " |")
    return lines


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--text", required=True, type=FILE, help="A book that was not trained on.")
@click.option("--rows", default=16, show_default=True, type=click.IntRange(1))
@click.option("--length", "lengths", multiple=True, type=int, default=(1024, 2048))
@click.option("--policy", "policies", multiple=True, default=("h2o", "sink"))
@click.option("--percent", "percents", multiple=True, type=int, default=(5, 10))
@click.option("--kernels", type=FOLDER, default=kvc.demo.path(), help="less-POLICY-PERCENT files.")
@click.option("--recall", "contexts", default=0, help="Contexts of planted facts; 0 for none.")
@click.option("--backend", default="cpu", type=click.Choice(list(BACKENDS)), show_default=True)
@click.option("--threads", default=0, help="CPU threads; 0 leaves the choice to PyTorch.")
@click.option("--out", type=FOLDER, default=RESULTS, help="Where less.jsonl and less.md go.")
def main(
    text: Path,
    rows: int,
    lengths: tuple[int, ...],
    policies: tuple[str, ...],
    percents: tuple[int, ...],
    kernels: Path,
    contexts: int,
    backend: str,
    threads: int,
    out: Path,
) -> None:
    """Measure what is missing and write the tables."""
    if threads and BACKENDS[backend].library == "torch":
        import torch

        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(backend, out)
        cases = find_cases(bench, kernels, lengths, policies, percents)
        lines = [f"# LESS on the bundled model, {text.name}", ""]
        lines += compare(bench, cases, text, rows)
        if contexts:
            lines += ["", *compare_recall(bench, cases, text, contexts)]
    except KVCError as error:
        raise click.ClickException(str(error)) from None
    made_by = ", ".join(f"{name} {v}" for name, v in bench.made_by.items())
    lines += ["", f"{made_by}, backend {backend}, float32, `python -m benchmarks.less`."]
    write_whole(out / "less.md", ("\n".join(lines) + "\n").encode())
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
