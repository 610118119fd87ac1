"""Perplexity through the cache against a plain pass of the library, and what methods do to it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import kvc
import kvc.demo
from kvc.errors import ConfigError, KVCError
from kvc.measure.perplexity import Perplexity, perplexity, surprise
from tests.run_cli import need_backend
from tests.tolerances import LOGITS

N, T = 3, 54
AGAIN = 34  # where the facts that are told twice begin again, or later
FACTS = (
    (" The code of Anna is 4821. The room of Peter is 3907.", " It was a dark night."),
    (" The code of Clara is 1093. The room of Henry is 5562.", " He said nothing at all."),
    (" The code of Peter is 7714. The room of Anna is 2080.", " The old man listened."),
)
BUDGET = {"heavy": 4, "recent": 8}
DENSE = N * (T - 1) * 2 * 8 * 2 * 64 * 4  # rows, tokens, K and V, layers, heads, head_dim, float32


@pytest.fixture(scope="module")
def engine() -> Any:
    need_backend("cpu")
    return kvc.load_engine("cpu", str(kvc.demo.path()))


@pytest.fixture(scope="module")
def ids(engine: Any) -> Any:
    """Rows that tell facts twice: who has forgotten them cannot tell their digits again."""
    return np.asarray([engine.encode(x + y + x)[:T] for x, y in FACTS], np.int32)


@pytest.fixture(scope="module")
def none(engine: Any, ids: Any) -> Perplexity:
    return perplexity(engine, ids, kvc.parse("none"))


def plain(ids: Any) -> Any:
    """-log p of every token but the first by the library alone, in one pass. [N, T - 1]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(kvc.demo.path(), dtype=torch.float32)
    x = torch.from_numpy(ids).long()
    with torch.no_grad():
        logp = model(x).logits.double().log_softmax(-1)
    return -logp[:, :-1].gather(-1, x[:, 1:, None])[..., 0].numpy()


@pytest.mark.parametrize(
    "how",
    [{}, {"prompt": 1}, {"prompt": 17}, {"prompt": 9, "step": 5}, {"step": T},
     {"prompt": 20, "chunk": 6, "prefill": "stream"}, {"prompt": T - 1}],
    ids=str,
)  # fmt: skip
def test_full_cache_is_the_library(engine: Any, ids: Any, how: dict[str, Any]) -> None:
    found = perplexity(engine, ids, kvc.parse("none"), **how)
    np.testing.assert_allclose(found.rows, plain(ids), atol=LOGITS["exact"])
    assert found.predictions == N * (T - 1)
    assert found.dense_bytes == DENSE <= found.nbytes


def test_batches_change_nothing(engine: Any, ids: Any) -> None:
    method, some = kvc.parse("h2o", BUDGET), ids[:, :24]
    together, apart = (perplexity(engine, some, method, batch=batch) for batch in (None, 2))
    np.testing.assert_allclose(apart.rows, together.rows, atol=LOGITS["exact"])
    assert (apart.nbytes, apart.dense_bytes) == (together.nbytes, together.dense_bytes)


@pytest.mark.parametrize("name", ["h2o", "streaming"])
def test_a_budget_of_all_tokens_loses_nothing(
    name: str, engine: Any, ids: Any, none: Perplexity
) -> None:
    method = kvc.parse(name, {"heavy": 4, "recent": T})
    found = perplexity(engine, ids, method)
    np.testing.assert_allclose(found.rows, none.rows, atol=LOGITS["exact"])


@pytest.mark.parametrize("name", ["h2o", "streaming"])
def test_eviction_is_felt_from_the_budget_on(
    name: str, engine: Any, ids: Any, none: Perplexity
) -> None:
    found = perplexity(engine, ids, kvc.parse(name, BUDGET))
    budget = sum(BUDGET.values())
    off = abs(found.rows - none.rows).max(0)  # token t sees the budget, and itself
    assert off[: budget + 1].max() < LOGITS["exact"] < 0.01 < off[budget + 1 :].max()
    assert found.mean(AGAIN) > none.mean(AGAIN) + 1
    assert found.nbytes < DENSE / 2


def test_coarse_codes_cost_perplexity(engine: Any, ids: Any, none: Perplexity) -> None:
    coarse = {"bits": 2, "group_size": 64, "buffer": 16}
    found = perplexity(engine, ids, kvc.parse("kcvt", coarse))
    assert found.mean(AGAIN) > none.mean(AGAIN)
    assert abs(found.rows - none.rows).max() > 0.1
    assert found.nbytes < DENSE / 2


@pytest.mark.parametrize(
    ("how", "begins"),
    [({"prompt": 20}, 20), ({"prompt": 20, "step": 6}, 20), ({"step": 6}, 6),
     ({"prompt": 20, "chunk": 8, "prefill": "stream"}, 8), ({"step": T}, T)],
    ids=str,
)  # fmt: skip
def test_a_prompt_is_compressed_when_the_next_piece_comes(
    engine: Any, ids: Any, none: Perplexity, how: dict[str, Any], begins: int
) -> None:
    method = kvc.parse("streaming", {"heavy": 1, "recent": 1})
    off = abs(perplexity(engine, ids, method, **how).rows - none.rows).max(0)
    assert off[:begins].max() < LOGITS["exact"]
    assert begins == T or off[begins] > 0.01


def test_a_single_pass_is_exact_for_shared_layers(engine: Any, ids: Any, none: Perplexity) -> None:
    method = kvc.parse("kvsharer", {"kvsharer.map": "5:2"})
    one, single = (perplexity(engine, ids, method, step=step) for step in (T, 1))
    np.testing.assert_allclose(one.rows, single.rows, atol=LOGITS["exact"])
    assert one.nbytes == DENSE * 7 // 8
    assert abs(one.rows - none.rows).max() > 0.01


@pytest.mark.parametrize("how", [{}, {"prompt": 20}, {"prompt": 20, "step": 6}], ids=str)
def test_backends_agree(engine: Any, ids: Any, how: dict[str, Any]) -> None:
    need_backend("mlx")
    other = kvc.load_engine("mlx", str(kvc.demo.path()), "float32")
    method = kvc.parse("h2o", BUDGET)
    ours, its = (perplexity(e, ids[:2, :30], method, **how) for e in (engine, other))
    np.testing.assert_allclose(its.rows, ours.rows, atol=1e-3)
    assert (its.nbytes, its.dense_bytes) == (ours.nbytes, ours.dense_bytes)


def test_surprise_is_minus_log_softmax(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 50)).astype("float32") * 5 + [[[1e4], [0], [-1e4]]]
    targets = rng.integers(0, 50, (2, 3))
    x = logits.astype("float32").astype("float64")
    top = x.max(-1, keepdims=True)
    want = np.log(np.exp(x - top).sum(-1)) + top[..., 0]
    want = want - np.take_along_axis(x, targets[..., None], -1)[..., 0]
    found = surprise(xp.from_numpy(logits.astype("float32")), targets)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, want, atol=2e-3)  # numbers near 1e4 have no more in float32


def test_means_errors_and_perplexity() -> None:
    rows = np.random.default_rng(0).random((4, 6))
    found = Perplexity(rows, 1, 2)
    np.testing.assert_allclose(found.nll, rows.mean(0))
    assert found.ppl == pytest.approx(math.exp(rows.mean()))
    assert found.mean(2, 5) == pytest.approx(rows[:, 2:5].mean())
    assert found.error(2) == pytest.approx(rows[:, 2:].mean(1).std(ddof=1) / 2)
    assert Perplexity(rows[:1], 1, 2).error() == math.inf
    with pytest.raises(ConfigError, match="expected positions among 6, got 6 to None"):
        found.mean(6)


def test_progress_is_told(engine: Any, ids: Any) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(
        engine, ids, kvc.parse("none"), step=20, batch=2, on_step=lambda *now: seen.append(now)
    )
    assert [done for done, _ in seen] == [40, 80, 106, 126, 146, 159]
    assert {total for _, total in seen} == {N * (T - 1)}


@pytest.mark.parametrize(
    ("shape", "how", "says"),
    [((2, 1), {}, "expected rows of at least 2 tokens"), ((0, 8), {}, "got int32 [0, 8]"),
     ((8,), {}, "got int32 [8]"), ((1, 4097), {}, "at most 4096 tokens"),
     ((1, 8), {"prompt": 8}, "prompt: expected 0 to 7, got 8"),
     ((1, 8), {"prompt": -1}, "prompt: expected 0 to 7, got -1"),
     ((1, 8), {"step": 0}, "step: expected at least 1, got 0"),
     ((1, 8), {"chunk": 0}, "chunk: expected at least 1, got 0"),
     ((1, 8), {"batch": 0}, "batch: expected at least 1, got 0"),
     ((1, 8), {"prefill": "fast"}, "expected exact or stream, got 'fast'")],
)  # fmt: skip
def test_refusals_are_one_line(
    engine: Any, shape: tuple[int, ...], how: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        perplexity(engine, np.ones(shape, np.int32), kvc.parse("none"), **how)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("x", [np.full((1, 8), 2048), np.full((1, 8), -1)])
def test_foreign_tokens_are_refused(engine: Any, x: Any) -> None:
    with pytest.raises(ConfigError, match="expected tokens from 0 to 2047"):
        perplexity(engine, x, kvc.parse("none"))


def test_fractions_are_no_tokens(engine: Any) -> None:
    with pytest.raises(ConfigError, match="as integers"):
        perplexity(engine, np.ones((1, 8)), kvc.parse("none"))


def test_nan_is_an_error(engine: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.logits

    def broken(some: Any, cache: Any) -> Any:
        x = right(some, cache)
        return x * math.nan if engine.store(cache).length() == 5 else x

    monkeypatch.setattr(engine, "logits", broken)
    with pytest.raises(KVCError, match="expected finite logits at tokens 4 to 4, got NaN"):
        perplexity(engine, ids, kvc.parse("none"))
