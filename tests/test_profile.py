"""Profiles: what is written comes back, on either backend; damaged or foreign ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvc
from kvc import demo
from kvc.card import model_card
from kvc.errors import ArtifactError, ConfigError
from kvc.files import ProfileFile, facts, read_artifact, read_map, read_profile, write_profile
from kvc.measure.choice import read_choice
from kvc.measure.held import hold
from tests.run_cli import PROMPT, both, error_line, kvc_run, need_backend

MODEL = "llama-8l-4h-2kv-64d-2048v"
PROFILE = ProfileFile(
    "kivi",
    {"gear.k_bits": "4", "gear.layer_bits": "0-2:8/4,5:2", "gear.sink": "4"},
    MODEL,
    {
        "context": 512,
        "dtype_bytes": 4,
        "nbytes": 1000,
        "dense_bytes": 4000,
        "share": 0.25,
        "bytes_per_token": 1.5,
        "fixed_bytes": 232,
        "quality": {"kl": 0.0012, "kl_error": 0.0001, "ppl": 34.5, "ppl_increase": 0.004},
    },
    [{"method": "kivi", "settings": {}, "nbytes": 500, "share": 0.125, "kl": 0.01, "kl_error": 0.1,
      "ppl": 35.0, "ppl_increase": 0.0125}],
    {"memory": 0.25, "rows": 4},
    "ab" * 32,
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profile.json", PROFILE)
    return tmp_path / "profile.json"


def test_what_is_written_comes_back(path: Path) -> None:
    assert read_profile(path) == PROFILE._replace(version=kvc.__version__)
    assert read_artifact(path) == read_profile(path)
    assert facts(read_profile(path))["kind"] == "profile"


def test_a_profile_is_its_method_with_its_settings(path: Path) -> None:
    method = kvc.parse(f"@{path}")
    assert method == kvc.parse("kivi", PROFILE.settings)
    assert method.name == f"@{path}"
    assert kvc.parse(f"@{path}", {"k_bits": 8}).codec == kvc.parse(
        "kivi", {**PROFILE.settings, "gear.k_bits": 8}
    ).codec  # fmt: skip
    assert read_choice(f"@{path}").method == method
    assert read_choice(f"@{path} sink=8").settings == {"gear.sink": "8"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.update(settings={}), "the file is damaged"),
        (lambda x: x.update(format=9), "expected format 1 or older, got 9"),
        (lambda x: x.update(kind="map"), "expected a kvsharer-map, got 'map'"),
        (lambda x: x.pop("front"), "it has no front"),
        (lambda x: x.update(settings=[]), "settings: expected a dict"),
    ],
)
def test_damaged_ones_are_one_line(path: Path, change: Any, says: str) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError) as error:
        read_artifact(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_none(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a profile, got 'kvsharer-map'"):
        kvc.parse(f"@{demo.path() / 'kvsharer-25.json'}")
    with pytest.raises(ArtifactError, match="expected a kvsharer-map, got 'profile'"):
        read_map(path)
    with pytest.raises(ArtifactError, match="there is no such file"):
        kvc.parse("@nowhere.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ArtifactError, match="as a JSON object, got list"):
        read_profile(tmp_path / "list.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ArtifactError, match="as JSON, got none"):
        read_profile(tmp_path / "text.json")
    with pytest.raises(ConfigError, match="unknown method 'profile"):
        kvc.parse("profile.json")


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    write_profile(tmp_path / "p.json", PROFILE._replace(settings={"gear.bits": "3"}))
    with pytest.raises(ConfigError, match="bits must be 2, 4 or 8"):
        kvc.parse(f"@{tmp_path / 'p.json'}")


@both
def test_either_backend_takes_it(backend: str, path: Path) -> None:
    need_backend(backend)
    engine: Any = kvc.load_engine(backend, str(demo.path()), "float32")
    ids = (37 * demo_ids()) % 2048
    held = hold(engine, ids, kvc.parse(f"@{path}"), 160)
    same = hold(engine, ids, kvc.parse("kivi", PROFILE.settings), 160)
    assert held.report.nbytes == same.report.nbytes < held.report.dense_bytes
    cache = kvc.make_cache(engine.model, f"@{path}")
    engine.logits(ids[None, :4], cache)
    assert engine.store(cache).length() == 4


def demo_ids() -> Any:
    return np.arange(192, dtype=np.int32)


@both
def test_another_model_refuses_it_with_both_names(backend: str, path: Path, tmp_path: Path) -> None:
    need_backend(backend)
    write_profile(path, PROFILE._replace(model="llama-32l-32h-8kv-128d-128256v"))
    got = error_line(kvc_run("generate", "--backend", backend, "--method", f"@{path}", PROMPT))
    assert "llama-32l-32h-8kv-128d-128256v" in got
    assert MODEL in got


@both
def test_text_is_generated(backend: str, path: Path) -> None:
    need_backend(backend)
    got = kvc_run("generate", "--backend", backend, "--method", f"@{path}", "--max-tokens", "4",
                  "--json", PROMPT)  # fmt: skip
    assert got.exit_code == 0, got.output
    assert json.loads(got.stdout)["method"] == f"@{path}"


def test_info_explains_it(path: Path) -> None:
    got = kvc_run("info", str(path))
    assert got.exit_code == 0, got.output
    for said in ("profile", MODEL, "layer_bits=0-2:8/4,5:2", "25.00% of the dense", "512 tokens",
                 "+0.40%", "12.5%", "memory", "0.25"):  # fmt: skip
        assert said in got.stdout, said
    data = json.loads(kvc_run("info", "--json", str(path)).stdout)
    assert data["settings"] == PROFILE.settings
    assert data["front"] == PROFILE.front


def test_its_card_says_how_to_take_it() -> None:
    card = model_card(PROFILE, "org/name", "org/model")
    assert "--method @org/name" in card
    assert "kvc.make_cache(model, '@org/name')" in card
