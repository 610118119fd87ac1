"""The server at work: a second question on one document, and a crowd that comes and goes.

`python -m benchmarks.serve [questions|crowd|both [BACKENDS]]` starts `kvc serve` with the bundled
model on each backend (cpu,mlx) and prints JSON lines.

`questions`: the seconds to the first token of three questions, in turn, on a document in the
system's message, which fills most of the context. `crowd`: 16 clients with 20 requests each, a
third of which are left; what was answered, and the server's memory before and after.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from openai import APIStatusError, APITimeoutError, OpenAI

from kvc.demo import path
from kvc.serve.worker import IDLE

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant:{% endif %}"
)
METHODS = ("none", "gear", "kivi")
DOCUMENTS, CHARACTERS = 3, 10_000  # of a document; about 3,500 tokens
QUESTIONS = ("Who is the captain of the ship?", "Where do they go?", "What did she say to him?")
CLIENTS, REQUESTS = 16, 20
BUDGET = 20_000_000  # bytes of prefixes in the crowd


@contextmanager
def started(backend: str, method: str, *args: str) -> Iterator[tuple[int, httpx.Client]]:
    """A server's process and a client of it."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template"
        template.write_text(TEMPLATE, encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-m", "kvc", "serve", "--port", "0"]
        command += ["--backend", backend, "--method", method, "--chat-template", str(template)]
        log = Path(folder) / "log"
        with log.open("w") as out, subprocess.Popen([*command, *args], stderr=out) as process:
            while not (found := re.search(r"at (http://\S+)/v1", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            try:
                with httpx.Client(base_url=found[1], timeout=600) as client:
                    yield process.pid, client
            finally:
                process.terminate()


def first_token(client: httpx.Client, document: str, question: str) -> tuple[float, dict[str, Any]]:
    """Seconds from a question to the first token of its answer, and what it took."""
    messages = [{"role": "system", "content": document}, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 16, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    start, first, usage = time.perf_counter(), 0.0, {}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line.removeprefix("data: "))
            if not first and piece["choices"] and piece["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
            usage = piece["usage"] or usage
    return first, usage


def questions(backend: str, method: str) -> Iterator[dict[str, Any]]:
    """A row for each document."""
    book = (path() / "text.txt").read_text(encoding="utf-8")
    with started(backend, method) as (_, client):
        first_token(client, book[:300], QUESTIONS[0])  # warms up
        for i in range(DOCUMENTS):
            document = book[(start := 1000 + i * CHARACTERS) : start + CHARACTERS]
            asked = [first_token(client, document, question) for question in QUESTIONS]
            seconds = [round(took, 4) for took, _ in asked]
            yield {
                "what": "questions",
                "backend": backend,
                "method": method,
                "prompt_tokens": [usage["prompt_tokens"] for _, usage in asked],
                "cached_tokens": [
                    usage["prompt_tokens_details"]["cached_tokens"] for _, usage in asked
                ],
                "first_token_s": seconds,
                "second_over_first": round(seconds[1] / seconds[0], 4),
                "third_over_first": round(seconds[2] / seconds[0], 4),
            }


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def one(client: OpenAI, dice: random.Random, prompts: list[str]) -> str:
    """What became of a request: its status, or that it was left."""
    leaves = dice.random() < 1 / 3
    asked: dict[str, Any] = {"model": "bundled", "prompt": dice.choice(prompts)}
    asked |= {"max_tokens": dice.randrange(2, 24), "temperature": dice.choice([0, 1])}
    asked["timeout"] = dice.random() if leaves else 600
    try:
        if dice.random() < 0.5:
            client.completions.create(**asked)
            return "200"
        with client.completions.create(**asked, stream=True) as stream:
            for _ in stream:
                if leaves and dice.random() < 0.2:
                    return "left"
        return "200"
    except APITimeoutError:
        return "left"
    except httpx.ReadTimeout:  # in the midst of a stream
        return "left"
    except APIStatusError as error:
        return str(error.status_code)


def crowd(backend: str, method: str) -> Iterator[dict[str, Any]]:
    """A row for each of two rounds: what the first one leaves, the second must not add to."""
    book = (path() / "text.txt").read_text(encoding="utf-8")
    prompts = [book[i : i + n] for i in range(0, 40_000, 2000) for n in (200, 600)]
    args = ("--prefix-cache", str(BUDGET), "--queue", "8")
    with started(backend, method, *args) as (pid, client):
        asking = OpenAI(base_url=str(client.base_url.join("/v1")), api_key="any", max_retries=0)
        one(asking, random.Random(0), prompts)
        time.sleep(2 * IDLE)
        for round_ in range(2):
            before, start = resident(pid), time.perf_counter()

            def run(number: int, seed: int = round_) -> Counter[str]:
                dice = random.Random(seed * 1000 + number)
                return Counter(one(asking, dice, prompts) for _ in range(REQUESTS))

            with ThreadPoolExecutor(CLIENTS) as threads:
                found = sum(threads.map(run, range(CLIENTS)), Counter[str]())
            seconds = round(time.perf_counter() - start, 1)
            time.sleep(2 * IDLE)  # then memory is given back
            lines = client.get("/metrics").text.splitlines()
            values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            yield {
                "what": "crowd",
                "backend": backend,
                "method": method,
                "clients": CLIENTS,
                "requests": CLIENTS * REQUESTS,
                "seconds": seconds,
                "answers": dict(sorted(found.items())),
                "running": float(values["kvc_jobs_running"]),
                "waiting": float(values["kvc_jobs_waiting"]),
                "prefix_bytes": float(values["kvc_prefix_bytes"]),
                "prefix_budget": BUDGET,
                "resident_before": before,
                "resident_after": resident(pid),
            }


def main() -> None:
    """Prints a row for each document and round."""
    what = sys.argv[1] if len(sys.argv) > 1 else "both"
    backends = sys.argv[2].split(",") if len(sys.argv) > 2 else ["cpu", "mlx"]
    for backend in backends:
        packages = ("mlx", "mlx-lm") if backend == "mlx" else ("torch", "transformers")
        versions = {"versions": {package: version(package) for package in packages}}
        if what in ("questions", "both"):
            for method in METHODS:
                for row in questions(backend, method):
                    print(json.dumps(versions | row), flush=True)
        if what in ("crowd", "both"):
            for row in crowd(backend, "gear"):
                print(json.dumps(versions | row), flush=True)


if __name__ == "__main__":
    main()
