"""lm-evaluation-harness through the compressed cache, on tasks of our own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import kvc
import kvc.demo
from kvc import api
from kvc.methods import parse
from tests.broken import break_codec
from tests.conftest import need
from tests.run_cli import error_line, kvc_run, need_backend
from tests.settings import lossless
from tests.test_cli_errors import no_engine
from tests.tolerances import LOGITS

TASKS = Path(__file__).with_name("lm_eval_tasks")
NAMES = ["kvc_gsm8k", "kvc_bbh", "kvc_text"]
CODED = {"gear.group_size": "32", "gear.buffer": "32"}
BROKEN = {"bits": 8, **CODED}
pytestmark = pytest.mark.filterwarnings("ignore")  # of many packages
FOUND: dict[Any, Any] = {}


def evaluate(backend: str, name: str, settings: dict[str, Any], **given: Any) -> dict[str, Any]:
    """What the harness finds out about two rows of each task."""
    need("lm_eval")
    need_backend(backend)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from kvc.measure.lm_eval import CompressedLM
    from kvc.measure.score import Scorer

    if backend not in FOUND:
        FOUND[backend] = kvc.load_engine(backend, str(kvc.demo.path()))
    scorer = Scorer(FOUND[backend], parse(name, settings), step=8, **given)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found: Any = simple_evaluate(
        CompressedLM(scorer, {"method": name}),
        tasks=NAMES,
        task_manager=manager,
        limit=2,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return dict(found)


def dense(backend: str) -> dict[str, Any]:
    key = (backend, "none")
    if key not in FOUND:
        FOUND[key] = evaluate(backend, "none", {})
    found: dict[str, Any] = FOUND[key]
    return found


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model answered, by task."""
    return {name: [row["resps"] for row in rows] for name, rows in found["samples"].items()}


def numbers(found: Any) -> list[float]:
    """Every log-probability among answers."""
    if isinstance(found, float):
        return [found]
    return [x for y in found for x in numbers(y)] if isinstance(found, list | tuple) else []


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    got, wanted = answers(found), answers(expected)
    assert got["kvc_gsm8k"] == wanted["kvc_gsm8k"]
    for name in NAMES[1:]:
        assert numbers(got[name])
        assert numbers(got[name]) == pytest.approx(numbers(wanted[name]), rel=1e-4, abs=1e-3)
    for task, metric in (("kvc_gsm8k", "exact_match,flexible-extract"), ("kvc_bbh", "acc,none")):
        assert found["results"][task][metric] == expected["results"][task][metric]


def test_a_model_that_remembers_solves_them() -> None:
    found = dense("cpu")
    assert found["results"]["kvc_gsm8k"]["exact_match,flexible-extract"] == 1
    assert found["results"]["kvc_bbh"]["acc,none"] == 1
    assert 1 < found["results"]["kvc_text"]["bits_per_byte,none"] < 2
    assert found["config"]["method"] == "none"
    assert found["config"]["cache_bytes"] >= found["config"]["dense_bytes"] > 0


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
@pytest.mark.parametrize("name", ["gear", "minicache"])
def test_lossless_limits_score_as_the_dense_cache(backend: str, name: str) -> None:
    close(evaluate(backend, name, lossless(32)[name]), dense(backend))


def test_backends_agree() -> None:
    close(dense("mlx"), dense("cpu"))
    settings = {"bits": 4, **CODED}
    few = evaluate("cpu", "kivi", settings)
    close(evaluate("mlx", "kivi", settings), few)
    assert few["config"]["ratio"] > 2
    changed = numbers(answers(few)["kvc_bbh"])
    assert changed != pytest.approx(numbers(answers(dense("cpu"))["kvc_bbh"]), abs=1e-2)


def test_a_broken_codec_is_seen_in_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    good = evaluate("cpu", "gear", BROKEN)
    break_codec(monkeypatch)
    bad = evaluate("cpu", "gear", BROKEN)
    full = dense("cpu")
    assert answers(bad)["kvc_gsm8k"] != answers(full)["kvc_gsm8k"] == answers(good)["kvc_gsm8k"]
    for name in NAMES[1:]:
        a, b, c = (numbers(answers(found)[name]) for found in (good, bad, full))
        assert max(abs(x - z) for x, z in zip(a, c, strict=True)) < 0.1 * max(
            abs(y - z) for y, z in zip(b, c, strict=True)
        )


def test_as_the_harness_s_own_model() -> None:
    """Its `hf` model does not read the cache: without compression that changes nothing."""
    expected = dense("cpu")
    need("accelerate")  # which lm_eval wants for it
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found: Any = simple_evaluate(
        HFLM(pretrained=str(kvc.demo.path()), device="cpu", dtype="float32"),
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        limit=2,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    close(expected, found)


def test_long_contexts_lose_their_beginning() -> None:
    need("lm_eval")
    need_backend("cpu")
    from kvc.errors import ConfigError
    from kvc.measure.lm_eval import CompressedLM
    from kvc.measure.score import Scorer

    dense("cpu")
    lm = CompressedLM(Scorer(FOUND["cpu"], parse("none")))
    most = lm.max_length
    assert most == 4096
    pair = lm._pair(list(range(5000)), [1, 2, 3])
    assert pair.context == list(range(5000 - (most + 1 - 3), 5000))
    assert len(pair.context) + len(pair.answer) == most + 1
    assert lm._pair([5], [1] * most).context == [5]
    with pytest.raises(ConfigError, match="answers of at most 4096 tokens"):
        lm._pair([5], [1] * (most + 1))
    with pytest.raises(ConfigError, match="max_gen_toks=4096"):
        lm.generate_until([Request("a", {"until": [], "max_gen_toks": 4096})])
    assert not lm.asked


class Request:
    """One of the harness's, by its arguments."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def test_texts_longer_than_the_context_are_read_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    need("lm_eval")
    need_backend("cpu")
    from kvc.measure.lm_eval import CompressedLM
    from kvc.measure.score import Scorer

    dense("cpu")
    monkeypatch.setattr(CompressedLM, "max_length", 8)
    lm = CompressedLM(Scorer(FOUND["cpu"], parse("none"), step=8))
    ids = lm.tok_encode("The road to the village lay white before them.")
    whole = lm.loglikelihood_rolling([Request("The road to the village lay white before them.")])
    alone = [
        lm._loglikelihood_tokens([(None, [lm.prefix_token_id], ids[:8])]),
        *(
            lm._loglikelihood_tokens([(None, ids[max(8, i + 8) - 9 : i], ids[i : i + 8])])
            for i in range(8, len(ids) - len(ids) % 8, 8)
        ),
    ]
    last = len(ids) % 8
    if last:
        start = len(ids) - last
        alone.append(lm._loglikelihood_tokens([(None, ids[-9:start], ids[start:])]))
    assert whole == pytest.approx([sum(found[0][0] for found in alone)], abs=10 * LOGITS["exact"])


# The command


def run(*args: str) -> Result:
    need("lm_eval")
    need_backend("cpu")
    options = ("--backend", "cpu", "--step", "8", "--tasks", "kvc_bbh", *args)
    return kvc_run("lm-eval", *options, *[] if "--" in args else ["--"], *more())


def more() -> list[str]:
    return ["--include_path", str(TASKS), "--limit", "2"]


def test_results_carry_the_method_and_its_bytes(tmp_path: Path) -> None:
    sets = [x for key, value in CODED.items() for x in ("--set", f"{key}={value}")]
    result = run("--method", "kivi", *sets, "--", "--output_path", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "|kvc_bbh|" in result.stdout
    assert "kivi, cpu: 6 caches hold " in result.stderr
    (path,) = tmp_path.rglob("results_*.json")
    config = json.loads(path.read_text())["config"]
    assert config["method"] == "kivi"
    assert config["settings"] == CODED
    assert config["caches"] == 6
    assert config["ratio"] == config["dense_bytes"] / config["cache_bytes"] > 2


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("lm_eval")
    from kvc.measure.score import Scorer

    args = ("--method", "none", "--quiet", "--", "--use_cache", str(tmp_path / "answers"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    scores, asked = Scorer.scores, []

    def cut(self: Scorer, pairs: Any) -> Iterator[Any]:
        for n, found in enumerate(scores(self, pairs)):
            if n == 4:
                signal.raise_signal(signal.SIGINT)
            yield found

    def count(self: Scorer, pairs: Any) -> Iterator[Any]:
        asked.append(len(pairs))
        return scores(self, pairs)

    try:
        monkeypatch.setattr(Scorer, "scores", cut)
        result = run(*args)
        line = "kvc: interrupted; the same command goes on where it was\n"
        assert (result.exit_code, result.stderr) == (130, line)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(Scorer, "scores", count)
    done = run(*args)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert asked == [2]
    other = run("--method", "kivi", *args[2:])
    assert other.exit_code == 0, other.output
    assert asked == [2, 6]  # another method's answers are its own


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--method", "geer"), ["geer"]),
        (("--set", "bits=3"), ["bits", "3"]),
        (("--tasks", "nonesuch"), ["Tasks not found: nonesuch"]),
        (("--", "--nonesuch"), ["unrecognized", "--nonesuch"]),
        (("--", "--model", "hf"), ["--model", "in front"]),
        (("--", "--model_args", "pretrained=gpt2"), ["--model_args", "in front"]),
        (("--", "--log_samples"), ["--output_path"]),
        (("--", "--num_fewshot", "few"), ["num_fewshot", "few"]),
    ],
)
def test_errors_are_one_line_and_come_first(
    args: tuple[str, ...], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("lm_eval")
    import kvc.measure.lm_eval

    monkeypatch.setattr(kvc.measure.lm_eval, "load_engine", no_engine)
    line = error_line(run("--quiet", *args))
    assert all(word in line for word in words), line


def test_other_errors() -> None:
    need("lm_eval")
    assert "cannot load" in error_line(run("--quiet", "--model", "nobody/nothing"))
    assert "batch_size" in error_line(run("--quiet", "--", "--batch_size", "many"))
    assert "group_size" in error_line(run("--quiet", "--set", "group_size=48"))


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(api, "load_engine", no_engine)
    line = error_line(kvc_run("lm-eval", "--tasks", "gsm8k"))
    assert "pip install 'kvc[lm-eval]'" in line
