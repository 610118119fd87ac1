"""Measures the bundled model: loss on texts, and recall of planted facts by distance.

Example: `python -m kvc.demo.evaluate kvc/demo --text a_book.txt`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvc.backends.torch.engine import Engine
from kvc.demo.data import Tokens, encode
from kvc.measure import recall as measured
from kvc.measure.perplexity import perplexity
from kvc.methods import parse

CONTEXTS = (1024, 2048)  # at which the loss is measured
LOSS_TOKENS = 32768  # per text


def text_loss(engine: Engine, text: Tokens, bos: int, context: int) -> float:
    """Mean of -log p(token) in nats over the first windows of `context` tokens of `text`."""
    n = min(len(text), LOSS_TOKENS) // context
    if n == 0:
        raise ValueError(f"text_loss: needs {context} tokens of text, got {len(text)}")
    windows = text[: n * context].reshape(n, context)
    rows = np.concatenate([np.full((n, 1), bos, windows.dtype), windows], 1)
    return perplexity(engine, rows, parse("none"), step=context).mean()


def recall(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[Tokens],
    n_contexts: int = 96,
    seed: int = 0,
) -> list[measured.Bucket]:
    """Recall of facts planted in `texts`, by the distance between telling and question."""
    with tqdm(desc="recall", unit="token", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = measured.recall(
            Engine(model, tokenizer, model.device.type),
            texts,
            parse("none"),
            n=n_contexts,
            seed=seed,
            step=max(CONTEXTS),  # all questions at a time: nothing is compressed between them
            on_step=show,
        )
    return list(found.buckets)


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: dict[str, str],
    n_contexts: int = 96,
) -> dict[str, object]:
    """Loss per text and context, and recall over all texts, as plain data for JSON."""
    model.train(False)
    engine = Engine(model, tokenizer, model.device.type)
    encoded = {name: encode(tokenizer, text) for name, text in texts.items()}
    bos = int(tokenizer.bos_token_id)
    loss = {
        name: {str(c): text_loss(engine, t, bos, c) for c in CONTEXTS}
        for name, t in encoded.items()
    }
    buckets = recall(model, tokenizer, list(encoded.values()), n_contexts)
    return {"loss": loss, "recall": [asdict(b) for b in buckets]}


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text that the model was not trained on; may be given again.",
)
@click.option("--contexts", default=96, show_default=True, help="Contexts of 8 facts each.")
@click.option("--threads", default=0, help="CPU threads; 0 leaves the choice to PyTorch.")
def main(model: Path, texts: tuple[Path, ...], contexts: int, threads: int) -> None:
    """Measure MODEL and print the result as JSON."""
    if threads:
        torch.set_num_threads(threads)
    lm = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    named = {p.name: p.read_text(encoding="utf-8") for p in texts}
    try:
        result = evaluate(lm, tokenizer, named, contexts)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
