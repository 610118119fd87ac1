"""The training of a model's LESS kernels: layer after layer, each kept as soon as it is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvc.backends.base import Array, Engine, ops_of
from kvc.calibrate.capture import Captured, capture, fitting, layers_of
from kvc.calibrate.layer import Epoch, more_tokens, policy_error, train_layer
from kvc.calibrate.less import Recipe, begin, prepare
from kvc.calibrate.rows import Rows
from kvc.errors import ArtifactError, ConfigError
from kvc.files import KernelsFile, read_kernels, write_kernels, write_whole
from kvc.methods import KVSharer, Method, method_of
from kvc.methods.less import Less
from kvc.ops.evict import Kernels

VALIDATION = 10  # one row of so many is held out


class Progress(Protocol):
    """What hears of a run."""

    def captured(self, row: int, n_rows: int) -> None:
        """Called after each row whose activations are on disk."""

    def trained(self, layer: int, epoch: Epoch) -> None:
        """Called before a layer's first epoch and after each one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train, and on what."""

    less: Less  # the policy, its budgets in tokens
    recipe: Recipe
    rows: Rows
    layers: tuple[int, ...]  # by the model's numbers
    sharing: KVSharer | None = None  # whose map the model runs under
    model: str = ""  # as the user names it

    @property
    def config(self) -> dict[str, Any]:
        """What decides the result, but for the layers."""
        return {
            "policy": self.less.policy,
            "heavy": int(self.less.heavy),
            "recent": int(self.less.recent),
            "normalize": self.less.normalize,
            "sequences": len(self.rows.ids),
            "length": self.rows.ids.shape[1],
            **asdict(self.recipe),
        }


def check_budget(less: Less, length: int) -> None:
    """That a policy evicts something in sequences of `length` tokens, and keeps something.

    Raises:
        ConfigError: If it does not.
    """
    c = int(less.heavy + less.recent)
    if c < 1:
        raise ConfigError(f"--budget: expected one token or more of {length}, got none; raise it")
    if c > length - 2:
        raise ConfigError(
            f"--budget: expected fewer tokens than a sequence has, got {c} of {length}: nothing "
            "would be evicted; lower it, or raise --length"
        )


def train(engine: Engine, plan: Plan, out: Path, progress: Progress) -> None:
    """Trains the layers of a plan and writes their kernels to `out`.

    What is done is kept in a folder beside `out`, layer by layer; the same plan goes on from there
    and ends with the same kernels.

    Raises:
        ConfigError: If the model's attention cannot be reached, the folder is of another plan, a
            layer's owner is not in the plan, or there is no room on disk.
        KVCError: If the model's activations do not fit half precision.
    """
    engine.make_cache(method_of(plan.less))  # a model that could not use the kernels is refused
    method = method_of(plan.sharing) if plan.sharing else Method()
    owners = _owners(engine, method)
    config = {**plan.config, "map": owners if plan.sharing else None}
    if apart := [layer for layer in plan.layers if owners[layer] not in plan.layers]:
        raise ConfigError(
            f"--layers: layer {apart[0]} reads the cache of layer {owners[apart[0]]}; train both "
            "in one part"
        )
    work = Path(f"{out}.work")
    _claim(work, {**config, "model": engine.shape.fingerprint, "calibration": plan.rows.digest})
    files = {layer: work / f"layer-{layer}.safetensors" for layer in plan.layers}
    left = [layer for layer in plan.layers if not files[layer].exists()]
    scratch = work / "activations"
    while left:
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        scratch.mkdir()
        n = fitting(scratch, len(left), engine.shape, plan.rows.ids.size)
        now, left = left[:n], left[n:]
        done = [0]

        def on_row(done: list[int] = done) -> None:
            done[0] += 1
            progress.captured(done[0], len(plan.rows.ids))

        captured = capture(engine, method, plan.rows.ids, now, scratch, on_row)
        for layer in now:
            owner = owners[layer]
            shared = read_kernels(files[owner]).layers[owner] if owner != layer else None
            project = engine.output_projection(layer)
            best = _train(plan, layer, captured, shared, project, scratch, progress)
            found = {str(layer): {**best.errors._asdict(), "epoch": best.number}}
            write_kernels(
                files[layer],
                {layer: _stored(best.kernels)},
                engine.shape.fingerprint,
                {**config, "model": plan.model, "backend": engine.name, "errors": found},
                plan.rows.digest,
            )
        captured = {}
    merge(list(files.values()), out)
    shutil.rmtree(work)


def _train(
    plan: Plan,
    layer: int,
    captured: Mapping[int, Captured],
    shared: Kernels | None,
    project: Array | None,
    scratch: Path,
    progress: Progress,
) -> Epoch:
    """One layer; `shared` are the kernels of the layer whose cache it reads."""
    own, owner = captured[layer], captured[captured[layer].owner]
    like = own.query.q
    if project is None:  # a projection that is not known weighs all outputs alike
        width = own.q.shape[1] * own.q.shape[3]
        project = ops_of(like).from_numpy(np.eye(width, dtype=np.float32), like)
    n_val = max(1, len(own.q) // VALIDATION)
    held_out = slice(len(own.q) - n_val, len(own.q))
    data, mass = prepare(own, owner, plan.less, scratch, project)
    more = more_tokens(plan.less, plan.recipe.rank)
    bare, plus = (policy_error(own, owner, less, held_out, project) for less in (plan.less, more))
    start = begin(data, mass, plan.recipe, layer, project)
    if shared is not None:
        start = Kernels(*start[:2], *(x.astype(np.float32) for x in shared[2:]))
    epochs = train_layer(
        data, start, bare, plus, n_val, plan.recipe, layer, project,
        shared is not None,
    )  # fmt: skip
    for epoch in epochs:
        progress.trained(layer, epoch)
    return epoch


def merge(paths: Sequence[str | Path], out: str | Path) -> None:
    """Puts kernels of different layers, trained alike, into one file.

    Raises:
        ArtifactError: If they are of different models or runs, or of the same layers.
    """
    kernels: dict[int, Kernels] = {}
    errors: dict[str, Any] = {}
    first = read_kernels(paths[0])
    for path in paths:
        part = read_kernels(path)
        ours, theirs = ({**f.config, **_identity(f)} for f in (first, part))
        if other := [key for key in ours if key not in _FREE and ours[key] != theirs.get(key)]:
            key = other[0]
            raise ArtifactError(
                f"{path}: expected kernels trained like those of {paths[0]}, with {key} "
                f"{ours[key]}, got {theirs.get(key)}"
            )
        if again := sorted(kernels.keys() & part.layers.keys()):
            raise ArtifactError(
                f"{path}: expected other layers than the files before it, got layer {again[0]} "
                "again"
            )
        kernels |= part.layers
        errors |= part.config.get("errors", {})
    config = {**first.config, "errors": dict(sorted(errors.items(), key=lambda e: int(e[0])))}
    write_kernels(out, dict(sorted(kernels.items())), first.model, config, first.calibration)


_FREE = ("errors", "backend", "model")  # of a config: parts that go together may differ in these


def _identity(file: KernelsFile) -> dict[str, str]:
    return {"fingerprint": file.model, "calibration": file.calibration}


def _owners(engine: Engine, method: Method) -> list[int]:
    """The layer whose cache each layer reads, by the model's numbers."""
    store = engine.store(engine.make_cache(method))
    numbers, owners = layers_of(engine.shape), list(range(engine.shape.n_layers))
    for place, number in enumerate(numbers):
        owners[number] = numbers[store.owner(place)]
    return owners


def _stored(kernels: Kernels) -> Kernels:
    """As they are kept: the large maps in half precision, the rest as it came."""
    large = (x.astype(np.float16) for x in kernels[:4])
    return Kernels(*[*large, *kernels[4:]])


def _claim(work: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or finds that of the same run.

    Raises:
        ConfigError: If another run's layers are in it, or it cannot be made.
    """
    path, text = work / "run.json", json.dumps(settings, indent=1, sort_keys=True)
    try:
        work.mkdir(exist_ok=True)
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{work}: cannot work there: {error}") from None
    if before is None:
        write_whole(path, text.encode())
    elif before != json.loads(text):
        other = next(k for k in {**before, **settings} if before.get(k) != settings.get(k))
        raise ConfigError(
            f"{work}: expected layers of this run, got those of one with {other} "
            f"{before.get(other)} in place of {settings.get(other)}; remove it, or take another "
            "--out"
        )
