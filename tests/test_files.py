"""Files made for one model: what is written comes back, and what is damaged is one line."""

import hashlib
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvc import __version__
from kvc.errors import ArtifactError
from kvc.files import (
    KernelsFile,
    MapFile,
    check_model,
    facts,
    read_artifact,
    read_kernels,
    read_map,
    sharers,
    write_kernels,
    write_map,
    write_whole,
)
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


def canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def sealed(data: dict[str, Any], arrays: dict[str, Any] | None = None) -> dict[str, Any]:
    """A header without what is None, with the checksum as the format defines it."""
    data = {key: x for key, x in data.items() if x is not None and key != "checksum"}
    content = canonical(data)
    for name, x in sorted((arrays or {}).items()):
        content += canonical([name, x.dtype.name, list(x.shape)]) + x.tobytes()
    return {**data, "checksum": hashlib.sha256(content).hexdigest()}


def header(arrays: dict[str, Any], **changes: Any) -> dict[str, str]:
    full = {"format": "1", "kind": "less-kernels", "model": MODEL, "config": "{}"}
    return sealed({**full, "calibration": HASH, "version": "0.1", **changes}, arrays)


def save_kernels(arrays: dict[str, Any], path: Path, **changes: Any) -> None:
    save_file(arrays, path, header(arrays, **changes))


def one_line(info: pytest.ExceptionInfo[ArtifactError], path: Path) -> bool:
    return "\n" not in str(info.value) and str(info.value).startswith(f"{path}: ")


def test_map_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_map(path, [0, 1, 1, 0], MODEL, {"share": 0.5}, HASH, "found in 3 tries")
    got = read_map(path)
    assert got.owners == (0, 1, 1, 0)
    assert got[1:] == (MODEL, {"share": 0.5}, HASH, "found in 3 tries", __version__)
    content = {
        "format": 1,
        "kind": "kvsharer-map",
        "model": MODEL,
        "version": __version__,
        "map": [0, 1, 1, 0],
        "config": {"share": 0.5},
        "calibration": HASH,
        "note": "found in 3 tries",
    }
    assert json.loads(path.read_text()) == sealed(content)
    assert read_artifact(path) == got


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_kernels_come_back(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    written = {3: kernels(dtype), 10: kernels(dtype), 0: kernels(dtype)}
    write_kernels(path, written, MODEL, {"rank": 3}, HASH)
    got = read_kernels(path)
    assert list(got.layers) == [0, 3, 10]
    assert got[1:] == (MODEL, {"rank": 3}, HASH, __version__)
    assert isinstance(read_artifact(path), KernelsFile)
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
    save_kernels(tensors(), theirs, version=__version__)
    for a, b in zip(read_kernels(ours).layers[3], read_kernels(theirs).layers[3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert ours.stat().st_size == theirs.stat().st_size


def test_the_same_kernels_are_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for path in paths:
        write_kernels(path, {0: kernels()}, MODEL, {"rank": 3}, HASH)
    assert len({path.read_bytes() for path in paths}) == 1


def test_version_is_the_packages() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert settings["project"]["version"] == __version__


def test_config_comes_back_as_json_has_it(tmp_path: Path) -> None:
    """Tuples and keys that are numbers change on the way, and the checksum is of what is read."""
    config = {"order": (3, 1), 10: "ten", 9: 0.1, "deep": {2: None}}
    expected = {"order": [3, 1], "10": "ten", "9": 0.1, "deep": {"2": None}}
    write_map(tmp_path / "map.json", (0, 0), MODEL, config)
    assert read_map(tmp_path / "map.json").config == expected
    write_kernels(tmp_path / "k.safetensors", {0: kernels()}, MODEL, config)
    assert read_kernels(tmp_path / "k.safetensors").config == expected


def test_kind_is_known_by_content(tmp_path: Path) -> None:
    named, other = tmp_path / "map.safetensors", tmp_path / "kernels.json"
    write_map(tmp_path / "map", [0, 0], MODEL, {})
    write_kernels(tmp_path / "kernels", {0: kernels()}, MODEL, {})
    assert isinstance(read_artifact(tmp_path / "map"), MapFile)
    assert isinstance(read_artifact((tmp_path / "kernels").rename(other)), KernelsFile)
    with pytest.raises(ArtifactError, match="as safetensors"):
        read_artifact((tmp_path / "map").rename(named))
    with pytest.raises(ArtifactError, match="no such file"):
        read_artifact(tmp_path / "none")


# Damage


def outcome(read: Callable[[Path], Any], path: Path, data: bytes) -> Any:
    """What is read of these bytes; None if that is an error of one line."""
    path.write_bytes(data)
    try:
        return read(path)
    except ArtifactError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert said.startswith(f"{path}: ")
    return None


def test_a_map_with_any_byte_flipped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_map(path, [0, 1, 1], MODEL, {"share": 0.5, "seed": 0}, HASH, "a note")
    data, expected = path.read_bytes(), read_map(path)
    for i in range(len(data)):
        for flip in (0x01, 0x2A):  # the second makes one blank of another
            got = outcome(read_artifact, path, data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
            assert got is None or (got == expected and data[i : i + 1].isspace()), (i, flip)
    for n in range(0, len(data) - 1, 3):
        assert outcome(read_artifact, path, data[:n]) is None
    spaced = json.dumps(json.loads(data), indent=2).encode()
    assert outcome(read_map, path, spaced) == expected


def test_kernels_with_a_flipped_byte_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    write_kernels(path, {0: kernels("float16")}, MODEL, {"rank": 3, "policy": "h2o"}, HASH)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    places = [*range(9), *rng.integers(9, end, 300), *rng.integers(end, len(data), 100)]
    for i in places:
        flipped = bytes([data[i] ^ int(rng.integers(1, 256))])
        read = read_artifact if i < 9 else read_kernels  # by which the kind is known
        got = outcome(read, path, data[:i] + flipped + data[i + 1 :])
        assert got is None or (i < end and data[i : i + 1] == b" "), i
    for n in [*range(0, end, 50), *rng.integers(end, len(data), 10)]:
        assert outcome(read_kernels, path, data[:n]) is None
    assert outcome(read_kernels, path, data + b"\0") is None


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b'{"format": "' + b"9" * 5000]
)
def test_monstrous_json_is_refused(data: bytes, tmp_path: Path) -> None:
    for tail in (b"", b'"}'):
        assert outcome(read_map, tmp_path / "map.json", data + tail) is None


def test_tensors_of_another_name_are_another_content(tmp_path: Path) -> None:
    """Two layers that change places are damage too, as are numbers under another dtype."""
    path = tmp_path / "kernels.safetensors"
    write_kernels(path, {0: kernels(), 1: kernels()}, MODEL, {})
    arrays, damaged = load_file(path), header(tensors((0, 1)), version=__version__)
    arrays["layers.0.s1"] = arrays["layers.0.s1"] + 1
    arrays["layers.0.s1"], arrays["layers.1.s1"] = arrays["layers.1.s1"], arrays["layers.0.s1"]
    save_file(arrays, path, damaged)
    with pytest.raises(ArtifactError, match="the file is damaged"):
        read_kernels(path)


# What is wrong is named


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": None}, "it has no format"),
        ({"model": None}, "it has no model"),
        ({"model": None, "calibration": None}, "it has no model, calibration"),
        ({"format": 2}, "format 1 or older, got 2; upgrade kvc"),
        ({"format": 7, "kind": "other", "map": {}}, "got 7; upgrade kvc"),
        ({"format": "one"}, "expected format 1, got 'one'"),
        ({"kind": "less-kernels"}, "expected a kvsharer-map, got 'less-kernels'"),
        ({"map": {"1": 0}}, "map: expected a list"),
        ({"map": [0, 2, 1]}, "the owner of layer 1 to be one of 0 to 1, got 2"),
        ({"map": [0, -1]}, "owner of layer 1"),
        ({"map": [0, True]}, "got True"),
        ({"map": [0, 0.0]}, "got 0.0"),
        ({"map": [0, "0"]}, "got '0'"),
        ({"model": 7}, "model: expected a str"),
        ({"version": None}, "it has no version"),
    ],
    ids=str,
)
def test_wrong_map_says_what(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_map(path, [0, 0, 1], MODEL, {}, HASH)
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))
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
        (b'{"map": [0, 0]}', "no format, kind, model, version, calibration, config, checksum"),
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
        ({"kind": "kvsharer-map"}, "expected a less-kernels, got 'kvsharer-map'"),
        ({"model": None}, "it has no model"),
        ({"config": "{"}, "config as JSON"),
        ({"config": "[]"}, "config: expected a JSON object"),
        ({"config": "[" * 100_000}, "config as JSON"),
        ({"config": '{"map": {"1": 0}}'}, "expected map as a list of owners"),
        ({"config": '{"map": [0, 2]}'}, "the owner of layer 1"),
    ],
    ids=str,
)
def test_wrong_header_says_what(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_kernels(tensors(), path, **change)
    with pytest.raises(ArtifactError) as info:
        read_kernels(path)
    assert says in str(info.value)
    assert one_line(info, path)


def test_a_models_weights_are_no_kernels(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    with pytest.raises(ArtifactError, match="it has no format, kind, model, version, calib"):
        read_kernels(path)


@pytest.mark.parametrize("name", ["layers.0.A1", "layers.3.B3", "layers.3.s2"])
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_kernels({key: x for key, x in tensors().items() if key != name}, path)
    with pytest.raises(ArtifactError, match=f"expected a tensor {name}, got none") as info:
        read_kernels(path)
    assert one_line(info, path)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_kernels({"weight": np.ones(3, np.float32)}, path)
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
    save_kernels({**tensors(), name: np.ones(shape, np.float32)}, path)
    with pytest.raises(ArtifactError) as info:
        read_kernels(path)
    assert f"{name}: expected the shape {expected}, got {list(shape)}" in str(info.value)
    assert one_line(info, path)


def test_query_heads_come_in_groups(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    found = tensors((0,))
    for name in ("layers.0.A1", "layers.0.A2"):
        found[name] = found[name][:3].copy()
    save_kernels(found, path)
    with pytest.raises(ArtifactError, match="got 3 for 2"):
        read_kernels(path)


def test_integers_are_no_kernels(tmp_path: Path) -> None:
    path = tmp_path / "kernels.safetensors"
    save_kernels({**tensors(), "layers.0.s1": np.ones((2, 3), np.int32)}, path)
    with pytest.raises(ArtifactError, match=r"layers\.0\.s1': expected numbers of F16.* got I32"):
        read_kernels(path)


def test_files_without_a_checksum_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_map(path, [0, 0], MODEL, {})
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: x for key, x in data.items() if key != "checksum"}))
    with pytest.raises(ArtifactError, match="no kvsharer-map file of kvc: it has no checksum"):
        read_map(path)
    path = tmp_path / "kernels.safetensors"
    head = header(tensors())
    del head["checksum"]
    save_file(tensors(), path, head)
    with pytest.raises(ArtifactError, match="no less-kernels file of kvc: it has no checksum"):
        read_kernels(path)


def test_facts_of_a_map_follow_chains(tmp_path: Path) -> None:
    write_map(tmp_path / "map.json", [0, 1, 2, 1, 4, 3, 6, 0], MODEL, {"share": 0.25}, HASH, "n")
    got = facts(read_artifact(tmp_path / "map.json"))
    assert got == {
        "kind": "kvsharer-map",
        "model": MODEL,
        "version": __version__,
        "calibration": HASH,
        "config": {"share": 0.25},
        "note": "n",
        "layers": 8,
        "sharers": {3: 1, 5: 1, 7: 0},
        "share": 3 / 8,
        "ratio": 8 / 5,
    }
    assert sharers((0, 1, 2)) == {}


def test_facts_of_kernels_are_those_of_all_layers(tmp_path: Path) -> None:
    narrow = Kernels(*(x[..., :2].copy() for x in kernels("float16")))
    narrow = narrow._replace(
        a2=narrow.a2[:, :2].copy(), b2=narrow.b2[:, :2].copy(), b3=narrow.b3[:, :2].copy()
    )
    path = tmp_path / "kernels.safetensors"
    write_kernels(path, {1: kernels(), 4: narrow}, MODEL, {"map": [0, 1, 1, 1, 4]}, HASH)
    got = facts(read_artifact(path))
    assert {key: got[key] for key in ("layers", "rank", "hidden", "dtype", "sharers")} == {
        "layers": [1, 4],
        "rank": [2, 3],
        "hidden": [2, 16],
        "dtype": ["float16", "float32"],
        "sharers": {2: 1, 3: 1},
    }
    sizes = [sum(x.size for x in part) for part in (kernels(), narrow)]
    assert got["parameters"] == sum(sizes)
    assert got["bytes"] == 4 * sizes[0] + 2 * sizes[1]


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
