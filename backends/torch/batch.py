"""Several sequences at a time with transformers: one step for all that run, prompts one by one.

The library has no loop in which sequences join and leave; the steps are ours, the choice of tokens
is made of the library's own parts, in the order in which its loop takes them.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from kvc.backends.torch.attention import decoder_of
from kvc.backends.torch.entry import KVCCache
from kvc.backends.torch.rows import KVCRows, takes
from kvc.backends.turns import Row

Choice = Callable[[torch.Tensor], torch.Tensor]  # of tokens [1] by logits [1, vocab_size]


class Runner:
    """Steps of sequences that join and leave.

    One that runs alone takes the library's path with its own cache, recorded steps included.
    """

    lone = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._short = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        self._rows: list[Row] = []
        self._newest: dict[int, int] = {}  # a token of each row that is not in its cache yet
        self._choices: dict[int, Choice] = {}
        self._fresh: list[Row] = []  # whose prompts are not compressed yet
        self._joined: KVCRows | None = None

    @torch.no_grad()
    def feed(self, row: Row, piece: list[int]) -> None:
        """Processes a piece of a prompt that is not its last."""
        with row.cache.store.prompting():
            inputs = torch.tensor([piece], device=self._model.device)
            decoder_of(self._model)(inputs, past_key_values=row.cache, use_cache=True)

    def copy(self, row: Row) -> KVCCache:
        """A copy of the cache of a sequence in its prompt."""
        return copy.deepcopy(row.cache)

    @torch.no_grad()
    def start(self, row: Row, piece: list[int]) -> int:
        """Processes the last piece of a prompt; returns the token behind it."""
        with row.cache.store.prompting():
            inputs = torch.tensor([piece], device=self._model.device)
            logits = self._model(
                inputs, past_key_values=row.cache, use_cache=True, **self._short
            ).logits
        choose = _choice(row, self._model.device)
        token = int(choose(_float(logits)))
        row.ids += piece
        self._rows.append(row)
        self._fresh.append(row)
        self._newest[row.key], self._choices[row.key] = token, choose
        self._joined = None
        return token

    @torch.no_grad()
    def step(self) -> list[tuple[Row, int | Exception]]:
        """One more token of every sequence that runs, or what its own work raised.

        A prompt is compressed before the first step with it, where it can only fail by itself.
        """
        failed: dict[int, Exception] = {}
        for row in self._fresh:
            try:
                row.cache.store.settle()
            except Exception as error:  # whatever it is, it is this sequence's alone
                failed[row.key] = error
        self._fresh = []
        rows = [row for row in self._rows if row.key not in failed]
        found: list[tuple[Row, int | Exception]] = [
            (row, failed[row.key]) for row in self._rows if row.key in failed
        ]
        if rows:
            found += self._next(rows)
        return found

    def _next(self, rows: list[Row]) -> list[tuple[Row, int | Exception]]:
        logits = _float(self._logits(rows))
        chosen: list[torch.Tensor | Exception] = []
        for i, row in enumerate(rows):
            row.ids.append(self._newest[row.key])
            try:
                chosen.append(self._choices[row.key](logits[i : i + 1]))
            except RuntimeError as error:  # no probabilities
                chosen.append(error)
        # the device is waited for once
        whole = [x for x in chosen if isinstance(x, torch.Tensor)]
        tokens = iter(torch.cat(whole).tolist() if whole else ())
        found: list[tuple[Row, int | Exception]] = []
        for row, x in zip(rows, chosen, strict=True):
            if isinstance(x, Exception):
                found.append((row, x))
                continue
            self._newest[row.key] = token = next(tokens)
            found.append((row, token))
        return found

    def _logits(self, rows: list[Row]) -> torch.Tensor:
        """Logits [B, 1, vocab_size] behind the newest token of each row."""
        tokens = [self._newest[row.key] for row in rows]
        if len(rows) == 1:
            inputs = torch.tensor([tokens], device=self._model.device)
            return self._model(inputs, past_key_values=rows[0].cache, use_cache=True).logits
        if self._joined is None or len(self._joined.stores) != len(rows):
            self._joined = KVCRows([row.cache for row in rows])
        return self._model(**self._joined.inputs(tokens, self._model)).logits

    def leave(self, row: Row) -> Any:
        """Takes a sequence out of those that run; returns its cache."""
        self._rows.remove(row)
        self._fresh = [x for x in self._fresh if x is not row]
        del self._newest[row.key], self._choices[row.key]
        self._joined = None
        return row.cache

    def clear(self) -> None:
        """Takes out all, whose caches are lost."""
        for row in [*self._rows]:
            self.leave(row)


def _float(logits: torch.Tensor) -> torch.Tensor:
    """The last token's logits [B, vocab_size], as the library chooses by them."""
    return logits[:, -1].to(torch.float32)


def _choice(row: Row, device: torch.device) -> Choice:
    """The likeliest token, or a sample; a seed's are those of `torch.manual_seed` alone."""
    if row.temp == 0:
        return lambda logits: logits.argmax(-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(row.temp)])
    if row.top_p < 1:
        warpers.append(TopPLogitsWarper(row.top_p))
    generator = None
    if row.seed is not None:
        generator = torch.Generator(device).manual_seed(row.seed)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        probs = warpers(None, logits).softmax(-1)
        return torch.multinomial(probs, 1, generator=generator)[:, 0]

    return sample
