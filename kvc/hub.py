"""Artifacts by name: a path, or a repository of the Hugging Face hub, which takes them too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kvc.errors import ArtifactError
from kvc.files import KERNELS, MAP, PROFILE, Artifact, kind_of, read_artifact
from kvc.files.header import reason

FILES = {
    KERNELS: "less-kernels.safetensors",
    MAP: "kvsharer-map.json",
    PROFILE: "kvc-profile.json",
}  # in a repository
_REPO = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?", re.ASCII)


def load_artifact(name: str | Path) -> Artifact:
    """Kernels of LESS, a map of KVSharer or a profile, whichever it is.

    Args:
        name: A file, or a repository of the hub, `org/name` or `org/name@revision`.

    Raises:
        ArtifactError: If there is none, it cannot be had, or it is damaged.
    """
    return read_artifact(locate(name))


def locate(name: str | Path, kinds: Sequence[str] = (KERNELS, MAP, PROFILE)) -> Path:
    """The file that a name stands for; one of the hub is downloaded, once.

    Args:
        name: As `load_artifact` takes it. A path comes first where both are there.
        kinds: What the file may be, in the order of trying; for the hub alone.

    Raises:
        ArtifactError: If there is none, or it cannot be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    found = _REPO.fullmatch(str(name))
    if not found or path.suffix in {Path(file).suffix for file in FILES.values()}:
        raise ArtifactError(f"{name}: cannot read it: there is no such file or folder")
    return _download(str(name), found["repo"], found["revision"], kinds)


def _download(name: str, repo: str, revision: str | None, kinds: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    wanted = [FILES[kind] for kind in kinds]
    missing: Exception
    for file in wanted:
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except EntryNotFoundError as error:
            missing = error
        except Exception as error:  # the hub's client raises what its own libraries do
            raise ArtifactError(f"{name}: {_why(error, 'cannot download it')}") from None
    if isinstance(missing, LocalEntryNotFoundError):
        raise ArtifactError(
            f"{name}: there is no such file, and the Hugging Face hub cannot be reached; "
            "download it while online, or name a file"
        )
    raise ArtifactError(
        f"{name}: expected {' or '.join(wanted)} in this repository of the hub, found none"
    )


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    base_model: str = "",
) -> str:
    """Upload an artifact to the Hugging Face hub with a model card, in one commit.

    The repository is made if it is not there; the card of an earlier push is replaced.

    Args:
        path: The file; it is checked first.
        repo: `org/name`.
        private: Whether a new repository is.
        token: Of the hub; by default that of `hf auth login` or `HF_TOKEN`.
        base_model: Name on the hub of the model that the artifact was made for.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: If the file is damaged, or the hub does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from kvc.card import model_card

    found = _REPO.fullmatch(repo)
    if not found or found["revision"]:
        raise ArtifactError(f"push: expected a repository as org/name, got {repo!r}")
    artifact = read_artifact(path)
    kind = kind_of(artifact)
    card = model_card(artifact, repo, base_model)
    files = {"README.md": card.encode(), FILES[kind]: Path(path).read_bytes()}
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(
            repo,
            [CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=f"Upload {FILES[kind]}",
        )
    except Exception as error:  # the hub's client raises what its own libraries do
        raise ArtifactError(f"{repo}: {_why(error, 'cannot upload to it')}") from None
    return str(url)


def _why(error: Exception, what: str) -> str:
    """One line of what went wrong, and how to mend it where that is known."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    texts: dict[type[Exception], str] = {
        GatedRepoError: "access to this repository of the hub must be asked for on its page; "
        "then log in with hf auth login",
        RepositoryNotFoundError: "there is no such file and no such repository on the hub, or it "
        "is private; check the name, or log in with hf auth login",
        RevisionNotFoundError: "the repository has no such revision",
        LocalTokenNotFoundError: "the hub asks who you are; log in with hf auth login",
    }
    for kind, text in texts.items():  # a gated repository's is a kind of one that is not found
        if isinstance(error, kind):
            return text
    return f"{what}: {type(error).__name__}: {reason(error)[:300].strip()}"
