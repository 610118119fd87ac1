"""Learned parts beside the bundled model are found; kernels serve the map of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc import demo
from kvc.backends.base import FULL, ModelShape
from kvc.errors import ArtifactError, ConfigError
from kvc.files import write_kernels, write_map
from kvc.methods import KVSharer, Less, parse
from kvc.ops.evict import Kernels
from tests.oracles.less_features import random_weights
from tests.run_cli import PROMPT, both, copied_model, generate_json, kvc_run, need_backend

SHAPE = ModelShape("llama", 8, 4, 2, 64, 2048, 4096, 4, (FULL,) * 8)  # of the bundled model
OTHER = ModelShape("llama", 8, 4, 2, 64, 2049, 4096, 4, (FULL,) * 8)
PLAIN = list(range(8))
CHAINED = [0, 1, 2, 3, 4, 5, 3, 6]


def kernels(folder: Path, name: str, shape: ModelShape = SHAPE, **config: Any) -> str:
    """A file of small random kernels."""
    sizes = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
    maps = random_weights(*sizes, hidden=8, rank=4, seed=0, s1=0.05)
    fields = {name: getattr(maps, name).astype(np.float32) for name in Kernels._fields}
    path = folder / name
    layers = {layer: Kernels(**fields) for layer in range(shape.n_layers)}
    write_kernels(path, layers, shape.fingerprint, config)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is taken for the folder of the bundled model, empty."""
    monkeypatch.setattr(demo, "path", lambda: tmp_path)
    return tmp_path


def less_files(folder: Path) -> None:
    for policy in ("h2o", "sink"):
        for percent, half in ((5, 102), (10, 205)):
            name = f"less-{policy}-{percent}.safetensors"
            kernels(folder, name, policy=policy, heavy=half, recent=half)
    kernels(folder, "less-tova-1.safetensors", OTHER, policy="tova", heavy=409, recent=0)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "less-h2o-5"),
        ({"heavy": "5%", "recent": "5%"}, "less-h2o-10"),
        ({"heavy": 1}, "less-h2o-5"),
        ({"heavy": 4000}, "less-h2o-10"),
        ({"heavy": 144, "recent": 144}, "less-h2o-5"),  # 1.41 times 204; 410 is 1.42 times it
        ({"heavy": 145, "recent": 145}, "less-h2o-10"),
        ({"policy": "sink", "heavy": 4, "recent": 200}, "less-sink-5"),
        ({"policy": "sink", "heavy": 4, "recent": 0.1}, "less-sink-10"),
    ],
)
def test_kernels_of_the_policy_with_the_nearest_budget(
    folder: Path, settings: dict[str, Any], name: str
) -> None:
    less_files(folder)
    memory = parse("less", settings).check(SHAPE).memory
    assert memory is not None
    assert memory.kernels == str(folder / f"{name}.safetensors")
    assert memory.check(SHAPE) == memory  # found once
    assert set(memory.maps(range(8))) == set(range(8))


def test_of_two_as_near_the_smaller(folder: Path) -> None:
    kernels(folder, "less-a.safetensors", policy="h2o", heavy=200, recent=200)
    kernels(folder, "less-b.safetensors", policy="h2o", heavy=50, recent=50)
    found = Less(heavy=100, recent=100, kernels=None).check(SHAPE).kernels
    assert found == str(folder / "less-b.safetensors")


def test_no_kernels_for_a_model_or_a_policy(folder: Path) -> None:
    less_files(folder)
    with pytest.raises(ConfigError, match=r"2049v, policy h2o, found none; make them with kvc tra"):
        parse("less").check(OTHER)
    with pytest.raises(ConfigError, match="policy tova, found none"):
        parse("less", {"policy": "tova", "heavy": 409, "recent": 0}).check(SHAPE)
    bare = parse("less", {"kernels": ""}).check(SHAPE)
    assert bare == parse("h2o").check(SHAPE)


@pytest.mark.parametrize(
    ("share", "name"),
    [(0.25, "a"), ("25%", "a"), (0.9, "a"), ("12.5%", "b"), (0.01, "b"), (0.1875, "b")],
)
def test_map_with_the_nearest_share(folder: Path, share: Any, name: str) -> None:
    texts = {"a": "6:3,7:6", "b": "7:3"}
    write_map(folder / "kvsharer-a.json", CHAINED, SHAPE.fingerprint, {"share": 0.25})
    write_map(folder / "kvsharer-b.json", [*PLAIN[:7], 3], SHAPE.fingerprint, {"share": 0.125})
    write_map(folder / "kvsharer-c.json", [0] * 8, OTHER.fingerprint, {"share": 0.3})
    layout = parse("kvsharer", {"share": share}).check(SHAPE).layout
    assert isinstance(layout, KVSharer)
    assert layout.map == texts[name]
    assert layout.check(SHAPE) == layout


def test_no_map_for_a_model(folder: Path) -> None:
    write_map(folder / "kvsharer-25.json", CHAINED, SHAPE.fingerprint, {"share": 0.25})
    with pytest.raises(ConfigError, match=r"2049v, found none; make one with kvc search kvsharer"):
        KVSharer().check(OTHER)


def test_damaged_bundled_files_say_so(folder: Path) -> None:
    (folder / "kvsharer-25.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"kvsharer-25\.json: this is no kvsharer-map file"):
        KVSharer().check(SHAPE)


# Kernels and maps


def check(folder: Path, text: str, trained: list[int] | None, method: str = "") -> Any:
    config = {} if trained is None else {"map": trained}
    settings = {"less.kernels": kernels(folder, "k.safetensors", **config)}
    if text:
        settings["kvsharer.map"] = text
    return parse(method or ("kvsharer+less" if text else "less"), settings).check(SHAPE)


@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("", None),
        ("", PLAIN),
        ("0:0", None),
        ("0:0", PLAIN),
        ("6:3,7:6", CHAINED),
        ("6:3,7:3", CHAINED),  # a chain leads to the same owner
        ("7:3", [*PLAIN[:7], 3]),
    ],
)
def test_kernels_under_their_map(folder: Path, text: str, trained: list[int] | None) -> None:
    assert check(folder, text, trained).memory.kernels == str(folder / "k.safetensors")


@pytest.mark.parametrize(
    ("text", "trained", "says"),
    [
        ("7:3", None, "sharing map, 7:3, got ones trained under none"),
        ("7:3", PLAIN, "sharing map, 7:3, got ones trained under none"),
        ("", CHAINED, "sharing map, none, got ones trained under 6:3,7:3"),
        ("6:3", CHAINED, "sharing map, 6:3, got ones trained under 6:3,7:3"),
        ("6:2,7:2", CHAINED, "sharing map, 6:2,7:2, got ones trained under 6:3,7:3"),
    ],
)
def test_kernels_under_another_map(
    folder: Path, text: str, trained: list[int] | None, says: str
) -> None:
    with pytest.raises(ArtifactError, match=says) as info:
        check(folder, text, trained)
    assert "\n" not in str(info.value)


def test_kernels_of_another_policy_are_taken(folder: Path) -> None:
    path = kernels(folder, "k.safetensors", policy="h2o", heavy=4, recent=4)
    settings = {"kernels": path, "policy": "sink", "heavy": 2, "recent": 9}
    assert parse("less", settings).check(SHAPE).memory is not None


def test_bundled_kernels_under_a_map(folder: Path) -> None:
    both_parts = parse("kvsharer+less", {"kvsharer.map": "7:3"})
    kernels(folder, "less-a.safetensors", policy="h2o", heavy=102, recent=102)
    with pytest.raises(ConfigError, match="policy h2o and the map 7:3, found none"):
        both_parts.check(SHAPE)
    under = [*PLAIN[:7], 3]
    kernels(folder, "less-b.safetensors", policy="h2o", heavy=9, recent=9, map=under)
    for method, name in ((both_parts, "b"), (parse("less"), "a")):
        memory = method.check(SHAPE).memory
        assert memory is not None
        assert memory.kernels == str(folder / f"less-{name}.safetensors")


# The command


@both
def test_every_method_works_out_of_the_box(backend: str, folder: Path) -> None:
    need_backend(backend)
    model = str(demo_copy(folder))
    kernels(folder, "less-h2o-5.safetensors", policy="h2o", heavy=102, recent=102)
    write_map(folder / "kvsharer-25.json", CHAINED, SHAPE.fingerprint, {"share": 0.25})
    settings = ("--set", "less.heavy=8", "--set", "less.recent=8")
    less = generate_json(backend, PROMPT, "--method", "less", *settings)
    assert less["parts"]["state"] > 0
    shared = generate_json(backend, PROMPT, "--method", "kvsharer")
    assert [i for i, size in enumerate(shared["layers"]) if not size] == [6, 7]
    result = kvc_run("info", "--model", model, "--backend", backend)
    assert result.exit_code == 0, result.output
    assert "with less-h2o-5.safetensors" in result.stdout
    assert "1.33  with the map 6:3,7:6" in result.stdout


def demo_copy(folder: Path) -> Path:
    """The bundled model in another folder, without its learned parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "path", lambda: Path(demo.__file__).parent)
        copied_model(folder)
    for path in folder.glob("kvsharer-*.json"):
        path.unlink()
    return folder


def test_named_kernels_bring_the_policy_and_budget_of_their_training(tmp_path: Path) -> None:
    path = kernels(tmp_path, "some.safetensors", policy="sink", heavy=3, recent=9)
    less = parse("less", {"kernels": path}).memory
    assert less is not None
    assert (less.policy, less.heavy, less.recent) == ("sink", 3, 9)
    for setting in ({"recent": 5}, {"policy": "h2o"}):  # then all three are the user's business
        given = parse("less", {"kernels": path, **setting}).memory
        assert given == Less(kernels=path, **setting)
    bare = kernels(tmp_path, "bare.safetensors")
    assert parse("less", {"kernels": bare}).memory == Less(kernels=bare)
    with pytest.raises(ArtifactError, match="there is no such file"):
        parse("less", {"kernels": str(tmp_path / "none.safetensors")})


@both
@pytest.mark.parametrize("method", ["less", "kvsharer", "kvsharer+less"])
def test_the_bundled_model_has_what_its_methods_learn(backend: str, method: str) -> None:
    need_backend(backend)
    row = generate_json(backend, "--method", method, PROMPT)
    assert len(row["token_ids"]) == 8
    if "less" in method:
        assert row["parts"]["state"] > 0
