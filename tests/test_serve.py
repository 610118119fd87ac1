"""The server as a client sees it: OpenAI's own, and one that asks for what cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from kvc.serve import app
from kvc.serve.errors import refused
from kvc.serve.prefixes import Prefixes
from kvc.serve.protocol import ChatRequest, CompletionRequest
from kvc.serve.stops import Stops
from tests.serve_fake import BREAK, FakeEngine, FakeModel, Running, answer, serving, until

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
CHAT = "<system>Be brief.<user>Who?<assistant>"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeModel(prefixes=Prefixes(len, 10_000))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's form."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


def test_a_completion_has_text_and_usage(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fake", prompt="hello", max_tokens=7, temperature=0)
    assert got.choices[0].text == answer("hello", 7)
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (5, 7)
    assert got.usage.model_extra == {"kvc": {"cache_bytes": 12, "dense_bytes": 48}}


def test_tokens_are_a_prompt_too(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fake", prompt=[104, 105], max_tokens=3)
    assert got.choices[0].text == answer("hi", 3)


def test_a_chat_goes_through_the_template(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=9)
    assert got.choices[0].message.content == answer(CHAT, 9)
    assert got.choices[0].message.role == "assistant"


def test_parts_of_text_are_joined_and_developers_are_the_system(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages: Any = [{"role": "developer", "content": parts}, MESSAGES[1]]
    got = client.chat.completions.create(model="fake", messages=messages, max_tokens=9)
    assert got.choices[0].message.content == answer(CHAT, 9)


def test_a_streamed_completion_is_the_same_text(client: openai.OpenAI) -> None:
    pieces = list(client.completions.create(model="fake", prompt="hi", max_tokens=30, stream=True))
    assert "".join(p.choices[0].text for p in pieces) == answer("hi", 30)
    assert [p.choices[0].finish_reason for p in pieces[-2:]] == [None, "length"]
    assert all(p.usage is None for p in pieces)


def test_a_streamed_chat_ends_with_its_usage(client: openai.OpenAI) -> None:
    pieces = list(
        client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, last = pieces
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in texts) == answer(CHAT, 30)
    assert texts[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == len(CHAT) + 30


def test_events_are_lines_of_data_and_end_with_done(server: Running) -> None:
    response = server.post(prompt="hi", max_tokens=2, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


def test_a_text_ends_the_answer_and_is_left_out(client: openai.OpenAI) -> None:
    whole = answer("hi", 40)
    stop = whole[10:14]
    got = client.completions.create(model="fake", prompt="hi", max_tokens=40, stop=[stop, "zzz"])
    assert got.choices[0].text == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    read = "hi" + whole[: whole.index(stop) + len(stop)]
    assert got.usage is not None
    held = {"cache_bytes": len(read), "dense_bytes": 4 * len(read)}
    assert got.usage.model_extra == {"kvc": held}
    pieces = client.completions.create(
        model="fake", prompt="hi", max_tokens=40, stop=stop, stream=True
    )
    assert "".join(p.choices[0].text for p in pieces) == whole[: whole.index(stop)]


def test_text_that_only_begins_as_a_stop_is_given_out_in_the_end(client: openai.OpenAI) -> None:
    whole = answer("hi", 10)
    got = client.completions.create(model="fake", prompt="hi", max_tokens=10, stop=whole[-3:] + "~")
    assert got.choices[0].text == whole


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stops_are_found_across_the_borders_of_pieces(size: int) -> None:
    text, stops = "abcabababcd and more", Stops(["ababc", "zz"])
    given = ""
    for start in range(0, len(text), size):
        given += stops.add(text[start : start + size])
        if stops.found:
            break
    assert stops.found
    assert given == "abcab"
    assert stops.rest() == ""


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "kvc"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_settings_reach_the_batch(server: Running) -> None:
    server.post(prompt="a", temperature=0.5, top_p=0.25, seed=-1, max_tokens=3)
    row = server.model.batches[-1].added[-1]
    assert (row.temp, row.top_p, row.seed, row.max_tokens) == (0.5, 0.25, 2**63 - 1, 3)
    server.post(prompt="a")
    row = server.model.batches[-1].added[-1]
    assert (row.temp, row.top_p, row.seed, row.max_tokens) == (1.0, 1.0, None, 16)


def test_what_clients_send_by_default_changes_nothing(server: Running) -> None:
    neutral = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me",
        "metadata": {"a": "b"}, "model": None, "stop": None, "stream": False, "seed": None,
    }  # fmt: skip
    text = {"best_of": 1, "echo": False, "logprobs": None, "suffix": ""}
    assert server.post(prompt="a", **neutral, **text).status_code == 200
    chat = {
        "logprobs": False, "tools": [], "tool_choice": "none", "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "top_logprobs": 0, "modalities": ["text"],
    }  # fmt: skip
    assert server.post("chat/completions", messages=MESSAGES, **neutral, **chat).is_success


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", "7"),
        ("max_tokens", True), ("temperature", -0.1), ("temperature", 2.1), ("top_p", 0),
        ("top_p", 1.1), ("seed", 2**63), ("stop", ""), ("stop", ["a"] * 5), ("stop", [1]),
        ("n", 2), ("echo", True), ("logprobs", 3), ("best_of", 2), ("suffix", "x"),
        ("presence_penalty", 0.1), ("logit_bias", {"5": 1}), ("top_k", 5), ("stream", "yes"),
        ("stream_options", {"other": 1}), ("prompt", ["a", "b"]), ("prompt", []),
        ("prompt", [-1]), ("prompt", [0x110000]), ("prompt", 5), ("prompt", None), ("prompt", ""),
        ("metadata", "a"), ("model", 5),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_name(server: Running, field: str, value: Any) -> None:
    error = refusal(server.post(**{"prompt": "a", field: value}), 400)
    assert error["param"] == field
    assert error["message"].startswith(field)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []), ("messages", "hi"), ("messages", [{"role": "user"}]),
        ("messages", [{"role": "tool", "content": "a"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "assistant", "content": "the template refuses this"}]),
        ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("logprobs", True),
        ("response_format", {"type": "json_object"}), ("max_completion_tokens", -5),
        ("functions", []), ("audio", {}),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_are_refused(server: Running, field: str, value: Any) -> None:
    body = {"messages": MESSAGES, field: value}
    assert refusal(server.post("chat/completions", **body), 400)["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"prompt": "a",}', b"[]", b'"prompt"', b"\xff", b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "top_p": NaN}', b'{"prompt": "a", "seed": 1%s}' % (b"0" * 999),
        b"[" * 10_000,
    ],
    ids=range(10),
)  # fmt: skip
def test_damaged_json_is_refused(server: Running, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.http.post("/v1/completions", content=body, headers=headers)
    refusal(response, 400)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 1000}, {"prompt": "a", "stop": [1] * 1000}, {"messages": [{}] * 1000},
        {"messages": [{"role": "user", "content": [5] * 1000}]},
        {"prompt": "a", **{f"k{i}": 0 for i in range(1000)}},
        {"prompt": "a", "metadata": {f"k{i}": 0 for i in range(1000)}, "n": 2},
    ],
    ids=range(6),
)  # fmt: skip
def test_a_thousand_mistakes_cost_no_more_than_one(body: dict[str, Any]) -> None:
    kind = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    assert caught.value.error_count() <= 2  # one for each type that a field may have
    assert len(refused(caught.value).message) < 300


def test_other_errors_have_the_same_form(server: Running) -> None:
    assert refusal(server.post(prompt="a", model="gpt"), 404)["code"] == "model_not_found"
    assert refusal(server.post(prompt="a" * 1000), 400)["code"] == "context_length_exceeded"
    assert refusal(server.http.get("/v2"), 404)["code"] == "unknown_url"
    assert refusal(server.http.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    response = server.http.post("/v1/completions", data={"prompt": "a"})
    assert refusal(response, 415)["code"] == "content_type"


def test_an_answer_ends_where_the_context_does(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fake", prompt="a" * 995, max_tokens=50)
    assert got.usage is not None
    assert got.usage.completion_tokens == 5


def test_a_chat_needs_a_template(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    monkeypatch.setattr(FakeEngine, "chat_template", None)
    error = refusal(server.post("chat/completions", messages=MESSAGES), 400)
    assert error["code"] == "no_chat_template"


def test_what_fails_fails_alone(server: Running, client: openai.OpenAI) -> None:
    assert "NaN" in refusal(server.post(prompt=f"a{BREAK}"), 500)["message"]
    stream = client.completions.create(model="fake", prompt=f"a{BREAK}", stream=True)
    with pytest.raises(openai.APIError, match="NaN"):
        list(stream)
    assert server.post(prompt="a").is_success


def test_a_bug_is_an_error_in_the_same_form(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeEngine, "encode", lambda *_: 1 / 0)
    assert refusal(server.post(prompt="a"), 500)["type"] == "server_error"
    until(lambda: "ZeroDivisionError" in caplog.text)


def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SILENCE", 0.05)
    model = FakeModel()
    model.gate.clear()
    body = {"prompt": "hi", "max_tokens": 3, "stream": True}
    with (
        serving(model) as server,
        server.http.stream("POST", "/v1/completions", json=body) as response,
    ):
        pieces = response.iter_text()
        assert next(pieces) == ": it goes on\n\n"
        model.gate.set()
        events = "".join(pieces)
    assert events.endswith("data: [DONE]\n\n")
    assert answer("hi", 3) == "".join(
        json.loads(line[6:])["choices"][0]["text"]
        for line in events.splitlines()
        if line.startswith("data: {")
    )


def test_a_broken_batch_is_replaced(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    server.model.batches[-1].broken = True
    error = refusal(server.post(prompt="a"), 500)
    assert error["message"] == "the server failed; see its log"
    assert "out of memory, say" in caplog.text
    assert server.post(prompt="a").is_success
    assert len(server.model.batches) == 2


def test_metrics_and_health_tell_what_happened() -> None:
    with serving(FakeModel()) as server:
        server.post(prompt="abc", max_tokens=5)
        server.post(prompt="abc", n=3)
        assert server.http.get("/health").json() == {"status": "ok"}
        response = server.http.get("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    assert lines['kvc_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert lines['kvc_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert lines['kvc_tokens_total{kind="prompt"}'] == "3.0"
    assert lines['kvc_tokens_total{kind="generated"}'] == "5.0"
    assert lines["kvc_first_token_seconds_count"] == "1.0"
    assert lines["kvc_jobs_running"] == lines["kvc_jobs_waiting"] == "0.0"
