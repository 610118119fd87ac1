"""A conversation: what is read in each turn, and what is kept when something comes between."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc import demo
from kvc.api import load_engine, save_cache
from kvc.backends.sequences import Piece
from kvc.chat import Conversation
from kvc.errors import CacheFileError, ConfigError
from kvc.methods import Method, parse
from tests.run_cli import MODULES, need_backend
from tests.settings import lossless

TURNS = (
    "The code of Anna is 4821. The code of Anna is",
    "The code of Tom is 7777. The code of Anna is",
    "The code of Tom is",
)
LOSSLESS = {
    name: parse(name, lossless(16)[name])
    for name in ("none", "gear", "minicache", "kvsharer", "h2o")
}
NONE = parse("none")
# What the bundled model writes is cut into the same tokens when this is read again.
KEEPS = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}|{% endif %}{% endfor %}"
)
HEADED = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CUTS = HEADED.replace("m['content'] }}", "m['content'].replace(' ', '  ') }}")  # other tokens
FORGETS = "{{ bos_token }}{{ messages[-1]['content'] }}:"


@pytest.fixture(scope="module", params=list(MODULES))
def loaded(request: pytest.FixtureRequest) -> Any:
    need_backend(request.param)
    return load_engine(request.param, str(demo.path()))


class Recorder:
    """An engine that notes what it is given to read, and may be made to fail."""

    def __init__(self, engine: Any, template: str | None) -> None:
        self.engine, self.template = engine, template
        self.read: list[list[int]] = []
        self.fail_at = -1
        engine.chat_template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def stream(self, ids: list[int], cache: Any, **options: Any) -> Iterator[Piece]:
        self.read.append(list(ids))
        for n, piece in enumerate(self.engine.stream(ids, cache, **options)):
            if n == self.fail_at:
                raise RuntimeError("out of memory")
            yield piece


def say(talk: Conversation, text: str, n: int = 6, **options: Any) -> str:
    ids = talk.ask(text)
    return "".join(p.text for p in talk.stream(ids, talk.cache, max_tokens=n, **options))


def alone(engine: Any, tokens: list[int], n: int = 6) -> list[int]:
    """What one run over tokens writes with a cache that loses nothing."""
    return [p.token for p in engine.stream(tokens, engine.make_cache(NONE), max_tokens=n)]


@pytest.mark.parametrize("method", list(LOSSLESS.values()), ids=list(LOSSLESS))
def test_turns_are_one_run_over_the_whole_conversation(loaded: Any, method: Method) -> None:
    engine = Recorder(loaded, KEEPS)
    talk = Conversation(engine, method, system="Be brief.")  # type: ignore[arg-type]
    for turn in TURNS:
        before = [*talk.messages, {"role": "user", "content": turn}]
        answer = say(talk, turn)
        whole = loaded.encode(before)
        assert talk.tokens == whole + alone(loaded, whole)
        assert talk.messages[-1] == {"role": "assistant", "content": answer}
    assert [m["content"] for m in talk.messages[2::2]] == [" 4821.", " 4821.", " 7777."]
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 3]
    assert sum(map(len, engine.read)) + 6 * 3 - (talk.engine.name != "mlx") * 3 == talk.held
    assert talk.held == len(talk.tokens) - (talk.engine.name != "mlx")


@pytest.mark.parametrize("template", [CUTS, None], ids=["template", "plain"])
def test_tokens_that_were_written_stay(loaded: Any, template: str | None) -> None:
    engine = Recorder(loaded, template)
    talk = Conversation(engine, NONE)  # type: ignore[arg-type]
    for turn in TURNS:
        written, read = list(talk.tokens), talk.held
        say(talk, turn)
        assert talk.tokens[: len(written)] == written
        assert engine.read[-1] == talk.tokens[read:-6]
        assert talk.tokens[-6:] == alone(loaded, talk.tokens[:-6])
    rest = engine.tokenizer.decode(talk.tokens[len(written) :])
    if template:
        turn = TURNS[-1].replace(" ", "  ")
        assert rest.startswith(f"\n[user]{turn}\n[assistant]")
        assert engine.encode(talk.messages, reply=False)[: len(written)] != written
    else:
        assert rest.startswith(f"\n\n{TURNS[-1]}")


def test_a_template_without_answers_is_read_anew(loaded: Any) -> None:
    engine = Recorder(loaded, FORGETS)
    talk = Conversation(engine, LOSSLESS["gear"])  # type: ignore[arg-type]
    for turn in TURNS:
        say(talk, turn)
        assert engine.read[-1] == talk.tokens[:-6]
        assert talk.tokens[:-6] == loaded.encode(f"{turn}:")


@pytest.mark.parametrize("template", [HEADED, CUTS], ids=["continued", "cut"])
def test_an_end_that_the_model_has_written_is_not_read_again(loaded: Any, template: str) -> None:
    talk = Conversation(Recorder(loaded, template), NONE)  # type: ignore[arg-type]
    say(talk, TURNS[0])
    # as if the model had ended its answer: with the end that the template puts there
    (end,) = loaded.tokenizer.encode("\n", add_special_tokens=False)
    talk.tokens[-1], talk.ended = end, True
    talk.messages[-1] = {
        "role": "assistant",
        "content": loaded.tokenizer.decode(talk.tokens[-6:-1]),
    }
    written = list(talk.tokens)
    talk.ask("Why?")
    rest = loaded.tokenizer.decode(talk.tokens[len(written) :])
    assert talk.tokens[: len(written)] == written
    assert rest == "[user]Why?\n[assistant]"


def test_another_method_reads_all_again(loaded: Any) -> None:
    engine = Recorder(loaded, KEEPS)
    talk = Conversation(engine, LOSSLESS["minicache"])  # type: ignore[arg-type]
    say(talk, TURNS[0])
    with pytest.raises(ConfigError):
        talk.forget(parse("kvsharer", {"map": "30:1"}))
    assert talk.held
    talk.forget(LOSSLESS["gear"])
    assert (talk.held, talk.method) == (0, LOSSLESS["gear"])
    say(talk, TURNS[1])
    assert engine.read[-1] == talk.tokens[:-6]
    assert talk.tokens[-6:] == alone(loaded, talk.tokens[:-6])
    talk.reset()
    assert (talk.messages, talk.tokens, talk.held) == ([], [], 0)


def test_the_context_has_an_end(loaded: Any) -> None:
    engine = Recorder(loaded, KEEPS)
    engine.context_length = limit = 40
    talk = Conversation(engine, NONE)  # type: ignore[arg-type]
    for n in (limit, limit - 1):  # and <s>
        with pytest.raises(ConfigError, match=f"the model's context {limit}: no room") as error:
            talk.ask("7" * n)
        assert "\n" not in str(error.value)
        assert (talk.messages, talk.tokens) == ([], [])
    ids = talk.ask("7" * (limit - 5))
    assert len(ids) == limit - 4
    assert len(list(talk.stream(ids, talk.cache, max_tokens=100))) == 4
    assert talk.room == 0
    with pytest.raises(ConfigError, match="no room"):
        talk.ask("a")


def test_stopped_while_it_reads(loaded: Any) -> None:
    engine = Recorder(loaded, KEEPS)
    talk = Conversation(engine, LOSSLESS["gear"])  # type: ignore[arg-type]

    def stop(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        say(
            talk,
            "It was a dark night, and nobody was there. " * 9,
            prefill_step=16,
            on_prefill=stop,
        )
    held = talk.held
    assert 0 < held < len(talk.tokens)
    assert talk.messages[-1]["content"] == ""
    say(talk, TURNS[1])
    assert engine.read[-1] == talk.tokens[held:-6]
    assert talk.tokens[:-6] == loaded.encode(talk.messages[:-1])
    assert talk.tokens[-6:] == alone(loaded, talk.tokens[:-6])


@pytest.mark.parametrize("n", [1, 3])
def test_stopped_while_it_writes(loaded: Any, n: int) -> None:
    engine = Recorder(loaded, KEEPS)
    talk = Conversation(engine, LOSSLESS["gear"])  # type: ignore[arg-type]
    pieces = talk.stream(talk.ask(TURNS[0]), talk.cache, max_tokens=50)
    shown = "".join(next(pieces).text for _ in range(n))
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1]["content"] == shown
    assert talk.tokens[-n:] == alone(loaded, talk.tokens[:-n], n)
    assert talk.held in (len(talk.tokens), len(talk.tokens) - 1)
    say(talk, TURNS[1])
    assert talk.tokens[:-6] == loaded.encode(talk.messages[:-1])
    assert talk.tokens[-6:] == alone(loaded, talk.tokens[:-6])


def test_an_error_in_a_step_costs_the_cache_and_not_the_conversation(loaded: Any) -> None:
    engine = Recorder(loaded, KEEPS)
    talk = Conversation(engine, LOSSLESS["gear"])  # type: ignore[arg-type]
    engine.fail_at = 2
    with pytest.raises(RuntimeError, match="memory"):
        say(talk, TURNS[0])
    assert talk.held == 0
    assert talk.tokens[-2:] == alone(loaded, talk.tokens[:-2], 2)
    engine.fail_at = -1
    say(talk, TURNS[1])
    assert engine.read[-1] == talk.tokens[:-6]
    assert talk.tokens[-6:] == alone(loaded, talk.tokens[:-6])


def test_a_file_keeps_the_conversation(loaded: Any, tmp_path: Path) -> None:
    engine = Recorder(loaded, KEEPS)
    talk = Conversation(engine, LOSSLESS["gear"], system="Be brief.")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="an empty one"):
        talk.save(tmp_path / "none.kvc")
    say(talk, TURNS[0])
    path = tmp_path / "talk.kvc"
    talk.save(path)
    other = Conversation(engine, NONE, system="Be long.")  # type: ignore[arg-type]
    other.load(path)
    assert other.messages == talk.messages
    assert (other.tokens, other.held) == (talk.tokens, talk.held)
    assert other.method == talk.method
    assert say(other, TURNS[1]) == say(talk, TURNS[1])
    assert other.tokens == talk.tokens


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": 7},
        {"messages": [[]]},
        {"rest": [-1]},
        {"rest": [2048]},
        {"rest": [True]},
        {"start": 1000},
        {"start": "0"},
        {"ended": 0},
        {"more": 1},
    ],
    ids=str,
)
def test_forged_notes_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    need_backend("cpu")
    engine = load_engine("cpu", str(demo.path()))
    cache = engine.make_cache(NONE)
    ids = engine.encode("It was a dark night")
    engine.hidden(np.array([ids]), cache)
    path = tmp_path / "talk.kvc"
    good = {"messages": [], "rest": [], "start": 0, "ended": False}
    talk = Conversation(engine, NONE)
    for notes in (good, {**good, **change}):
        save_cache(cache, path, ids, model=engine.model, notes=json.dumps(notes))
        if notes is good:
            talk.load(path)
            assert talk.tokens == ids
            continue
        with pytest.raises(CacheFileError, match="expected those of a conversation"):
            talk.load(path)
    assert talk.tokens == ids
