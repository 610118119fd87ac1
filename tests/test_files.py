"""Files made for one model: what is written comes back, and what is damaged is one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvc.errors import ArtifactError
from kvc.files import check_model, read_kernels, read_map, write_kernels, write_map, write_whole
from kvc.ops.evict import Kernels

MODEL = "llama-8l-4h-2kv-64d-2048v"
HASH = "ab" * 32
SIZES = {"Hq": 4, "H": 2, "D": 8, "M": 16, "R": 3}


def kernels(dtype: str = "float32") -> Kernels:
    rng = np.random.default_rng(0)
    hq, h, d, m, r = SIZES.values()
    shapes = [(hq, d, m), (hq, m, r), (h, d, m), (h, m, r), (h, r, r), (h, r), (h, r)]
    return Kernels(*(rng.standard_normal(shape).astype(dtype) for shape in shapes))


def tensors(layers: tuple[int, ...] = (0, 3)) -> dict[str, Any]:
    names = ("A1", "A2", "B1", "B2", "B3", "s1", "s2")
    return {f"layers.{i}.{n}": x for i in layers for n, x in zip(names, kernels(), strict=True)}


def header(**changes: Any) -> dict[str, str]:
    full = {"format": "1", "kind": "less-kernels", "model": MODEL, "config": "{}"}
    merged = {**full, "calibration": HASH, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def one_line(info: pytest.ExceptionInfo[ArtifactError], path: Path) -> bool:
    return "\n" not in str(info.value) and str(info.value).startswith(f"{path}: ")


def test_map_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_map(path, [0, 1, 1, 0], MODEL, {"share": 0.5}, HASH, "found in 3 tries")
    got = read_map(path)
    assert got.owners == (0, 1, 1, 0)
    assert got[1:] == (MODEL, {"share": 0.5}, HASH, "found in 3 tries")
    assert json.loads(path.read_text()) == {
        "format": 1,
        "kind": "kvsharer-map",
        "model": MODEL,
        "map": [0, 1, 1, 0],
        "config": {"share": 0.5},
        "calibration": HASH,
        "note": "found in 3 tries",
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_kernels_come_back(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    written = {3: kernels(dtype), 10: kernels(dtype), 0: kernels(dtype)}
    write_kernels(path, written, MODEL, {"rank": 3}, HASH)
    got = read_kernels(path)
    assert list(got.layers) == [0, 3, 10]
    assert got[1:] == (MODEL, {"rank": 3}, HASH)
    for layer, expected in written.items():
        for x, y in zip(got.layers[layer], expected, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_transposed_kernels_come_back_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    one = kernels()
    turned = np.ascontiguousarray(one.a1.swapaxes(1, 2)).swapaxes(1, 2)
    write_kernels(path, {0: one._replace(a1=turned)}, MODEL, {})
    np.testing.assert_array_equal(read_kernels(path).layers[0].a1, one.a1)


def test_written_names_are_the_formats(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_kernels(ours, {0: kernels(), 3: kernels()}, MODEL, {}, HASH)
    save_file(tensors(), theirs, header())
    for a, b in zip(read_kernels(ours).layers[3], read_kernels(theirs).layers[3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours.stat().st_size == theirs.stat().st_size


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": None}, "it has no format"),
        ({"model": None}, "it has no model"),
        ({"model": None, "calibration": None}, "it has no model, calibration"),
        ({"format": 2}, "format 1 or older, got 2; upgrade kvc"),
        ({"format": 7, "kind": "other", "map": {}}, "got 7; upgrade kvc"),
        ({"format": "one"}, "expected format 1, got 'one'"),
        ({"kind": "less-kernels"}, "expected a kvsharer-map, got a less-kernels"),
        ({"map": {"1": 0}}, "map: expected a list"),
        ({"map": [0, 2, 1]}, "the owner of layer 1 to be one of 0 to 1, got 2"),
        ({"map": [0, -1]}, "owner of layer 1"),
        ({"map": [0, True]}, "got True"),
        ({"map": [0, 0.0]}, "got 0.0"),
        ({"map": [0, "0"]}, "got '0'"),
        ({"model": 7}, "model: expected a str"),
    ],
    ids=str,
)
def test_wrong_map_says_what(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_map(path, [0, 0, 1], MODEL, {}, HASH)
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: x for key, x in data.items() if x is not None}))
    with pytest.raises(ArtifactError) as info:
        read_map(path)
    assert says in str(info.value)
    assert one_line(info, path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "there is no such file"),
        (b"", "as JSON"),
        (b'{"format": 1, "kin', "as JSON"),
        (b"\xff\xfe", "as JSON"),
        (b"[0, 0]", "got list"),
        (b"null", "got NoneType"),
        (b'{"map": [0, 0]}', "no format, kind, model, config, calibration"),
    ],
    ids=str,
)
def test_damaged_map_says_so(data: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ArtifactError) as info:
        read_map(path)
    assert says in str(info.value)
    assert one_line(info, path)


@pytest.mark.parametrize("read", [read_map, read_kernels])
def test_folder_is_no_file(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read") as info:
        read(tmp_path)
    assert one_line(info, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "2"}, "format 1 or older, got 2; upgrade kvc"),
        ({"kind": "kvsharer-map"}, "expected a less-kernels, got a kvsharer-map"),
        ({"model": None}, "it has no model"),
        ({"config": "{"}, "config as JSON"),
        ({"config": "[]"}, "config: expected a JSON object"),
    ],
    ids=str,
)
def test_wrong_header_says_what(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_file(tensors(), path, header(**change))
    with pytest.raises(ArtifactError) as info:
        read_kernels(path)
    assert says in str(info.value)
    assert one_line(info, path)


def test_a_models_weights_are_no_kernels(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    with pytest.raises(ArtifactError, match="it has no format, kind, model, config, calibration"):
        read_kernels(path)


@pytest.mark.parametrize("name", ["layers.0.A1", "layers.3.B3", "layers.3.s2"])
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_file({key: x for key, x in tensors().items() if key != name}, path, header())
    with pytest.raises(ArtifactError, match=f"expected a tensor {name}, got none") as info:
        read_kernels(path)
    assert one_line(info, path)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_file({"weight": np.ones(3, np.float32)}, path, header())
    with pytest.raises(ArtifactError, match=r"expected a tensor layers\.0\.A1"):
        read_kernels(path)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.A2", (4, 15, 3), [4, 16, 3]),
        ("layers.3.B1", (2, 9, 16), [2, 8, 16]),
        ("layers.3.B2", (3, 16, 3), [2, 16, 3]),
        ("layers.0.B3", (2, 3), [2, 3, 3]),
        ("layers.0.s1", (2, 4), [2, 3]),
    ],
)
def test_shapes_fit_each_other(
    name: str, shape: tuple[int, ...], expected: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "kernels.safetensors"
    save_file({**tensors(), name: np.ones(shape, np.float32)}, path, header())
    with pytest.raises(ArtifactError) as info:
        read_kernels(path)
    assert f"{name}: expected the shape {expected}, got {list(shape)}" in str(info.value)
    assert one_line(info, path)


def test_query_heads_come_in_groups(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    found = tensors((0,))
    for name in ("layers.0.A1", "layers.0.A2"):
        found[name] = found[name][:3].copy()
    save_file(found, path, header())
    with pytest.raises(ArtifactError, match="got 3 for 2"):
        read_kernels(path)


def test_integers_are_no_kernels(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_file({**tensors(), "layers.0.s1": np.ones((2, 3), np.int32)}, path, header())
    with pytest.raises(ArtifactError, match=r"layers\.0\.s1: expected numbers of F16.* got I32"):
        read_kernels(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_kernels_say_so(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    write_kernels(path, {0: kernels()}, MODEL, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="as safetensors") as info:
        read_kernels(path)
    assert one_line(info, path)


def test_missing_kernels_say_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no such file") as info:
        read_kernels(tmp_path / "none.safetensors")
    assert one_line(info, tmp_path / "none.safetensors")


def test_other_model_is_refused_with_both_fingerprints() -> None:
    check_model(MODEL, MODEL, "map.json")
    with pytest.raises(ArtifactError) as info:
        check_model("qwen2-1l-2h-2kv-4d-9v", MODEL, "map.json")
    assert all(part in str(info.value) for part in ("map.json", MODEL, "qwen2-1l-2h-2kv-4d-9v"))


def test_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.json"
    path.write_text("before")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match="cannot write it: No space left") as info:
        write_map(path, [0], MODEL, {})
    assert one_line(info, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_to_write_into_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "none" / "map.json"
    with pytest.raises(ArtifactError, match="no such file or folder") as info:
        write_whole(path, b"")
    assert one_line(info, path)
