"""What the bundled model reads: books, and facts planted in them to be asked for later.

A planted fact is a sentence such as " The code of Anna is 4821.". It is told once, and told again
further on; from its second telling on, its digits can only be known by looking them up in the
cache, which is what the model is to learn.
"""

import re
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvc.measure.facts import FACT, N_DIGITS, NAMES

Tokens = NDArray[np.int32]  # [T]

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
TEMPLATES = (
    FACT,
    " {}'s number is {}.",
    " The room of {} is {}.",
    # The closer the number stands to the name, the easier it is to learn to look it up.
    " {} is {}.",
    " {} {}.",
    " {}{}.",
)


class Kind(IntEnum):
    """What a token of a training sample is, which decides how much its prediction counts."""

    HIDDEN = 0  # nothing can predict it: the beginning, the digits of a fact at its first telling
    TEXT = 1  # book
    FRAME = 2  # the words around the digits of a fact
    FIRST = 3  # the first digit of a fact that was told before: only the name leads to it
    NEXT = 4  # the digits after it, to which the digits before them lead as well


class Fact(NamedTuple):
    """A planted sentence without its number: `[*head, four digits, *tail]` are its tokens."""

    head: list[int]
    tail: list[int]


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of files in UTF-8."""
    return [p.read_text(encoding="utf-8") for p in paths]


def find_names(texts: Sequence[str], n: int) -> list[str]:
    """The `n` most frequent words that stand in mid-sentence with a capital and seldom without."""
    capital: Counter[str] = Counter()
    small: Counter[str] = Counter()
    for text in texts:
        capital.update(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,11}\b", text))
        small.update(re.findall(r"\b[a-z]{3,12}\b", text))
    return [w for w, c in capital.most_common() if c > 4 * small[w.lower()]][:n]


def train_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab` tokens in which every digit is a token of its own."""
    tok = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator((line for text in texts for line in text.splitlines(True)), trainer)
    begin = (BOS, tok.token_to_id(BOS))
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    """The tokens of `text`, without special ones."""
    # Paragraphs are encoded side by side: one long string would take one core and much memory.
    parts = tokenizer.backend_tokenizer.encode_batch(
        re.split(r"(?<=\n\n)(?=\S)", text), add_special_tokens=False
    )
    return np.concatenate([np.asarray(p.ids, dtype=np.int32) for p in parts])


def digit_ids(tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """The tokens of the ten digits. [10]."""
    return np.asarray(tokenizer.convert_tokens_to_ids(list("0123456789")), dtype=np.int32)


def make_fact(tokenizer: PreTrainedTokenizerFast, template: str, name: str) -> Fact:
    """The tokens of `template` about `name`, around its digits."""
    before, after = template.format(name, "|").split("|")
    return Fact(encode(tokenizer, before).tolist(), encode(tokenizer, after).tolist())


class Sampler:
    """Draws training samples from books; the same generator state gives the same samples."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: Sequence[str],
        rng: np.random.Generator,
    ) -> None:
        """Encodes `texts`, which takes seconds for some ten megabytes."""
        self.rng = rng
        self.bos = int(tokenizer.bos_token_id)
        self.digits = digit_ids(tokenizer)
        self.books = np.concatenate([encode(tokenizer, t) for t in texts])
        # Names out of the books too: a model that has seen few names learns these names by heart
        # instead of how to compare two of them.
        names = dict.fromkeys([*NAMES, *find_names(texts, 400)])
        self.facts = [[make_fact(tokenizer, t, n) for n in names] for t in TEMPLATES]

    def text(self, T: int) -> tuple[Tokens, Tokens]:
        """A passage of a book: tokens and kinds. [T + 1] each."""
        start = int(self.rng.integers(len(self.books) - T))
        tokens = np.concatenate([[self.bos], self.books[start : start + T]]).astype(np.int32)
        kinds = np.full(T + 1, Kind.TEXT, dtype=np.int32)
        kinds[0] = Kind.HIDDEN
        return tokens, kinds

    def planted(self, T: int, max_gap: float) -> tuple[Tokens, Tokens]:
        """Facts told again and again among pieces of a book: tokens and kinds. [T + 1] each.

        Args:
            T: Number of predictions in the sample.
            max_gap: The pieces of the book have a mean length drawn from 1 to this.
        """
        rng = self.rng
        gap = _log_uniform(rng, 1, max_gap)
        facts = self.facts[int(rng.integers(len(self.facts)))]
        n_told = T / (gap + 12)  # about how many sentences fit; 12 tokens make one
        n = min(len(facts), int(_log_uniform(rng, 2, max(4, 0.6 * n_told))))
        about = rng.choice(len(facts), n, replace=False)
        numbers = self.digits[rng.integers(0, 10, (n, N_DIGITS))].tolist()
        place = int(rng.integers(max(1, len(self.books) - 2 * T)))
        tokens, kinds, told = [self.bos], [int(Kind.HIDDEN)], set[int]()
        while len(tokens) <= T:
            piece = self.books[place : place + int(rng.exponential(gap))].tolist()
            place += len(piece)
            i = int(rng.integers(n))
            head, tail = facts[about[i]]
            tokens += [*piece, *head, *numbers[i], *tail]
            asked = [Kind.FIRST] + [Kind.NEXT] * (N_DIGITS - 1)
            digits = asked if i in told else [Kind.HIDDEN] * N_DIGITS
            told.add(i)
            kinds += [Kind.TEXT] * len(piece) + [Kind.FRAME] * len(head)
            kinds += digits + [Kind.FRAME] * len(tail)
        return np.asarray(tokens[: T + 1], np.int32), np.asarray(kinds[: T + 1], np.int32)

    def batch(self, B: int, T: int, text: float, max_gap: float) -> tuple[Tokens, Tokens]:
        """`B` samples of `T` predictions, a share `text` of them plain. [B, T + 1] each."""
        n_text = int(text * B + self.rng.random())  # right on average where it is no whole number
        rows = [self.text(T) if b < n_text else self.planted(T, max_gap) for b in range(B)]
        tokens, kinds = zip(*rows, strict=True)
        return np.stack(tokens), np.stack(kinds)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
