"""A model of lm-evaluation-harness whose answers and scores go through the compressed cache.

The harness scores an answer by one pass over question and answer together, in which no cache is
read: every method would look lossless. `kvc.measure.score` reads the cache for every token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import DEFAULT_MAX_LENGTH, has_bos_prefix, normalize_gen_kwargs
from tqdm import tqdm

from kvc.api import load_engine
from kvc.errors import ConfigError
from kvc.measure.score import Pair, Scorer
from kvc.methods import parse
from kvc.version import __version__

WHO = "lm-eval"
MAX_TOKENS = 256  # of an answer, unless the task says
TAKEN = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}
SCORING = {"prefill", "prefill_step", "step"}


@register_model("kvc")
class CompressedLM(TemplateLM):
    """What the harness asks of a model and its tokenizer.

    Args:
        scorer: The model and its method.
        info: What stands in the results beside what is measured.
    """

    newest: ClassVar[CompressedLM | None] = None  # the harness's command gives none back

    def __init__(self, scorer: Scorer, info: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.scorer, self.info = scorer, dict(info or {})
        self.tokenizer = scorer.engine.tokenizer
        self.asked = False  # for anything yet
        CompressedLM.newest = self

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CompressedLM:
        """The model that `--model_args` describe: `pretrained`, `method` and its `settings`.

        Also `backend`, `dtype`, `prefill`, `prefill_step` and `step`.

        Raises:
            KVCError: If there is no such model, method or backend, or an argument is wrong.
        """
        left = dict(arg_dict)
        name, settings = left.pop("method", "gear"), left.pop("settings", None) or {}
        path, backend = left.pop("pretrained", None), left.pop("backend", "auto")
        dtype = left.pop("dtype", None)
        if path is None:
            raise ConfigError(f"{WHO}: expected pretrained=MODEL among the model's arguments")
        if other := left.keys() - SCORING:
            raise ConfigError(f"{WHO}: unknown argument of the model {min(other)!r}")
        batch = _batch((additional_config or {}).get("batch_size"))
        method = parse(name, settings)
        scorer = Scorer(load_engine(backend, path, dtype), method, batch=batch, **left)
        return cls(scorer, {"method": name, "settings": settings})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CompressedLM:
        """The same from `key=value,key=value`."""
        return cls.create_from_arg_obj(
            utils.simple_parse_args_string(arg_string), additional_config
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model: method, and bytes of all its caches together."""
        scorer = self.scorer
        return {
            **self.info,
            "kvc_version": __version__,
            "backend": scorer.engine.name,
            "fingerprint": scorer.engine.shape.fingerprint,
            "prefill": scorer.prefill,
            "caches": scorer.caches,
            "cache_bytes": scorer.nbytes,
            "dense_bytes": scorer.dense_bytes,
            "ratio": scorer.ratio,
        }

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return self.scorer.engine.context_length or DEFAULT_MAX_LENGTH

    @property
    def tokenizer_name(self) -> str:
        """What the harness's own cache of prompts goes by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, with those that the tokenizer adds unless it begins with them."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.bos_token):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        shown = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(shown)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each answer in nats, and whether greedy decoding would write it.

        Raises:
            ConfigError: If an answer is longer than the model's context.
            KVCError: If a probability is no number.
        """
        pairs = [self._pair(context, answer) for _, context, answer in requests]
        self.asked = True
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        scores = self.scorer.scores(pairs)
        bar = tqdm(
            scores, total=len(pairs), desc="loglikelihood", leave=False,
            disable=disable_tqdm or None,
        )  # fmt: skip
        for i, score in bar:
            found[i] = (score.log_prob, score.greedy)
            if (text := requests[i][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[i])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows as long as the model's context."""
        windows: list[Any] = []
        owners = []
        for n, request in enumerate(requests):
            rolled = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for window in map(utils.make_disjoint_window, rolled):
                windows.append((None, *window))
                owners.append(n)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for n, (score, _) in zip(owners, scores, strict=True):
            totals[n] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first string that ends it.

        Raises:
            ConfigError: If an answer may be longer than the model's context.
        """
        asked = [(r.args[0], dict(normalize_gen_kwargs(r.args[1], MAX_TOKENS))) for r in requests]
        for _, given in asked:
            if self.max_length <= given["max_gen_toks"]:
                raise ConfigError(
                    f"{WHO}: expected answers of less than {self.max_length} tokens, the model's "
                    f"context, got max_gen_toks={given['max_gen_toks']}"
                )
            if other := given.keys() - TAKEN:
                names = ", ".join(sorted(other))
                utils.warning_once(logging.getLogger("lm_eval.kvc"), f"kvc takes no {names}")
        self.asked = True
        texts = []
        bar = tqdm(asked, desc="generate_until", leave=False, disable=disable_tqdm or None)
        for request, (context, given) in zip(requests, bar, strict=True):
            n = given["max_gen_toks"]
            texts.append(
                self.scorer.answer(
                    self.tok_encode(context)[n - self.max_length :],
                    [term for term in given["until"] if term],
                    n,
                    given.get("temperature", 0.0),
                    given.get("top_p", 1.0),
                )
            )
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _pair(self, context: Sequence[int], answer: Sequence[int]) -> Pair:
        """The two without the beginning for which the model has no room.

        Raises:
            ConfigError: If the answer alone is too long.
        """
        if len(answer) > self.max_length:
            raise ConfigError(
                f"{WHO}: expected answers of at most {self.max_length} tokens, the model's "
                f"context, got one of {len(answer)}"
            )
        return Pair([*context][len(answer) - self.max_length - 1 :], [*answer])


def _batch(size: Any) -> int | None:
    """A number of rows; None where the harness says `auto`, or nothing.

    Raises:
        ConfigError: If it is no whole number.
    """
    if size is None or str(size).startswith("auto"):
        return None
    try:
        return int(size)
    except ValueError:
        raise ConfigError(f"{WHO}: batch_size: expected auto or a number, got {size!r}") from None
