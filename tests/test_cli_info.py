"""`kvc info`: this machine's backends, its kernels, and what a model's cache costs."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvc.cuda_kernels
import kvc.metal_kernels
from kvc import __version__, api, demo
from kvc.cli.info import op_table, why_definition
from kvc.files import facts, read_artifact, write_kernels, write_map
from kvc.ops.evict import Kernels
from tests.oracles.less_features import random_weights
from tests.run_cli import both, error_line, kvc_run, need_backend

HERE = {"available": True, "device": "Metal"}


def test_backends_and_ops() -> None:
    result = kvc_run("info")
    assert result.exit_code == 0, result.output
    row = json.loads(kvc_run("info", "--json").stdout)
    assert set(row["backends"]) == {"mlx", "cuda", "cpu"}
    assert {"encode", "attend_dense"} < set(row["ops"])
    assert all(name in result.stdout for name in [*row["backends"], *row["ops"], *row["methods"]])
    for cells in row["ops"].values():
        assert set(cells) == set(row["backends"])
        assert all((cell["why"] is None) == (cell["runs"] == "kernel") for cell in cells.values())
        assert {cell["why"] for cell in cells.values() if cell["why"]} or "kernel" in result.stdout


def test_every_definition_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvc.metal_kernels, "FUSED", {})
    monkeypatch.setattr(kvc.cuda_kernels, "FUSED", {})
    rows = op_table({"mlx": HERE, "cpu": HERE})
    assert rows["encode"] == {
        "mlx": "kvc.metal_kernels has no kernel for encode",
        "cpu": "kvc.cuda_kernels has no kernel for encode",
    }
    assert "mlx: kvc.metal_kernels has no kernel for any op" in kvc_run("info").stdout


def test_kernels_need_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (kvc.metal_kernels, kvc.cuda_kernels):
        monkeypatch.setattr(package, "FUSED", {"encode": ModuleType("encode")})
    away = {"available": False, "device": "no GPU"}
    assert why_definition("encode", "mlx", HERE) is None
    assert why_definition("encode", "cuda", HERE) is None
    assert "Metal" in (why_definition("encode", "mlx", {**HERE, "device": "cpu"}) or "")
    assert "CUDA" in (why_definition("encode", "cuda", away) or "")
    assert "CUDA" in (why_definition("encode", "cpu", HERE) or "")
    monkeypatch.setitem(sys.modules, "kvc.cuda_kernels", None)
    assert "does not import" in (why_definition("encode", "cuda", HERE) or "")


@dataclass
class Cost:
    """A row as `cost_table` gives it."""

    method: str
    bytes_per_token: float
    fixed_bytes: int
    ratio: float | None
    note: str = ""


def test_model_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SimpleNamespace(
        fingerprint="llama-4l-8h-2kv-64d-100v",
        family="llama",
        n_heads=8,
        n_kv_heads=2,
        head_dim=64,
        context_length=512,
        dtype_bytes=2,
        layer_kinds=("full_attention",) * 3 + ("sliding_attention",),
    )
    rows = [
        Cost("none", 4096.0, 0, 1.0),
        Cost("gear", 768.5, 2048, 5.33),
        Cost("h2o", 0.0, 3 * 2**20, None),
        Cost("kvsharer", 0.0, 0, None, "needs a map"),
    ]
    monkeypatch.setattr(api, "load_engine", lambda *_: SimpleNamespace(name="mlx", shape=shape))
    monkeypatch.setattr(api, "cost_table", lambda s: rows if s is shape else [], raising=False)
    result = kvc_run("info", "--model", "some/model")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "model some/model",
        "id llama-4l-8h-2kv-64d-100v",
        "layers 4 (3 full attention, 1 sliding attention)",
        "heads 8, of keys and values 2",
        "context 512 tokens",
        "none 4096.0 - 1.00",
        "gear 768.5 2.0 KiB 5.33",
        "h2o 0.0 3.0 MiB -",
        "kvsharer needs a map",
    ):
        assert line in lines
    row = json.loads(kvc_run("info", "--model", "some/model", "--json").stdout)
    assert row["layers"] == {"full_attention": 3, "sliding_attention": 1}
    assert row["kv_heads"] == 2
    assert row["methods"][1] == {
        "method": "gear",
        "bytes_per_token": 768.5,
        "fixed_bytes": 2048,
        "ratio": 5.33,
        "note": "",
    }


@both
def test_bundled_model(backend: str) -> None:
    need_backend(backend)
    args = ("info", "--model", str(demo.path()), "--backend", backend, "--json")
    result = kvc_run(*args)
    assert result.exit_code == 0, result.output
    row: dict[str, Any] = json.loads(result.stdout)
    assert row["fingerprint"] == "llama-8l-4h-2kv-64d-2048v"
    assert (row["family"], row["context"]) == ("llama", 4096)
    assert row["layers"] == {"full_attention": 8}
    dense = 2 * 8 * 2 * 64 * row["dtype_bytes"]
    costs = {cost["method"]: cost for cost in row["methods"]}
    assert set(costs) == set(api.presets())
    assert costs["none"]["bytes_per_token"] == dense
    assert costs["none"]["ratio"] == 1
    for cost in costs.values():
        if cost["ratio"] is not None and not cost["fixed_bytes"]:
            assert cost["ratio"] == pytest.approx(dense / cost["bytes_per_token"])
    assert costs["gear"]["ratio"] > 1


def test_model_that_is_not_there(tmp_path: Any) -> None:
    need_backend("cpu")
    args = ("info", "--backend", "cpu")
    assert str(tmp_path) in error_line(kvc_run(*args, "--model", str(tmp_path)))
    assert "--model" in error_line(kvc_run(*args))


def shown(*args: str) -> list[str]:
    """The lines that `kvc info` prints, each with single blanks."""
    result = kvc_run("info", *args)
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_map_file(tmp_path: Path) -> None:
    path, config = str(tmp_path / "map.json"), {"share": 0.25, "order": "dissimilar"}
    write_map(path, [0, 1, 2, 3, 4, 5, 3, 6], "llama-8l", config, "ab" * 32, "as asked")
    lines = shown(path)
    for line in (
        f"artifact {path}",
        "kind kvsharer-map",
        "model llama-8l",
        "layers 8, of which 2 read another one's cache (25.0%)",
        "map 6 reads 3, 7 reads 3",
        "ratio 1.33",
        "note as asked",
        f"data SHA-256 {'ab' * 32}",
        f"written by kvc {__version__}",
        "made with",
        "share 0.25",
        "order dissimilar",
    ):
        assert line in lines
    row = json.loads(kvc_run("info", path, "--json").stdout)
    assert row == {"artifact": path, **json.loads(json.dumps(facts(read_artifact(path))))}
    write_map(path, [0, 1], "llama-2l", {})
    lines = shown(path)
    assert "map every layer reads its own" in lines
    assert "data not stated" in lines
    assert "made with" not in lines


def test_kernels_file(tmp_path: Path) -> None:
    path = str(tmp_path / "k.safetensors")
    maps = random_weights(4, 2, 16, hidden=8, rank=3, seed=0, s1=0.5)
    part = Kernels(**{name: x.astype(np.float16) for name, x in vars(maps).items()})
    config = {"policy": "h2o", "heavy": 102, "recent": 101, "map": [0, 0, 2, 1], "losses": [1, 2]}
    write_kernels(path, {0: part, 2: part}, "llama-4l", config)
    lines = shown(path)
    n = 2 * sum(x.size for x in part)
    for line in (
        "kind less-kernels",
        "layers 2: 0, 2",
        "rank 3",
        "hidden 8",
        f"parameters {n:,} in float16, {2 * n / 1024:.1f} KiB",
        "policy h2o",
        "budget 102 heavy and 101 recent tokens",
        "map trained under 1 reads 0, 3 reads 0",
        "losses [1, 2]",
    ):
        assert line in lines
    row = json.loads(kvc_run("info", path, "--json").stdout)
    assert (row["layers"], row["rank"], row["parameters"]) == ([0, 2], [3], n)
    assert row["config"] == config


def test_artifact_that_is_none(tmp_path: Path) -> None:
    assert "no such file" in error_line(kvc_run("info", str(tmp_path / "none.json")))
    weights = str(demo.path() / "model.safetensors")
    assert "no less-kernels file of kvc" in error_line(kvc_run("info", weights))
    assert "expected ARTIFACT or --model" in error_line(kvc_run("info", "a.json", "--model", "m"))
    assert "--backend" in error_line(kvc_run("info", "a.json", "--backend", "cpu"))
