"""`kvc train less`: kernels that learn, parts that merge, runs that go on, and its errors."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
from click.testing import Result

from kvc import demo
from kvc.api import load_engine
from kvc.calibrate.less.capture import capture
from kvc.calibrate.less.training import train_layers as run
from kvc.cli.train import less
from kvc.cli.workers import Apart
from kvc.errors import BackendError
from kvc.files import read_kernels, write_kernels
from kvc.methods import Method
from tests.conftest import need
from tests.run_cli import MODULES, both, error_line, generate_json, kvc_run, need_backend
from tests.search_text import TEXT

# So short that a layer takes a second: 12 sequences of 40 tokens, of which 10 are kept.
SHORT = (
    *("--length", "40", "--sequences", "12", "--budget", "10"),
    *("--hidden", "8", "--rank", "4", "--epochs", "4", "--rate", "0.01", "--dropout", "0.1"),
)
PATIENCE = 90  # seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where kernels go; the text lies in it."""
    (tmp_path / "text.txt").write_text(TEXT * 2, encoding="utf-8")
    return tmp_path


def args(folder: Path, *more: str, out: str = "less.safetensors") -> list[str]:
    places = ("--text", str(folder / "text.txt"), "--out", str(folder / out))
    backend = () if "--backend" in more else ("--backend", "cpu")
    layers = () if {"--layers", "--workers"} & {*more} else ("--layers", "0:2")
    return ["train", "less", *places, *SHORT, *backend, *layers, *more]


def train(folder: Path, *more: str, out: str = "less.safetensors") -> Result:
    need_backend("mlx" if "mlx" in more else "cpu")
    return kvc_run(*args(folder, *more, out=out))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@both
@pytest.mark.parametrize("policy", ["h2o", "sink", "tova"])
def test_kernels_learn(backend: str, policy: str, folder: Path) -> None:
    longer = ("--epochs", "12", "--rate", "0.003")
    result = train(folder, "--backend", backend, "--policy", policy, *longer)
    assert result.exit_code == 0, result.output
    assert names(folder) == ["less.safetensors", "text.txt"]
    file = read_kernels(folder / "less.safetensors")
    assert list(file.layers) == [0, 1]
    assert file.layers[0].a1.shape == (4, 64, 8)
    assert file.layers[0].a1.dtype == np.float16
    assert file.config["policy"] == policy
    assert file.config["heavy"] + file.config["recent"] == 10
    for found in file.config["errors"].values():
        assert 0 < found["less"] < found["bare" if policy == "sink" else "plus"]
        assert found["epoch"] > 0
    table = result.stderr.splitlines()
    assert table[0].split() == ["layer", "policy", "Baseline+", "LESS", "epoch"]
    assert [line.split()[0] for line in table[1:3]] == ["0", "1"]


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "bfloat16"), ("mlx", "float16")])
def test_models_in_half_precision(backend: str, dtype: str, folder: Path) -> None:
    result = train(folder, "--backend", backend, "--dtype", dtype, "--layers", "0:1")
    assert result.exit_code == 0, result.output
    config = read_kernels(folder / "less.safetensors").config
    assert config["dtype"] == "16 bits"
    assert 0 < config["errors"]["0"]["less"] < config["errors"]["0"]["bare"]


def test_both_backends_learn_the_same(folder: Path) -> None:
    for backend in MODULES:
        assert train(folder, "--backend", backend, out=f"{backend}.safetensors").exit_code == 0
    torch, mlx = (read_kernels(folder / f"{backend}.safetensors") for backend in MODULES)
    assert torch.calibration == mlx.calibration
    for layer, found in torch.config["errors"].items():
        other = mlx.config["errors"][layer]
        assert found["bare"] == pytest.approx(other["bare"], rel=1e-3)
        assert found["less"] == pytest.approx(other["less"], rel=0.02)


@both
def test_kernels_of_one_backend_serve_the_other(backend: str, folder: Path) -> None:
    assert train(folder, "--backend", backend, "--layers", "0:8").exit_code == 0
    settings = (f"less.kernels={folder / 'less.safetensors'}", "less.heavy=6", "less.recent=6")
    given = [word for setting in settings for word in ("--set", setting)]
    method = ("--method", "less", "--max-tokens", "24")
    got = [generate_json(b, *method, *given, "--raw", TEXT[:300])["token_ids"] for b in MODULES]
    assert got[0] == got[1]
    bare = ("--method", "h2o", "--max-tokens", "24", *given[2:])
    assert got[0] != generate_json("cpu", *bare, "--raw", TEXT[:300])["token_ids"]


def test_parts_merge_into_the_whole(folder: Path) -> None:
    assert train(folder, out="whole.safetensors").exit_code == 0
    for layers, name in (("0:1", "a"), ("1:2", "b")):
        assert train(folder, "--layers", layers, out=f"{name}.safetensors").exit_code == 0
    parts = [str(folder / f"{name}.safetensors") for name in "ab"]
    merged = kvc_run("train", "merge", *parts, "--out", str(folder / "merged.safetensors"))
    assert merged.exit_code == 0, merged.output
    whole, together = ((folder / f"{x}.safetensors").read_bytes() for x in ("whole", "merged"))
    assert whole == together
    again = kvc_run("train", "merge", parts[0], parts[0], "--out", str(folder / "c.safetensors"))
    assert "expected other layers than the files before it, got layer 0" in error_line(again)
    assert train(folder, "--seed", "1", "--layers", "1:2", out="d.safetensors").exit_code == 0
    other = [parts[0], str(folder / "d.safetensors")]
    line = error_line(kvc_run("train", "merge", *other, "--out", str(folder / "c.safetensors")))
    assert "trained like those of" in line
    assert "with seed 0, got 1" in line
    assert not (folder / "c.safetensors").exists()


@pytest.mark.slow
def test_workers_train_what_one_process_trains(folder: Path) -> None:
    assert train(folder, "--layers", "0:3", out="whole.safetensors").exit_code == 0
    result = train(folder, "--layers", "0:3", "--workers", "2", out="spread.safetensors")
    assert result.exit_code == 0, result.output
    assert (folder / "spread.safetensors").read_bytes() == (
        folder / "whole.safetensors"
    ).read_bytes()
    assert names(folder) == ["spread.safetensors", "text.txt", "whole.safetensors"]
    broken = train(folder, "--workers", "2", "--length", "4000", out="no.safetensors")
    assert "--workers: one of them failed: --text: expected 12 pieces of" in error_line(broken)


def test_a_sharing_layer_learns_against_its_owners_state(folder: Path) -> None:
    assert train(folder, "--map", "1:0").exit_code == 0
    file = read_kernels(folder / "less.safetensors")
    owner, sharer = file.layers[0], file.layers[1]
    for mine, its in zip(sharer[2:], owner[2:], strict=True):
        np.testing.assert_array_equal(mine, its)
    assert not np.array_equal(sharer.a1, owner.a1)
    assert file.config["map"] == [0, 0, *range(2, 8)]
    assert all(found["less"] < found["bare"] for found in file.config["errors"].values())
    line = error_line(train(folder, "--map", "5:0", "--layers", "5:6", out="x.safetensors"))
    assert "layer 5 reads the cache of layer 0; train both in one part" in line


def test_a_projection_of_no_known_name_weighs_all_outputs_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("torch")
    from kvc.backends.torch import projections

    monkeypatch.setattr(projections, "OUTPUTS", ())
    assert train(folder, "--layers", "0:1").exit_code == 0
    found = read_kernels(folder / "less.safetensors").config["errors"]["0"]
    assert 0 < found["less"] < found["bare"]


def test_output_projections_are_those_of_the_model(xp: ModuleType) -> None:
    if xp.name == "numpy":
        pytest.skip("NumPy runs no models")
    engine = load_engine("cpu" if xp.name == "torch" else "mlx", str(demo.path()), "float32")
    layers: Any = engine.model.model.layers  # type: ignore[attr-defined]
    for layer in (0, 5):
        weight = xp.to_numpy(layers[layer].self_attn.o_proj.weight).T
        got = engine.output_projection(layer)
        assert got is not None
        np.testing.assert_allclose(xp.to_numpy(got), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(folder: Path) -> None:
    need_backend("cpu")
    three = ("--layers", "0:3", "--epochs", "12")
    assert train(folder, *three, out="unbroken.safetensors").exit_code == 0
    first = folder / "less.safetensors.work" / "layer-0.safetensors"
    command = [sys.executable, "-m", "kvc", *args(folder, *three)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + PATIENCE
    while not first.exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "less.safetensors").exists()
    kept = first.stat().st_mtime_ns, first.read_bytes()
    trained: list[int] = []

    class Listener:
        def captured(self, row: int, n_rows: int) -> None: ...

        def trained(self, layer: int, epoch: Any) -> None:
            trained.append(layer)

    listen(folder, three, Listener())
    assert 0 not in trained
    assert {2} <= {*trained} <= {1, 2}
    assert kept[1] == read_bytes_of_layer(folder, 0, kept[1])
    unbroken, broken = (folder / f"{x}.safetensors" for x in ("unbroken", "less"))
    assert unbroken.read_bytes() == broken.read_bytes()
    assert names(folder) == ["less.safetensors", "text.txt", "unbroken.safetensors"]


def listen(folder: Path, more: Sequence[str], listener: Any) -> None:
    """Runs the command with something else in the place of its bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kvc.calibrate.less.training.train_layers",
            lambda engine, plan, out, _: run(engine, plan, out, listener),
        )
        assert train(folder, *more).exit_code == 0


def read_bytes_of_layer(folder: Path, layer: int, like: bytes) -> bytes:
    """One layer's part of the finished file, written as the part was."""
    whole = read_kernels(folder / "less.safetensors")
    path = folder / "again.safetensors"
    errors = {str(layer): whole.config["errors"][str(layer)]}
    config = {**whole.config, "errors": errors}
    write_kernels(path, {layer: whole.layers[layer]}, whole.model, config, whole.calibration)
    data = path.read_bytes()
    path.unlink()
    return data


def test_ctrl_c_keeps_what_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_backend("cpu")

    class Impatient:
        def captured(self, row: int, n_rows: int) -> None: ...

        def trained(self, layer: int, epoch: Any) -> None:
            if layer == 1:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kvc.calibrate.less.training.train_layers",
            lambda engine, plan, out, _: run(engine, plan, out, Impatient()),
        )
        result = train(folder)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        f"kvc: interrupted; the same command goes on from {folder / 'less.safetensors.work'}"
    ]
    assert (folder / "less.safetensors.work" / "layer-0.safetensors").exists()
    line = error_line(train(folder, "--epochs", "5"))
    assert "expected what this run has done, got that of one with epochs 4 in place of 5" in line
    assert train(folder).exit_code == 0
    assert names(folder) == ["less.safetensors", "text.txt"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--length", "4000"), "--text: expected 12 pieces of 4000 tokens, got 0 from"),
        (("--length", "5000"), "--length 5000: expected at most the model's context, 4096 tokens"),
        (("--budget", "0"), "--budget: expected one token or more, got 0 of 40 tokens"),
        (("--budget", "1%"), "--budget: expected one token or more, got 1% of 40 tokens"),
        (("--budget", "37"), "--budget: expected fewer tokens than a sequence has, got 39 of 40"),
        (("--budget", "many"), "--budget: expected a part of --length such as 25% or 0.25"),
        (("--layers", "8:9"), "--layers: expected some of 0:8 that keep all tokens, got '8:9'"),
        (("--layers", "first"), "--layers: expected START:STOP such as 0:8, got 'first'"),
        (("--text", "no such text.txt"), "--text no such text.txt: cannot read it: No such file"),
        (("--map", "9:1"), "kvsharer: the map names layer 9, the model has 8 layers"),
        (("--map", "1:0", "--workers", "2"), "--workers: expected one with --map"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_errors_are_one_line_and_leave_nothing(
    more: tuple[str, ...], says: str, folder: Path
) -> None:
    assert says in error_line(train(folder, *more))
    assert names(folder) == ["text.txt"]


def test_an_existing_file_stays(folder: Path) -> None:
    (folder / "less.safetensors").write_text("precious")
    line = error_line(train(folder))
    assert "there is one already; take another name, or --force" in line
    assert (folder / "less.safetensors").read_text() == "precious"
    assert "cannot write there" in error_line(train(folder, out="no/less.safetensors"))
    assert "ends in .safetensors" in error_line(train(folder, out="less.bin"))


def test_a_full_disk_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_backend("cpu")
    from kvc.calibrate.less import capture as module

    monkeypatch.setattr(module, "USABLE", 1e-12)
    line = error_line(train(folder))
    assert "GiB for the activations of one layer, got 0.0 GiB" in line
    assert "take fewer --sequences" in line


@pytest.mark.slow
def test_one_run_at_a_time_has_the_folder(folder: Path) -> None:
    need_backend("cpu")
    command = [sys.executable, "-m", "kvc", *args(folder, "--epochs", "500")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + PATIENCE
        while not [*folder.glob("less.safetensors.work/scratch-*/q-0.npy")]:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        line = error_line(train(folder, "--epochs", "500"))
        assert "less.safetensors.work: another run is at work there; wait for it" in line
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    # killed while it captured or learned; what it left is of no use and goes
    assert train(folder).exit_code == 2  # it is still that run's folder
    (folder / "less.safetensors.work" / "run.json").unlink()
    assert train(folder).exit_code == 0
    assert names(folder) == ["less.safetensors", "text.txt"]


def test_another_model_of_the_same_shape_is_told_apart(folder: Path) -> None:
    need_backend("cpu")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = folder / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    model.model.layers[0].self_attn.o_proj.weight.data *= 1.1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(demo.path()).save_pretrained(other)
    assert train(folder, "--layers", "0:1", out="a.safetensors").exit_code == 0
    theirs = ("--layers", "1:2", "--model", str(other))
    assert train(folder, *theirs, out="b.safetensors").exit_code == 0
    parts = [str(folder / f"{name}.safetensors") for name in "ab"]
    merged = kvc_run("train", "merge", *parts, "--out", str(folder / "c.safetensors"))
    assert "trained like those of" in error_line(merged)
    assert "with weights" in merged.stderr


def test_captured_caches_go_at_once(folder: Path) -> None:
    need("torch")
    from kvc.store.store import KVStore

    engine = load_engine("cpu", str(demo.path()), "float32")
    alive: list[weakref.ref[KVStore]] = []
    held = []
    made = engine.make_cache

    def make_cache(*given: Any, **more: Any) -> Any:
        cache = made(*given, **more)
        alive.append(weakref.ref(engine.store(cache)))
        return cache

    def on_row(row: int) -> None:
        stores = [store for ref in alive if (store := ref()) is not None]
        held.append(sum(store.nbytes for store in stores))

    engine.make_cache = make_cache  # type: ignore[method-assign]
    rows = np.arange(6 * 20, dtype=np.int32).reshape(6, 20)
    gc.disable()
    try:
        found = capture(engine, Method(), rows, [0, 3], folder, on_row)
    finally:
        gc.enable()
    assert held == [0] * 6
    assert found[3].query.q.shape[2] == 1
    assert {len(layer.q) for layer in found.values()} == {6}


def test_more_workers_than_gpus_take_turns(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    ctx = click.Context(less, info_name="less")
    ctx.params = {option.name: None for option in less.params}
    ctx.params |= {"texts": ("a.txt",), "policy": "h2o", "workers": 5}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    apart = Apart(ctx, (0, sys.maxsize), 5, 3)
    assert apart.ranges == [(0, 1), (1, 3), (3, 4), (4, 6), (6, 8)]
    assert apart.arguments == ["--text", "a.txt", "--policy", "h2o"]
    seen = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> None:
        seen.append((env["CUDA_VISIBLE_DEVICES"], command[command.index("--layers") + 1]))

    monkeypatch.setattr(subprocess, "Popen", start)
    for i in range(5):
        apart._start(i, folder / "part.safetensors")[1].close()
    assert seen == [("4", "0:1"), ("6", "1:3"), ("7", "3:4"), ("4", "4:6"), ("6", "6:8")]
    assert [a for a, _ in Apart(ctx, (2, 4), 5, 1).ranges] == [2, 3]
    ctx.params["model"] = str(folder)
    with pytest.raises(BackendError, match="cannot load a model from"):
        Apart(ctx, (0, 8), 2, 1)
