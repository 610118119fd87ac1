"""Artifacts go to the Hugging Face hub and come back; its client is a stand-in over a folder."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import kvc
from kvc.card import model_card
from kvc.errors import ArtifactError
from kvc.files import KernelsFile, MapFile, write_map
from kvc.hub import load_artifact, locate, push
from kvc.methods import KVSharer, parse
from tests.run_cli import both, error_line, generate_json, kvc_run, need_backend
from tests.test_bundled import CHAINED, SHAPE, kernels

REPO = "org/a-name"
HASH = "ab" * 32
Fail = Callable[[], Exception]


def http_error(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nURL", response=response)  # type: ignore[call-arg]


class Hub:
    """What is asked of the hub's client, kept in a folder: `org/name/revision/file`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commits: list[tuple[str, list[str], str]] = []
        self.made: list[tuple[str, bool]] = []
        self.tokens: list[str | None] = []
        self.fail: Exception | None = None

    def api(self, token: str | None = None) -> Hub:
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.fail:
            raise self.fail
        (self.folder / repo_id / "main").mkdir(parents=True, exist_ok=exist_ok)
        self.made.append((repo_id, private))
        return f"https://huggingface.co/{repo_id}"

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> None:
        for operation in operations:
            path = self.folder / repo_id / "main" / operation.path_in_repo
            path.write_bytes(operation.path_or_fileobj)
        names = [operation.path_in_repo for operation in operations]
        self.commits.append((repo_id, names, commit_message))

    def download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        if self.fail:
            raise self.fail
        repo = self.folder / repo_id
        if not repo.exists():
            raise http_error(errors.RepositoryNotFoundError, 404)
        if not (repo / (revision or "main")).exists():
            raise http_error(errors.RevisionNotFoundError, 404)
        path = repo / (revision or "main") / filename
        if not path.exists():
            raise http_error(errors.RemoteEntryNotFoundError, 404)
        return str(path)

    def card(self, repo: str = REPO) -> str:
        return (self.folder / repo / "main" / "README.md").read_text()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


def map_file(folder: Path) -> str:
    config = {"share": 0.25, "order": "a|b", "lines": "a\nb"}
    path = folder / "map.json"
    write_map(path, CHAINED, SHAPE.fingerprint, config, HASH, "partial")
    return str(path)


def kernels_file(folder: Path, **config: Any) -> str:
    return kernels(folder, "k.safetensors", policy="sink", heavy=4, recent=6, **config)


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(ArtifactError) as info:
        call()
    assert "\n" not in str(info.value)
    return str(info.value)


def test_kernels_go_and_come_back(hub: Hub, tmp_path: Path) -> None:
    path = kernels_file(tmp_path)
    assert push(path, REPO, token="hf_x") == f"https://huggingface.co/{REPO}"
    name = "less-kernels.safetensors"
    assert hub.commits == [(REPO, ["README.md", name], f"Upload {name}")]
    assert hub.made == [(REPO, False)]
    assert hub.tokens == ["hf_x"]
    got, here = kvc.load_artifact(REPO), kvc.load_artifact(path)
    assert isinstance(got, KernelsFile)
    assert got[1:] == here[1:]
    assert (hub.folder / REPO / "main" / name).read_bytes() == Path(path).read_bytes()
    memory = parse("less", {"kernels": REPO, "heavy": 4}).check(SHAPE).memory
    assert memory is not None
    assert set(memory.maps(range(8))) == set(range(8))


def test_maps_go_and_come_back(hub: Hub, tmp_path: Path) -> None:
    path = map_file(tmp_path)
    push(path, REPO, private=True)
    assert hub.commits == [(REPO, ["README.md", "kvsharer-map.json"], "Upload kvsharer-map.json")]
    assert hub.made == [(REPO, True)]
    got = load_artifact(REPO)
    assert isinstance(got, MapFile)
    assert got == load_artifact(Path(path))
    layout = KVSharer(REPO).check(SHAPE)
    assert layout.map == "6:3,7:6"
    push(path, REPO)  # again, over what is there


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    push(map_file(tmp_path), REPO)
    write_map(tmp_path / "old.json", [0] * 8, SHAPE.fingerprint, {})
    old = hub.folder / REPO / "v1"
    old.mkdir()
    (tmp_path / "old.json").rename(old / "kvsharer-map.json")
    assert locate(f"{REPO}@v1") == old / "kvsharer-map.json"
    assert KVSharer(f"{REPO}@v1").check(SHAPE).owners(8) == (0,) * 8
    assert "no such revision" in one_line(lambda: load_artifact(f"{REPO}@v2"))


def test_paths_come_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    Path(map_file(tmp_path)).rename(tmp_path / REPO)
    assert KVSharer(REPO).check(SHAPE).map == "6:3,7:6"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(f"~/{REPO}") == tmp_path / REPO


@pytest.mark.parametrize(
    "name", ["none", "org/map.json", "a/k.safetensors", "./org/name", "/org/name", "a/b/c", "a b/c"]
)
def test_what_looks_like_no_repository_is_a_file(hub: Hub, name: str) -> None:
    hub.fail = AssertionError("the hub was asked")
    assert "there is no such file" in one_line(lambda: load_artifact(name))


def test_the_hubs_errors_are_one_line(hub: Hub) -> None:
    assert "no such repository on the hub" in one_line(lambda: load_artifact(REPO))
    (hub.folder / REPO / "main").mkdir(parents=True)
    assert "kvsharer-map.json or kvc-profile.json in this repository" in one_line(
        lambda: load_artifact(REPO)
    )
    assert one_line(lambda: parse("less", {"kernels": REPO})).endswith(
        "expected less-kernels.safetensors in this repository of the hub, found none"
    )


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (lambda: http_error(errors.GatedRepoError, 403), "must be asked for on its page"),
        (lambda: http_error(errors.HfHubHTTPError, 500), "HfHubHTTPError: 500 Client Error."),
        (lambda: RuntimeError("no route\nto host"), "RuntimeError: no route"),
        (lambda: errors.HFValidationError("Cannot have --"), "Cannot have --"),
        (lambda: errors.LocalTokenNotFoundError("no token"), "log in with hf auth login"),
        (lambda: OSError(28, "No space left on device"), "OSError: No space left on device"),
    ],
)
def test_whatever_fails_is_one_line(hub: Hub, tmp_path: Path, error: Fail, says: str) -> None:
    hub.fail = error()
    assert says in one_line(lambda: load_artifact(REPO))
    path = map_file(tmp_path)
    assert says in one_line(lambda: push(path, REPO))
    assert says in error_line(kvc_run("push", path, REPO))
    assert hub.commits == []


def test_without_network_the_real_client_says_so() -> None:
    assert "the Hugging Face hub cannot be reached" in one_line(lambda: load_artifact(REPO))


def test_only_sound_artifacts_are_pushed(hub: Hub, tmp_path: Path) -> None:
    path = Path(map_file(tmp_path))
    path.write_text(path.read_text().replace("partial", "Partial"))
    assert "the file is damaged" in one_line(lambda: push(path, REPO))
    assert "no such file" in error_line(kvc_run("push", str(tmp_path / "none.json"), REPO))
    for repo in ("name", "org/name@v1", "a/b/c", ""):
        assert "expected a repository as org/name" in one_line(lambda repo=repo: push(path, repo))
    assert hub.made == hub.commits == []


def test_damage_on_the_hub_is_found(hub: Hub, tmp_path: Path) -> None:
    push(kernels_file(tmp_path), REPO)
    path = hub.folder / REPO / "main" / "less-kernels.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "the file is damaged" in one_line(lambda: load_artifact(REPO))
    assert "the file is damaged" in error_line(kvc_run("info", REPO))


def test_the_command_pushes(hub: Hub, tmp_path: Path) -> None:
    args = ("push", map_file(tmp_path), REPO, "--private", "--base-model", "meta/Llama")
    result = kvc_run(*args)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"https://huggingface.co/{REPO}\n"
    assert hub.made == [(REPO, True)]
    assert "base_model: meta/Llama" in hub.card()
    shown = json.loads(kvc_run("info", REPO, "--json").stdout)
    assert shown["artifact"] == REPO
    assert shown["sharers"] == {"6": 3, "7": 3}


# Cards


def test_a_card_says_what_the_artifact_is(hub: Hub, tmp_path: Path) -> None:
    push(map_file(tmp_path), REPO, base_model="meta/Llama")
    card = hub.card()
    head = huggingface_hub.ModelCard(card).data.to_dict()
    assert head == {
        "base_model": "meta/Llama",
        "library_name": "kvc",
        "tags": ["kvc", "kvsharer"],
    }  # the license is the user's
    for line in (
        "# A KVSharer map of [meta/Llama](https://huggingface.co/meta/Llama)",
        f"| model | `{SHAPE.fingerprint}` |",
        f"| calibration | `{HASH}` |",
        f"| version | `{kvc.__version__}` |",
        "| note | `partial` |",
        '| sharers | `{"6": 3, "7": 3}` |',
        "| order | `a\\|b` |",
        '| lines | "a\\nb" |',
        "| share | `0.25` |",
    ):
        assert line in card.splitlines()
    assert "base_model" not in model_card(load_artifact(REPO), REPO).split("---")[1]


def blocks(card: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def libraries(backend: str) -> None:
    """Imported before the hub's client is replaced: they take parts of it for good."""
    need_backend(backend)


@both
@pytest.mark.parametrize("under", [False, True])
@pytest.mark.usefixtures("libraries")
def test_a_cards_examples_run(hub: Hub, tmp_path: Path, backend: str, under: bool) -> None:
    """As printed, with the bundled model."""
    push(kernels_file(tmp_path, **({"map": CHAINED} if under else {})), REPO)
    assert huggingface_hub.ModelCard(hub.card()).data.tags == ["kvc", "less"]
    command = shlex.split(blocks(hub.card(), "sh").replace("\\\n", " "))
    assert command[:2] == ["kvc", "generate"]
    model = str(kvc.demo.path())
    row = generate_json(backend, *[model if x == "MODEL" else x for x in command[2:]])
    assert row["method"] == ("kvsharer+less" if under else "less")
    engine = kvc.load_engine(backend, model)
    names: dict[str, Any] = {"model": engine.model}
    exec(blocks(hub.card(), "python"), names)
    method = engine.store(names["cache"]).method
    assert (method.memory.policy, method.memory.heavy, method.memory.recent) == ("sink", 4, 6)
    assert method.memory.kernels.endswith("less-kernels.safetensors")
    assert method.owners(8) == ((0, 1, 2, 3, 4, 5, 3, 3) if under else tuple(range(8)))
