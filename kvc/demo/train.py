"""Trains the bundled model on books with planted facts.

Example: `python -m kvc.demo.train --books DIR --out DIR --minutes 60`. A run that was stopped
(Ctrl-C, or killed) goes on from its last checkpoint when the same command is given again.
"""

import json
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvc.demo.checkpoint import Progress, export, load_checkpoint, save_checkpoint
from kvc.demo.data import Sampler, read_texts, train_tokenizer
from kvc.demo.evaluate import evaluate
from kvc.demo.recipe import CURRICULUM, lr_factor, make_optimizers, new_model, train_step

HELD_OUT = ("frankenstein.txt", "the_time_machine.txt")


class Stop:
    """Turns the first Ctrl-C into a flag, so that no step is cut in two; a second one kills."""

    def __init__(self) -> None:
        """Takes Ctrl-C over."""
        self.asked = False
        self.previous = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        self.restore()

    def restore(self) -> None:
        """Gives Ctrl-C its former meaning."""
        signal.signal(signal.SIGINT, self.previous)


class Run(NamedTuple):
    """What the loop of a run works on."""

    model: LlamaForCausalLM
    optimizers: dict[str, torch.optim.Optimizer]
    sampler: Sampler
    out: Path
    settings: dict[str, Any]
    bf16: bool
    start: float  # share of the curriculum at which the run begins
    max_norm: float

    def save(self, progress: Progress) -> None:
        """Writes the checkpoint."""
        save_checkpoint(
            self.out, self.model, self.optimizers, self.sampler.rng, progress, self.settings
        )


def mean_of(rows: Collection[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over the rows that have it: a batch may hold no fact, or no text."""
    out = {}
    for key in ("text", "first", "next", "excess"):
        known = [row[key] for row in rows if not math.isnan(row[key])]
        out[key] = sum(known) / len(known) if known else math.nan
    return out


def train(
    run: Run,
    progress: Progress,
    steps: int | None,
    minutes: float,
    batch_tokens: int,
    save_every: int,
) -> bool:
    """Trains until the budget, `steps` if given, else `minutes`, is spent; False if stopped."""
    budget = float(steps) if steps else 60 * minutes
    needed = 2 * CURRICULUM[-1].context
    if len(run.sampler.books) < needed:
        raise ValueError(f"train: needs {needed} tokens of books, got {len(run.sampler.books)}")
    stop, recent = Stop(), deque[dict[str, float]](maxlen=save_every)
    run.model.train()
    bar = tqdm(
        total=budget,
        unit="step" if steps else "s",
        bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}",
        mininterval=0.2 if sys.stderr.isatty() else 60,
    )
    try:
        while (spent := progress.step if steps else progress.seconds) < budget:
            start, done = time.monotonic(), spent / budget
            stage = next(s for s in CURRICULUM if run.start + (1 - run.start) * done < s.until)
            B = max(1, batch_tokens // stage.context)
            batch = run.sampler.batch(B, stage.context, stage.text, stage.max_gap)
            factor = lr_factor(progress.step, done)
            losses = train_step(run.model, run.optimizers, batch, factor, run.bf16, run.max_norm)
            progress.step += 1
            progress.tokens += B * stage.context
            progress.seconds += time.monotonic() - start
            recent.append(losses)
            mean = mean_of(recent)
            bar.set_postfix(step=progress.step, context=stage.context, **mean, refresh=False)
            bar.update(min(budget, progress.step if steps else progress.seconds) - bar.n)
            if progress.step % save_every == 0 or stop.asked:
                run.save(progress)
                row = {"step": progress.step, "tokens": progress.tokens, **mean}
                with (run.out / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({**row, "context": stage.context}) + "\n")
            if stop.asked:
                return False
    finally:
        bar.close()
        stop.restore()
    run.save(progress)
    return True


def split_held_out(books: Path, held_out: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """The books to train on, and the texts to measure on: files of the folder, or other files.

    Raises:
        ValueError: if a held-out text does not exist or no book is left.
    """
    held = [books / name if (books / name).exists() else Path(name) for name in held_out]
    for path in held:
        if not path.is_file():
            raise ValueError(f"--held-out {path}: neither a file of {books} nor another file")
    rest = [p for p in sorted(books.glob("*.txt")) if p not in held]
    if not rest:
        raise ValueError(f"--books {books}: holds no *.txt to train on")
    return rest, held


@click.command()
@click.option(
    "--books",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of *.txt in UTF-8.",
)
@click.option(
    "--init",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Begin with the weights and tokenizer of this model.",
)
@click.option("--out", default="demo-model", type=click.Path(file_okay=False, path_type=Path))
@click.option("--minutes", default=60.0, show_default=True, help="Time to train for.")
@click.option("--steps", type=int, help="Number of steps to train for, instead of a time.")
@click.option(
    "--held-out",
    multiple=True,
    default=HELD_OUT,
    show_default=True,
    help="Text to measure on and never train on: a file of --books, or any; may be given again.",
)
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--bf16/--no-bf16", default=False, help="Multiply in bfloat16.")
@click.option("--threads", default=0, help="CPU threads; 0 leaves the choice to PyTorch.")
@click.option("--seed", default=0, show_default=True)
@click.option("--lr", default=0.02, show_default=True, help="Of Muon; AdamW gets 0.15 of it.")
@click.option("--batch-tokens", default=4096, show_default=True, help="Tokens per step.")
@click.option("--save-every", default=100, show_default=True, help="Steps per checkpoint.")
@click.option("--contexts", default=96, show_default=True, help="Contexts to measure recall in.")
@click.option(
    "--start",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the curriculum to leave out, for a model that has learnt it.",
)
@click.option(
    "--max-norm",
    type=click.FloatRange(0),
    default=12.0,
    show_default=True,
    help="Of a head's queries and keys, which bounds the logits of attention; 0: no limit.",
)
@click.option("--layers", default=8, show_default=True)
@click.option("--hidden", default=256, show_default=True)
@click.option("--mlp", default=704, show_default=True)
@click.option("--vocab", default=2048, show_default=True)
def main(
    books: Path,
    init: Path | None,
    out: Path,
    minutes: float,
    steps: int | None,
    held_out: tuple[str, ...],
    device: str,
    bf16: bool,
    threads: int,
    seed: int,
    lr: float,
    batch_tokens: int,
    save_every: int,
    contexts: int,
    start: float,
    max_norm: float,
    layers: int,
    hidden: int,
    mlp: int,
    vocab: int,
) -> None:
    """Train the bundled model on books with planted facts, measure it and write it to --out."""
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        train_on, held = split_held_out(books, held_out)
        texts = read_texts(train_on)
        torch.manual_seed(seed)
        if init:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(init)
            model = LlamaForCausalLM.from_pretrained(init, dtype=torch.float32)
        else:
            tokenizer = train_tokenizer(texts, vocab)
            model = new_model(tokenizer, layers, hidden, mlp)
        torch.nn.Module.to(model, device)  # the class's own `to` is typed wrongly
        optimizers = make_optimizers(model, lr)
        rng = np.random.default_rng(seed)
        settings = {
            "books": [p.name for p in train_on],
            "init": init.name if init else None,
            "shape": [model.config.num_hidden_layers, model.config.hidden_size],
            "seed": seed,
            "lr": lr,
            "batch_tokens": batch_tokens,
            "start": start,
            "max_norm": max_norm,
        }
        out.mkdir(parents=True, exist_ok=True)
        progress = load_checkpoint(out, model, optimizers, rng, settings)
        sampler = Sampler(tokenizer, texts, rng)
        run = Run(model, optimizers, sampler, out, settings, bf16, start, max_norm)
        if not train(run, progress, steps, minutes, batch_tokens, save_every):
            click.echo(f"stopped at step {progress.step}; the same command goes on from there")
            return
        export(out, model, tokenizer)
        named = dict(zip([p.name for p in held], read_texts(held), strict=True))
        result = evaluate(model, tokenizer, named, contexts)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    result |= {"steps": progress.step, "tokens": progress.tokens}
    (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
