"""`kvc bench`: rows with speeds, bytes and errors; ratios of one run; nothing done is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from kvc import api
from kvc.errors import KernelUnavailable
from kvc.measure import provenance
from kvc.measure.choice import read_choice
from kvc.measure.speed import attention, generate, memory, race
from kvc.measure.speed.bench import Bench
from kvc.measure.speed.clock import NotRaced, Times, in_turns
from kvc.measure.speed.race import Point, Race, compare
from kvc.measure.speed.table import note, table
from kvc.measure.speed.truth import error, exact
from kvc.methods import PRESETS, parse
from kvc.ops import dispatch
from kvc.store.store import KVStore
from tests.conftest import need
from tests.run_cli import both, error_line, kvc_run, need_backend
from tests.test_cli_errors import no_engine
from tests.tolerances import LOGITS, PRODUCTS

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' quantizers
CODED = "kivi group_size=16 buffer=16"
OFF = 10 * PRODUCTS["float32"][0]  # of an answer whose largest entry is small: random tokens cancel
RIVALS = {"cpu": "fp8", "mlx": "kv-bits 4"}
ENGINES: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other files of the checkout may change while tests run."""
    monkeypatch.setattr(race, "commit", lambda: "abc")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is not what is tested here."""
    load = api.load_engine

    def known(backend: str, *args: Any) -> Any:
        if backend not in ENGINES:
            ENGINES[backend] = load(backend, *args)
        return ENGINES[backend]

    monkeypatch.setattr(api, "load_engine", known)


def bench(what: str, backend: str, *args: str) -> Result:
    need_backend(backend)
    sizes = () if "--contexts" in args else ("--contexts", "96")
    methods = () if "--methods" in args else ("--methods", f"none,{CODED}")
    return kvc_run("bench", what, "--backend", backend, "--repeat", "2", *sizes, *methods, *args)


def rows_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return {row["label"]: row for row in map(json.loads, result.stdout.splitlines())}


def engine(backend: str) -> Any:
    need_backend(backend)
    from kvc.demo import path

    return api.load_engine(backend, str(path()))


# What is measured


def check_rows(rows: dict[str, Any], backend: str) -> None:
    """What holds of every race on a machine without kernels."""
    assert {"dense", "none", RIVALS[backend], CODED} <= rows.keys()
    for label, row in rows.items():
        found = row["result"]
        if why := found.get("not_raced"):
            assert label in ("quanto 4 bits", "hqq 4 bits")
            assert "install" in why
            continue
        ours = label == CODED
        assert found["mode"] == ("reference" if ours else "library")
        assert ("no_kernel" in found) == ours
        assert 0 <= found["error"] < OFF
        assert found["bytes"] > 0
        assert found["smaller_than_dense"] == rows["dense"]["result"]["bytes"] / found["bytes"]
        assert found["faster_than_dense"] > 0
        assert found["smaller_than_quantized"] > 0
        assert row["commit"] == "abc"
        assert row["versions"]["python"]
        assert row["device"]
        assert (row["layers"], row["heads"], row["kv_heads"], row["head_dim"]) == (8, 4, 2, 64)
    assert rows["dense"]["result"]["faster_than_dense"] == 1
    assert rows[CODED]["result"]["bytes"] < rows["none"]["result"]["bytes"] / 2
    assert rows[CODED]["settings"] == {"gear.group_size": "16", "gear.buffer": "16"}


@both
def test_attention(backend: str) -> None:
    rows = rows_of(bench("attention", backend, "--json", "--batch", "2"))
    check_rows(rows, backend)
    for label in ("dense", "none", CODED):
        found = rows[label]["result"]
        low, high = found["ms_spread"]
        assert low <= found["ms"] <= high
        assert found["ms_runs"] == 2
    assert rows["none"]["result"]["loss"] < OFF
    assert 0.01 < rows[RIVALS[backend]]["result"]["loss"] < rows[CODED]["result"]["loss"] < 2
    assert (
        rows["dense"]["result"]["bytes"]
        >= rows["dense"]["result"]["dense_bytes"]
        == (
            2 * 2 * 2 * 96 * 64 * 4  # K and V, rows, heads, tokens, channels, float32
        )
    )


@both
def test_generate(backend: str) -> None:
    rows = rows_of(bench("generate", backend, "--json"))
    check_rows(rows, backend)
    for row in rows.values():
        if "not_raced" not in row["result"]:
            assert row["result"]["new"] == generate.NEW
            assert row["result"]["slowest_step_ms"] >= row["result"]["ms"] > 0
            assert row["result"]["prefill_ms"] > 0
    # the same tokens were told: a cache that loses nothing foresees the same one
    assert abs(rows["none"]["result"]["loss"]) < LOGITS["exact"]
    assert rows[CODED]["result"]["loss"] > LOGITS["exact"]


@both
def test_encode(backend: str) -> None:
    rows = rows_of(bench("encode", backend, "--json"))
    check_rows(rows, backend)
    found = rows[CODED]["result"]
    assert found["block_tokens"] == 16
    assert found["share_of_prefill"] == found["ms"] / found["prefill_ms"]
    assert found["block_ms"] >= found["step_ms"] > 0
    assert found["dense_bytes"] == 8 * 2 * 2 * 64 * 4 * (96 + 1 + 16)


@both
@pytest.mark.parametrize("method", ["h2o heavy=8 recent=8", "tova heavy=8"])
def test_encode_of_what_evicts_reads_between_the_tokens(backend: str, method: str) -> None:
    found = rows_of(bench("encode", backend, "--json", "--methods", method))[method]["result"]
    assert "not_raced" not in found
    assert 0 <= found["error"] < OFF
    assert found["loss"] > 0.1  # most of the tokens are gone


def test_memory_on_mlx() -> None:
    few = ("--prefill", "stream", "--contexts", "160", "--repeat", "1")
    rows = rows_of(bench("memory", "mlx", "--json", *few))
    check_rows(rows, "mlx")
    for row in rows.values():
        found = row["result"]
        assert found["peak_bytes"] > found["bytes"]
        assert found["over_cache"] == found["peak_bytes"] / found["bytes"]
    assert rows[CODED]["result"]["peak_bytes"] < 2 * rows["none"]["result"]["peak_bytes"]


@pytest.mark.slow
def test_memory_on_a_cpu_is_that_of_a_process() -> None:
    need_backend("cpu")
    from kvc.demo import path

    task = memory.Task("cpu", str(path()), None, "", "", CODED, "stream", 1, 256)
    found = memory.measure(task)
    assert found["peak_bytes"] > found["bytes"]
    assert found["mode"] == "reference"
    with pytest.raises(NotRaced, match=r"quanto|optimum"):
        memory.measure(memory.Task("cpu", str(path()), None, "", "quanto 4 bits", "", "", 1, 64))
    with pytest.raises(NotRaced, match=r"its process failed: .*nowhere"):
        memory.measure(memory.Task("cpu", "/nowhere", None, "", "dense", "", "", 1, 64))


@both
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_answers_as_the_definitions_in_float64(backend: str, name: str) -> None:
    place = Bench(engine(backend))
    small = " buffer=16 window=16 sink=4" if name == "gear2" else ""
    choice = read_choice(name + small)
    arm = attention.ours(place, choice, 2, 200)
    arm.run()  # answers stay the same when they are asked for again
    found = arm.result([1.0, 2.0])
    assert 0 <= found["error"] < OFF
    assert found["ms"] == 1500


def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    place, attend = Bench(engine("cpu")), KVStore.attend
    choice = read_choice(CODED)
    assert attention.ours(place, choice, 1, 64).found["error"] < OFF
    monkeypatch.setattr(KVStore, "attend", lambda *args: attend(*args) * 1.01)
    assert attention.ours(place, choice, 1, 64).found["error"] == pytest.approx(0.01, rel=0.1)


def test_float64_is_attention() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, n, 8)) for h, n in ((4, 1), (2, 5), (2, 5)))
    found = exact(q, k, v, 0.3)
    for head in range(4):
        p = np.exp(k[0, head // 2] @ q[0, head, 0] * 0.3)
        assert found[0, head, 0] == pytest.approx(p / p.sum() @ v[0, head // 2])
    assert error(found * 1.5, found) == pytest.approx(0.5)


def test_quantizers_that_are_installed_are_raced() -> None:
    need("optimum.quanto")
    need("hqq")
    rows = rows_of(bench("attention", "cpu", "--json"))
    for name in ("quanto 4 bits", "hqq 4 bits"):
        found = rows[name]["result"]
        assert found["mode"] == "library"
        assert 0.01 < found["loss"] < 0.5
        assert found["bytes"] < found["dense_bytes"] / 4


@both
def test_a_token_that_ends_texts_does_not_end_a_race(backend: str) -> None:
    place = Bench(engine(backend))
    arm = generate.Arm(place, "dense", None, "", (1, 20, 6))
    end = place.engine.tokenizer.eos_token_id
    arm.forced[0] = [5, end, 7, end, 9, 11]
    assert len(arm.run()) == 6
    assert arm.log_probs.shape == (place.shape.vocab_size,)
    assert np.exp(arm.log_probs).sum() == pytest.approx(1, abs=1e-5)


def test_without_a_dense_cache_there_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Bench(engine("cpu"))
    make = place.library.make_cache

    def scarce(model: Any, rival: str) -> Any:
        if rival == "dense":
            raise RuntimeError("out of memory")
        return make(model, rival)

    monkeypatch.setattr(place.library, "make_cache", scarce)
    result = bench("generate", "cpu", "--json", "--methods", "none", "--repeat", "1")
    rows = rows_of(result)
    assert rows["dense"]["result"] == {"not_raced": "RuntimeError: out of memory"}
    found = rows["none"]["result"]
    assert "loss" not in found
    assert found["faster_than_quantized"] > 0
    assert "faster_than_dense" not in found
    assert table([rows["none"]]).splitlines()[-1].endswith("  -")


def test_one_row_on_mlx() -> None:
    rows = rows_of(bench("generate", "mlx", "--json", "--batch", "2"))
    assert all("one row" in row["result"]["not_raced"] for row in rows.values())


# The mode


def test_fused_or_reference_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    place, method = Bench(engine("cpu")), parse("kivi")
    modes = []

    def trial() -> str:
        modes.append(dispatch._mode)
        if len(modes) == 1:
            raise KernelUnavailable("encode: no GPU; mode auto takes the definition")
        return "done"

    how, found = place.how(method, trial)
    assert (modes, found) == (["fused", "reference"], "done")
    assert how.fields == {"mode": "reference", "no_kernel": "encode: no GPU"}
    how, _ = place.how(method, trial)
    assert (how.fields, modes[-1]) == ({"mode": "fused"}, "fused")
    how, _ = Bench(place.engine, "reference").how(method, trial)
    assert how.fields == {"mode": "reference", "no_kernel": "asked for"}
    assert place.how(parse("none"), trial)[0].fields == {"mode": "library"}
    modes.clear()
    with pytest.raises(NotRaced, match=r"^encode: no GPU$"):
        Bench(place.engine, "fused").how(method, trial)
    assert modes == ["fused"]


def test_kernels_that_were_asked_for_and_are_not_there() -> None:
    result = bench("attention", "cpu", "--mode", "fused")
    assert result.exit_code == 0, result.output
    assert f"not raced: '{CODED}'" in result.stdout or f"not raced: {CODED}" in result.stdout
    rows = rows_of(bench("attention", "cpu", "--mode", "fused", "--json"))
    assert "expected a kernel" in rows[CODED]["result"]["not_raced"]
    assert rows["none"]["result"]["mode"] == "library"


# Rows


def test_rounds_begin_with_another_one_each_time() -> None:
    said: list[str] = []
    runs = {name: (lambda name=name: said.append(name)) for name in "abc"}
    checks: list[None] = []
    in_turns(runs, 4, lambda: checks.append(None))
    assert "".join(said) == "abc" + "bca" + "cab" + "abc"
    assert len(checks) == 12
    assert Times.of([3.0, 1.0, 2.0, 4.0]) == Times(2.5, 1.25, 3.75, 4)
    assert Times.of([0.002]).fields("ms") == {"ms": 2, "ms_spread": [2, 2], "ms_runs": 1}


def test_ratios_are_to_the_best_quantized_one() -> None:
    found: dict[str, Any] = {
        "dense": {"ms": 8, "bytes": 100},
        "a": {"ms": 4, "bytes": 20},
        "b": {"ms": 6, "bytes": 10},
        "c": {"not_raced": "no"},
        "ours": {"ms": 2, "bytes": 5},
    }
    compare("attention", found, ["dense", "a", "b", "c"])
    assert found["ours"] == {
        "ms": 2, "bytes": 5, "faster_than_dense": 4, "smaller_than_dense": 20,
        "faster_than_quantized": 2, "smaller_than_quantized": 2,
    }  # fmt: skip
    assert found["c"] == {"not_raced": "no"}
    compare("attention", alone := {"ours": {"ms": 2, "bytes": 5}}, ["dense", "a"])
    assert alone["ours"] == {"ms": 2, "bytes": 5}


@both
def test_table(backend: str) -> None:
    shown = bench("attention", backend).stdout
    rows = rows_of(bench("attention", backend, "--json"))
    lines = shown.splitlines()
    assert lines[0].startswith("attention, bundled on ")
    assert "batch 1, 96 tokens" in lines[0]
    assert lines[1].split()[:2] == ["mode", "ms"]
    assert lines[2].startswith("dense ")
    assert note("attention") in shown
    text = table(list(rows.values()))
    for row in rows.values():
        if "not_raced" in row["result"]:
            assert f"not raced: {row['label']}: " in text
        else:
            assert f"{row['result']['faster_than_dense']:.2f}x" in text
            assert f"{row['result']['smaller_than_quantized']:.2f}x" in text


def test_rows_are_kept_and_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    args = ("--out", str(out), "--quiet", "--json")
    first = bench("attention", "cpu", *args)
    text = out.read_text()
    assert [json.loads(line) for line in text.splitlines()] == [*rows_of(first).values()]
    whole = Race._point
    calls: list[Any] = []

    def counted(self: Race, point: Point, *rest: Any) -> Any:
        calls.append(point)
        return whole(self, point, *rest)

    monkeypatch.setattr(Race, "_point", counted)
    assert bench("attention", "cpu", *args).stdout == first.stdout
    assert (calls, out.read_text()) == ([], text)
    out.write_text(text + '{"half a row')
    both_sizes = bench("attention", "cpu", *args, "--contexts", "96,64")
    assert calls == [Point(1, 64)]
    assert len(both_sizes.stdout.splitlines()) == 2 * len(text.splitlines())
    assert len(out.read_text().splitlines()) == 2 * len(text.splitlines())
    more = rows_of(bench("attention", "cpu", *args, "--methods", f"none,{CODED},token bits=8"))
    assert calls == [Point(1, 64), Point(1, 96)]  # ratios are of one run
    assert more["none"]["result"] != rows_of(first)["none"]["result"]


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    whole, n = Race._point, 0

    def cut(self: Race, *args: Any) -> Any:
        nonlocal n
        n += 1
        if n == 2:
            signal.raise_signal(signal.SIGINT)
        return whole(self, *args)

    monkeypatch.setattr(Race, "_point", cut)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = bench("attention", "cpu", "--contexts", "64,96", "--json", "--out", str(out))
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130, result.output
    assert result.stderr == f"kvc: interrupted; the same command goes on from {out}\n"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["context"] for row in rows} == {64}
    assert [json.loads(line) for line in result.stdout.splitlines()] == rows


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--methods", "geer"), ["geer", "gear"]),
        (("--methods", "gear bits=3"), ["bits", "3"]),
        (("--methods", "gear,gear"), ["gear", "twice"]),
        (("--contexts", "long"), ["--contexts", "long"]),
        (("--contexts", "0"), ["--contexts", "0"]),
        (("--contexts", "8"), ["at least 16", "8"]),
        (("--batch", "-1"), ["--batch", "-1"]),
        (("--prefill", "stream"), ["--prefill", "attention"]),
        (("--out", "missing/rows.jsonl"), ["missing", "cannot write"]),
        (("--out", "rows.txt"), ["rows.txt", "expected rows"]),
    ],
)
def test_errors_are_one_line_and_come_first(
    args: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("a shopping list\n")
    monkeypatch.setattr(api, "load_engine", no_engine)
    line = error_line(kvc_run("bench", "attention", *args))
    assert all(word in line for word in words), line


def test_prompts_that_the_model_has_no_room_for() -> None:
    line = error_line(bench("generate", "cpu", "--contexts", "4k"))
    assert "4064" in line
    assert "4096" in line


def test_a_method_that_does_not_fit_is_left_out() -> None:
    odd = "gear group_size=48 buffer=48"
    rows = rows_of(bench("attention", "cpu", "--json", "--methods", f"none,{odd}"))
    assert "group" in rows[odd]["result"]["not_raced"]
    assert rows["none"]["result"]["ms"] > 0


def test_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(attention, "ours", fails)
    rows = rows_of(bench("attention", "cpu", "--json"))
    assert rows["none"]["result"] == {"not_raced": "RuntimeError: CUDA out of memory. Tried"}


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    if (provenance.ROOT / ".git").exists():
        found = provenance.commit()
        assert found is not None
        assert len(found.removesuffix("+")) == 12
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("KVC_COMMIT", "told")
    assert provenance.commit() == "told"
    assert provenance.versions(("pytest", "no-such-package")).keys() == {"python", "pytest"}
