"""Measures the bundled model: loss on texts, and recall of planted facts by distance.

Example: `python -m kvc.demo.evaluate kvc/demo --text a_book.txt`.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvc.demo.data import N_DIGITS, NAMES, TEMPLATES, Tokens, digit_ids, encode, make_fact

CONTEXTS = (1024, 2048)  # at which the loss is measured
LOSS_TOKENS = 32768  # per text
EDGES = (64, 128, 256, 512, 1024, 2048)  # of the buckets of distance
N_FACTS = 8  # planted in one context


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall of the facts that were told between `low` and `high` tokens before the question."""

    low: int
    high: int
    facts: int
    digits: float  # share of right digits
    numbers: float  # share of facts of which every digit is right


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, text: Tokens, bos: int, context: int) -> float:
    """Mean of -log p(token) in nats over the first windows of `context` tokens of `text`."""
    n = min(len(text), LOSS_TOKENS) // context
    if n == 0:
        raise ValueError(f"text_loss: needs {context} tokens of text, got {len(text)}")
    losses = []
    for row in text[: n * context].reshape(n, context):
        x = torch.from_numpy(np.concatenate([[bos], row])).long().to(model.device)[None]
        logits = model(input_ids=x[:, :-1]).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0], x[0, 1:]).item())
    return float(np.mean(losses))


class Planted(NamedTuple):
    """A context at whose end every fact told in it is asked for."""

    tokens: list[int]
    numbers: list[list[int]]  # the digits of each fact, the one told last first
    told: list[int]  # the place of the first digit of each, where it was told
    asked: list[int]  # and where it is asked for


def plant(tokenizer: PreTrainedTokenizerFast, text: Tokens, rng: np.random.Generator) -> Planted:
    """Plants `N_FACTS` facts in a passage of `text`, at distances drawn log-uniformly."""
    names = rng.choice(len(NAMES), N_FACTS, replace=False)
    facts = [make_fact(tokenizer, TEMPLATES[0], NAMES[i]) for i in names]
    numbers = digit_ids(tokenizer)[rng.integers(0, 10, (N_FACTS, N_DIGITS))].tolist()
    sentences = [[*f.head, *x, *f.tail] for f, x in zip(facts, numbers, strict=True)]
    T = EDGES[-1] - 1 - 2 * sum(map(len, sentences))
    if len(text) < T:
        raise ValueError(f"recall: needs {T} tokens of text, got {len(text)}")
    start = int(rng.integers(len(text) - T + 1))
    passage = text[start : start + T].tolist()
    distances = np.sort(np.exp(rng.uniform(np.log(EDGES[0]), np.log(T), N_FACTS)))
    cuts = [T - int(d) for d in distances]
    tokens, told, asked = [int(tokenizer.bos_token_id)], [0] * N_FACTS, [0] * N_FACTS
    for i in reversed(range(N_FACTS)):
        tokens += passage[cuts[i + 1] if i + 1 < N_FACTS else 0 : cuts[i]]
        told[i] = len(tokens) + len(facts[i].head)
        tokens += sentences[i]
    tokens += passage[cuts[0] :]
    for i in range(N_FACTS):  # the nearest first, for the questions lengthen the later distances
        asked[i] = len(tokens) + len(facts[i].head)
        tokens += sentences[i]
    return Planted(tokens, numbers, told, asked)


@torch.no_grad()
def recall(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[Tokens],
    n_contexts: int = 96,
    seed: int = 0,
) -> list[Recall]:
    """Recall of facts planted in `texts`, by the distance between telling and question.

    A digit is right if it is the most probable token after the right ones before it, so that a
    number is right if greedy decoding would write it.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int]] = []  # (distance, number of right digits)
    for c in tqdm(range(n_contexts), desc="recall", unit="context", leave=False):
        tokens, numbers, told, asked = plant(tokenizer, texts[c % len(texts)], rng)
        x = torch.tensor([tokens], device=model.device)
        keep = len(tokens) - asked[0] + 1  # from the token that predicts the first asked digit
        best = model(input_ids=x, logits_to_keep=keep).logits[0].argmax(-1).tolist()
        for number, tell, ask in zip(numbers, told, asked, strict=True):
            at = ask - asked[0]
            guess = best[at : at + N_DIGITS]
            rows.append((ask - tell, sum(a == b for a, b in zip(guess, number, strict=True))))
    out = []
    for low, high in itertools.pairwise(EDGES):
        right = np.array([r for distance, r in rows if low <= distance < high])
        if len(right):
            whole = float((right == N_DIGITS).mean())
            out.append(Recall(low, high, len(right), float(right.mean() / N_DIGITS), whole))
    return out


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: dict[str, str],
    n_contexts: int = 96,
) -> dict[str, object]:
    """Loss per text and context, and recall over all texts, as plain data for JSON."""
    model.train(False)
    encoded = {name: encode(tokenizer, text) for name, text in texts.items()}
    bos = int(tokenizer.bos_token_id)
    loss = {
        name: {str(c): text_loss(model, t, bos, c) for c in CONTEXTS} for name, t in encoded.items()
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
