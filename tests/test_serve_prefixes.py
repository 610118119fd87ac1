"""Stored beginnings of prompts: which are found, where copies are cut, what leaves memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc.errors import KVCError
from kvc.serve.prefixes import GAP, TAIL, Prefixes, shared
from tests.serve_fake import FakeModel, answer, serving
from tests.test_serve_faults import Folder

A, B, C = 50 * [1], 50 * [2], 50 * [3]


def stored(*prompts: list[int], budget: int = 10_000) -> Prefixes:
    prefixes = Prefixes(len, budget)
    for ids in prompts:
        prefixes.put(ids, list(ids))
    return prefixes


def lengths(folder: Path) -> list[int]:
    return sorted(path.stat().st_size for path in folder.iterdir())


@given(*[st.lists(st.integers(0, 1), max_size=6)] * 2)
def test_shared_counts_equal_tokens_at_the_start(a: list[int], b: list[int]) -> None:
    n = shared(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_the_longest_beginning_is_found_but_not_the_whole_prompt() -> None:
    prefixes = stored(A, A + B, A + C, A + B + C)
    found = prefixes.find(A + B + C)
    assert found is not None
    assert (found.n, found.cache) == (100, A + B)
    assert prefixes.find(B) is None
    assert prefixes.find(A[:-1]) is None


def test_what_is_found_is_a_copy() -> None:
    prefixes = stored(A)
    for _ in range(2):
        found = prefixes.find(A + B)
        assert found is not None
        assert found.cache == A
        found.cache.extend(B)


def test_short_beginnings_are_not_worth_it() -> None:
    prefixes = stored(A[: GAP - 1])
    assert len(prefixes) == 0
    assert prefixes.cuts(A[:GAP], 0, ()) == []


def test_cuts_are_where_prompts_may_branch_off() -> None:
    prompt = A + B + C
    assert stored().cuts(prompt, 0, [100]) == [100, 147]
    assert stored(A + B[:10]).cuts(prompt, 0, []) == [60, 147]
    assert stored(A + B[:10]).cuts(prompt, 60, []) == [147]
    assert stored().cuts(prompt, 0, [100, 100 + GAP - 1]) == [100, 147]
    assert stored(prompt).cuts(prompt, 0, [149, 150]) == [150 - TAIL]


def test_a_third_prompt_gains_what_the_second_has_found() -> None:
    model = FakeModel(prefixes=stored())
    document, usage = "d" * 200, "prompt_tokens_details"
    with serving(model) as server:
        cached = [
            server.post(prompt=document + end * 60, max_tokens=1).json()["usage"][usage]
            for end in "abcd"
        ]
    assert [row["cached_tokens"] for row in cached] == [0, 0, 200, 200]
    assert [[len(s) for s in row.segments] for row in model.batches[0].added] == [
        [257, 3], [200, 57, 3], [57, 3], [57, 3],
    ]  # fmt: skip


def test_a_conversation_goes_on_from_its_last_answer() -> None:
    model = FakeModel(prefixes=stored())
    model.engine.encode = lambda messages, reply=True: [
        ord(c) for m in messages for c in f"{m['content']:_<40}"
    ]
    messages = [{"role": "user", "content": "Who?"}]
    with serving(model) as server:
        for start in (0, 80, 160):
            row = server.post("chat/completions", messages=messages, max_tokens=40).json()
            assert row["usage"]["prompt_tokens_details"]["cached_tokens"] == start
            messages.append(row["choices"][0]["message"] | {"role": "assistant"})
            messages[-1].pop("refusal")
            messages.append({"role": "user", "content": "And?"})


def test_an_answer_that_ended_by_a_text_is_stored_too() -> None:
    prompt, stop = "d" * 100, answer("d" * 100, 60)[40:46]
    with serving(FakeModel(prefixes=stored())) as server:
        assert server.post(prompt=prompt, stop=stop, max_tokens=60).is_success
        more = prompt + answer(prompt, 60)
        usage = server.post(prompt=more, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 100 + 46


def test_those_used_least_recently_leave() -> None:
    prefixes = stored(A, B, budget=100)
    assert prefixes.nbytes == 100
    assert prefixes.find([*A, 0])
    prefixes.put(C, list(C))
    assert prefixes.find([*B, 0]) is None
    assert prefixes.find([*A, 0])
    assert prefixes.find([*C, 0])
    assert prefixes.nbytes == 100
    prefixes.put(5 * A, 5 * A)
    assert len(prefixes) == prefixes.nbytes == 0


def test_the_same_tokens_count_once() -> None:
    once = stored(A).nbytes
    assert stored(A, A).nbytes == once


def test_files_hold_what_memory_cannot(tmp_path: Path) -> None:
    prefixes = Prefixes(len, 60, Folder(tmp_path), 120)
    prefixes.put(A, list(A))
    assert lengths(tmp_path) == []
    prefixes.put(B, list(B))
    assert lengths(tmp_path) == [50]
    found = prefixes.find([*A, 0])  # now B leaves
    assert found is not None
    assert found.cache == A
    assert lengths(tmp_path) == [50, 50]
    assert prefixes.find([*B, 0])
    assert prefixes.find([*A, 0])
    assert lengths(tmp_path) == [50, 50]  # what is in a file is not written again
    assert prefixes.nbytes == 50


def test_files_have_a_budget_too(tmp_path: Path) -> None:
    prefixes = Prefixes(len, 0, Folder(tmp_path), 120)
    for ids in (A, B, C):
        prefixes.put(ids, list(ids))
    assert lengths(tmp_path) == [50, 50]
    assert prefixes.find([*A, 0]) is None
    assert prefixes.find([*B, 0])
    assert Prefixes(len, 0, Folder(tmp_path), 60).find([*C, 0])
    assert lengths(tmp_path) == [50]


def test_times_of_files_tell_which_was_used_last(tmp_path: Path) -> None:
    prefixes = Prefixes(len, 1000, Folder(tmp_path), 1000)
    for ids in (A, B, C):
        prefixes.put(ids, list(ids))
    assert prefixes.spill() == 3
    assert prefixes.find([*A, 0])
    assert prefixes.spill() == 3
    by_time = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
    assert [path.read_bytes()[0] for path in by_time] == [2, 3, 1]


def test_a_damaged_file_is_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Damaged(Folder):
        def read(self, path: Path) -> list[int]:
            raise KVCError("the file is damaged")

    prefixes = Prefixes(len, 0, Damaged(tmp_path), 1000)
    prefixes.put(A, list(A))
    assert prefixes.find([*A, 0]) is None
    assert "damaged" in caplog.text
    assert (lengths(tmp_path), len(prefixes), prefixes.file_bytes) == ([], 0, 0)


def test_a_full_disk_loses_a_cache_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Folder):
        def write(self, ids: object, cache: object) -> Path:
            raise OSError("no space left on device")

    prefixes = Prefixes(len, 60, Full(tmp_path), 1000)
    prefixes.put(A, list(A))
    prefixes.put(B, list(B))
    assert prefixes.find([*A, 0]) is None
    assert prefixes.find([*B, 0])
    assert "no space left" in caplog.text
    assert prefixes.spill() == 0
