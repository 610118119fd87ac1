"""The server over the bundled model, on both backends: its texts, its memory, its manners."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import kvc
from kvc.demo import path
from kvc.methods import parse
from kvc.serve.folder import Folder
from kvc.serve.model import Served
from kvc.serve.prefixes import TAIL, Prefixes
from kvc.store.store import KVStore
from tests.run_cli import MODULES, PROMPT, generate_json, need_backend
from tests.serve_fake import Running, serving, until

BOOK = (path() / "text.txt").read_text(encoding="utf-8")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant:{% endif %}"
)
PROMPTS = [PROMPT, BOOK[:600], "It was a dark night", BOOK[400:700]]


def loader(backend: str, method: str = "gear", budget: int = 10**8) -> Callable[[], Served]:
    """What loads the bundled model, in the thread of the server."""

    def load() -> Served:
        engine = kvc.load_engine(backend, str(path()))
        engine.chat_template = TEMPLATE
        served = Served(engine, parse(method), "exact", 512, 3)
        served.prefixes = Prefixes(served.size, budget)
        return served

    return load


@pytest.fixture(scope="module", params=list(MODULES))
def backend(request: pytest.FixtureRequest) -> str:
    need_backend(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def server(backend: str) -> Iterator[Running]:
    with serving(loader(backend), name="bundled", max_waiting=40) as running:
        yield running


@pytest.fixture(scope="module")
def expected(backend: str) -> Callable[..., str]:
    """What the engine's own loop says, as `kvc generate` does."""
    engine = kvc.load_engine(backend, str(path()))
    engine.chat_template = TEMPLATE

    def text(prompt: Any, max_tokens: int) -> str:
        options: dict[str, Any] = {"temp": 0.0, "top_p": 1.0, "seed": None}
        options |= {"max_tokens": max_tokens, "prefill_step": 512, "on_prefill": None}
        ids = prompt if isinstance(prompt[0], int) else engine.encode(prompt)
        cache = engine.make_cache(parse("gear"))
        return "".join(piece.text for piece in engine.stream(ids, cache, **options))

    return text


@contextmanager
def client_of(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def cached(response: httpx.Response) -> int:
    assert response.is_success, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_greedy_texts_are_those_of_generate(server: Running, backend: str) -> None:
    row = generate_json(backend, PROMPT, "--max-tokens", "20")
    with client_of(server) as client:
        asked: dict[str, Any] = {"model": "bundled", "prompt": PROMPT, "max_tokens": 20}
        got = client.completions.create(**asked, temperature=0)
        pieces = list(client.completions.create(**asked, temperature=0, stream=True))
    assert got.choices[0].text == row["text"]
    assert "".join(piece.choices[0].text for piece in pieces) == row["text"]
    assert got.usage is not None
    assert got.usage.prompt_tokens == row["prompt_tokens"]
    assert got.usage.model_extra == {"kvc": {k: row[k] for k in ("cache_bytes", "dense_bytes")}}


def test_texts_made_together_are_those_made_alone(
    server: Running, expected: Callable[..., str]
) -> None:
    def ask(prompt: str) -> str:
        response = server.post(prompt=prompt, max_tokens=16, temperature=0)
        return str(response.json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        got = list(threads.map(ask, PROMPTS))
    assert got == [expected(prompt, 16) for prompt in PROMPTS]


def test_a_chat_in_the_template_that_was_given(
    server: Running, expected: Callable[..., str]
) -> None:
    messages: Any = [
        {"role": "system", "content": BOOK[4000:4200]},
        {"role": "user", "content": "Who spoke?"},
    ]
    with client_of(server) as client:
        got = client.chat.completions.create(
            model="bundled", messages=messages, max_tokens=12, temperature=0
        )
    assert got.choices[0].message.content == expected(messages, 12)


def test_samples_follow_their_seed(server: Running) -> None:
    def ask(seed: int) -> str:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.5, "seed": seed}
        return str(server.post(**body).json()["choices"][0]["text"])

    assert ask(1) == ask(1) != ask(2)


def test_a_second_question_does_not_read_the_document_again(server: Running) -> None:
    def ask(question: str) -> httpx.Response:
        document = {"role": "system", "content": BOOK[6000:6800]}
        messages = [document, {"role": "user", "content": question}]
        return server.post("chat/completions", messages=messages, max_tokens=4, temperature=0)

    first, second = ask("Who is the captain?"), ask("Where do they go?")
    assert cached(first) == 0
    prompt = second.json()["usage"]["prompt_tokens"]
    assert prompt - 20 < cached(second) < prompt
    assert cached(ask("Who is the captain?")) >= cached(second)


@pytest.mark.parametrize("more", [1, 2, 3, 5])
def test_any_number_of_tokens_may_follow_what_is_stored(
    server: Running, expected: Callable[..., str], more: int
) -> None:
    """Where nothing is compressed yet, the text is that of one prompt."""
    ids = [100 + 7 * i + more for i in range(50)]
    server.post(prompt=ids, max_tokens=1, temperature=0)
    stored = ids[:-TAIL]
    longer = [*stored, *ids[:more]]
    response = server.post(prompt=longer, max_tokens=8, temperature=0)
    assert cached(response) == len(stored)
    assert response.json()["choices"][0]["text"] == expected(longer, 8)


def test_a_conversation_goes_on_from_its_compressed_cache(server: Running) -> None:
    messages = [{"role": "user", "content": BOOK[9000:9300] + " What now?"}]
    row = server.post("chat/completions", messages=messages, max_tokens=12, temperature=0).json()
    messages += [
        {"role": "assistant", "content": row["choices"][0]["message"]["content"]},
        {"role": "user", "content": "And then?"},
    ]
    response = server.post("chat/completions", messages=messages, max_tokens=4, temperature=0)
    assert cached(response) >= row["usage"]["prompt_tokens"] - 3


def test_caches_are_found_again_by_the_next_server(backend: str, tmp_path: Path) -> None:
    load, prompt = loader(backend), BOOK[1000:1300]

    def with_folder(method: str = "gear") -> Served:
        served = load()
        served.method = parse(method)
        folder = Folder(tmp_path, served.engine, served.method, str(path()))
        served.prefixes = Prefixes(served.size, 10**8, folder, 10**8)
        return served

    rows, found = [], []
    for method in ("gear", "gear", "kivi"):
        with serving(lambda method=method: with_folder(method), name="bundled") as server:
            found.append(len(server.model.prefixes))
            rows.append(server.post(prompt=prompt, max_tokens=8, temperature=0))
            rows.append(server.post(prompt=prompt, max_tokens=8, temperature=0))
    texts = [row.json()["choices"][0]["text"] for row in rows]
    assert found == [0, 2, 0]  # the prompt, and with its answer
    assert [cached(row) > 0 for row in rows] == [False, True, True, True, False, True]
    assert texts[1] == texts[2] == texts[3]


def stores() -> int:
    """How many caches there are in this process, those in cycles that nobody holds too."""
    return sum(type(x) is KVStore for x in gc.get_objects())


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Cycles stay until somebody asks for them, as between two rare collections of Python's."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_a_crowd_that_comes_and_goes_leaves_nothing_behind(backend: str) -> None:
    with serving(loader(backend, budget=2 * 10**6), name="bundled", max_waiting=3) as server:
        before, prefixes = stores(), server.model.prefixes
        with ThreadPoolExecutor(6) as threads:
            statuses = [s for found in threads.map(crowd, [server] * 6, range(6)) for s in found]
        assert {*statuses} <= {200, 429, None}
        assert statuses.count(200) > 5
        assert statuses.count(None) > 3
        assert server.post(prompt=PROMPT, max_tokens=2).is_success
        assert server.worker.running == server.worker.waiting == 0
        assert 0 < prefixes.nbytes <= prefixes.budget
        until(lambda: stores() - before == len(prefixes))
        server.model.rest()


def crowd(server: Running, number: int, requests: int = 6) -> list[int | None]:
    """One client's answers: their statuses, None where it went away."""
    dice, statuses = random.Random(number), []
    for turn in range(requests):
        body = {"prompt": dice.choice(PROMPTS), "max_tokens": dice.randrange(2, 12)}
        body |= {"stream": dice.random() < 0.5, "temperature": dice.choice([0, 1])}
        leaves = (number + turn) % 3 == 0
        try:
            statuses.append(ask(f"{server.url}/v1/completions", body, leaves))
        except httpx.ReadTimeout:
            statuses.append(None)
    return statuses


def ask(url: str, body: dict[str, Any], leaves: bool) -> int | None:
    """A request's status; who leaves reads one piece of a stream, or does not wait at all."""
    with httpx.stream("POST", url, json=body, timeout=0.02 if leaves else 60.0) as response:
        if leaves and response.status_code == 200:
            next(response.iter_raw(), None)
            return None
        response.read()
    assert response.status_code != 200 or not body["stream"] or "[DONE]" in response.text
    return response.status_code
