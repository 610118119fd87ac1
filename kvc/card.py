"""The model card of an artifact on the Hugging Face hub."""

from __future__ import annotations

import json
import shlex
from typing import Any

from kvc.files import (
    KERNELS,
    MAP,
    PROFILE,
    Artifact,
    KernelsFile,
    ProfileFile,
    facts,
    kind_of,
    map_text,
)

_WHAT = {
    KERNELS: (
        "LESS kernels",
        "less",
        "[LESS](https://arxiv.org/abs/2402.09398) keeps few tokens of a key/value cache and folds "
        "those that it evicts into a state of constant size. These are the learned maps that it "
        "needs, trained for one model.",
    ),
    MAP: (
        "A KVSharer map",
        "kvsharer",
        "[KVSharer](https://arxiv.org/abs/2410.18517) lets dissimilar layers of a model read one "
        "key/value cache. This is the map of which layer reads which, searched for one model.",
    ),
    PROFILE: (
        "A profile",
        "tune",
        "A way to compress the key/value cache with all its parameters, bits of each layer among "
        "them, as `kvc tune` found it for one model.",
    ),
}


def model_card(artifact: Artifact, repo: str, base_model: str = "") -> str:
    """Markdown with a YAML head: what the artifact is, what made it, and how to use it.

    The license is left to whoever owns the repository.

    Args:
        artifact: As read.
        repo: Where it will be, `org/name`.
        base_model: Name on the hub of the model that it was made for.
    """
    from huggingface_hub import ModelCardData

    title, method, what = _WHAT[kind_of(artifact)]
    head = ModelCardData(library_name="kvc", base_model=base_model or None, tags=["kvc", method])
    of = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    rows = {name: _shown(x) for name, x in facts(artifact).items() if name != "config"}
    return "\n".join(
        [
            f"---\n{head.to_yaml().strip()}\n---\n",
            f"# {title}{of}\n",
            f"{what}\n",
            "```sh",
            _command(artifact, repo, base_model or "MODEL"),
            "```\n",
            "```python",
            _python(artifact, repo),
            "```\n",
            "It serves models with this fingerprint, on any backend of kvc, and no others. "
            "`calibration` is the SHA-256 of the tokens that it was made from.\n",
            *_table("artifact", rows),
            "\nWhat made it:\n",
            *_table("setting", {name: _shown(x) for name, x in artifact.config.items()}),
            "",
        ]
    )


def _settings(artifact: Artifact, repo: str) -> tuple[str, dict[str, Any]]:
    """The method that uses an artifact, and its settings."""
    if isinstance(artifact, ProfileFile):
        return f"@{repo}", {}
    if not isinstance(artifact, KernelsFile):
        return "kvsharer", {"kvsharer.map": repo}
    config = artifact.config
    kept = {f"less.{key}": config[key] for key in ("policy", "heavy", "recent") if key in config}
    settings = {"less.kernels": repo, **kept}
    if shared := artifact.sharers:
        return "kvsharer+less", {"kvsharer.map": map_text(shared), **settings}
    return "less", settings


def _command(artifact: Artifact, repo: str, model: str) -> str:
    method, settings = _settings(artifact, repo)
    given = [f"--set {shlex.quote(f'{key}={x}')}" for key, x in settings.items()]
    return " \\\n    ".join(
        [f'kvc generate "Once upon a time" --model {shlex.quote(model)} --method {method}', *given]
    )


def _python(artifact: Artifact, repo: str) -> str:
    method, settings = _settings(artifact, repo)
    lines = [f"settings = {settings!r}"] if settings else []
    given = f"{method!r}, **settings" if settings else repr(method)
    call = f"cache = kvc.make_cache(model, {given})  # of mlx-lm or transformers"
    return "\n".join(["import kvc\n", *lines, call])


def _table(title: str, rows: dict[str, str]) -> list[str]:
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {x} |" for name, x in rows.items())]


def _shown(x: Any) -> str:
    """A value in a cell of a table."""
    text = x if isinstance(x, str) else json.dumps(x)
    return f"`{text}`".replace("|", "\\|") if text and "\n" not in text else json.dumps(text)
