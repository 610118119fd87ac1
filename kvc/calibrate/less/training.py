"""The training of a model's LESS kernels: layer after layer, each kept as soon as it is done."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvc.backends.base import Engine, ops_of
from kvc.calibrate.less.capture import Captured, capture, fitting
from kvc.calibrate.less.data import prepare
from kvc.calibrate.less.layer import Epoch, bare_error, epochs, more_tokens, plus_error
from kvc.calibrate.less.loss import Recipe, begin
from kvc.calibrate.rows import Rows
from kvc.calibrate.work import SCRATCH, work_folder
from kvc.errors import ArtifactError, ConfigError
from kvc.files import KernelsFile, read_kernels, write_kernels
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
    def method(self) -> Method:
        """What the model runs with while it is listened to."""
        return method_of(self.sharing) if self.sharing else Method()

    @property
    def config(self) -> dict[str, Any]:
        """What decides the result, but for the layers and the model."""
        return {
            "policy": self.less.policy,
            "heavy": int(self.less.heavy),
            "recent": int(self.less.recent),
            "normalize": self.less.normalize,
            "sequences": len(self.rows.ids),
            "length": self.rows.ids.shape[1],
            **asdict(self.recipe),
        }


def train_layers(engine: Engine, plan: Plan, out: Path, progress: Progress) -> None:
    """Trains the layers of a plan and writes their kernels to `out`.

    What is done is kept in a folder beside `out`, layer by layer; the same plan goes on from there
    and ends with the same kernels.

    Raises:
        ConfigError: If the budget leaves nothing to evict, the model's attention cannot be reached,
            another run has the folder, a layer's owner is not in the plan, or there is no room on
            disk.
        KVCError: If the model's activations do not fit half precision.
    """
    more = more_tokens(plan.less, plan.recipe.rank, engine.shape)
    if (c := int(more.heavy + more.recent)) > plan.rows.ids.shape[1] - 2:
        raise ConfigError(
            f"--budget: expected fewer tokens than a sequence has, got {c} of "
            f"{plan.rows.ids.shape[1]}, those that the state's bytes buy counted: nothing would be "
            "evicted; lower it, or raise --length"
        )
    engine.make_cache(method_of(plan.less))  # a model that could not use the kernels is refused
    owners = _owners(engine, plan.method)
    if apart := [layer for layer in plan.layers if owners[layer] not in plan.layers]:
        raise ConfigError(
            f"--layers: layer {apart[0]} reads the cache of layer {owners[apart[0]]}; train both "
            "in one part"
        )
    config = {
        **plan.config,
        "map": owners if plan.sharing else None,
        "weights": _weights(engine),
        "dtype": f"{8 * engine.shape.dtype_bytes} bits",
    }
    claim = {**config, "layers": list(plan.layers), "model": engine.shape.fingerprint}
    with work_folder(out, {**claim, "calibration": plan.rows.digest}) as work:
        files = {layer: work / f"layer-{layer}.safetensors" for layer in plan.layers}
        left = [layer for layer in plan.layers if not files[layer].exists()]
        while left:
            with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=work) as scratch:
                n = fitting(Path(scratch), len(left), engine.shape, plan.rows.ids.size)
                now, left = left[:n], left[n:]
                captured = _captured(engine, plan, now, Path(scratch), progress)
                for layer in now:
                    best = _train(engine, plan, layer, captured, files, Path(scratch), progress)
                    found = {str(layer): {**best.errors._asdict(), "epoch": best.best}}
                    made_by = {"model": plan.model, "backend": engine.name, "errors": found}
                    write_kernels(
                        files[layer],
                        {layer: _stored(best.kernels)},
                        engine.shape.fingerprint,
                        {**config, **made_by},
                        plan.rows.digest,
                    )
                del captured  # the files are open until then
        merge(list(files.values()), out)


def _captured(
    engine: Engine, plan: Plan, layers: Sequence[int], scratch: Path, progress: Progress
) -> dict[int, Captured]:
    rows = plan.rows.ids

    def on_row(done: int) -> None:
        progress.captured(done, len(rows))

    return capture(engine, plan.method, rows, layers, scratch, on_row)


def _train(
    engine: Engine,
    plan: Plan,
    layer: int,
    captured: Mapping[int, Captured],
    files: Mapping[int, Path],
    scratch: Path,
    progress: Progress,
) -> Epoch:
    """One layer; of one that shares a cache its owner's kernels are in `files`."""
    own = captured[layer]
    owner = captured[own.owner]
    project = engine.output_projection(layer)
    if project is None:  # one that is not known weighs all outputs alike
        like, width = own.query.q, own.q.shape[1] * own.q.shape[3]
        project = ops_of(like).from_numpy(np.eye(width, dtype=np.float32), like)
    data, mass = prepare(own, owner, plan.less, scratch, project)
    held_out = range(len(own.q) - max(1, len(own.q) // VALIDATION), len(own.q))
    more = more_tokens(plan.less, plan.recipe.rank, engine.shape)
    bare = bare_error(data, held_out, project)
    plus = plus_error(data, owner, more, held_out, project)
    start = begin(data, mass, plan.recipe, layer, project)
    if own is not owner:
        its = read_kernels(files[own.owner]).layers[own.owner]
        start = Kernels(*start[:2], *(x.astype(np.float32) for x in its[2:]))
    for epoch in epochs(
        data, start, bare, plus, held_out, plan.recipe, layer, project, own is not owner
    ):
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
    numbers, owners = engine.shape.full_layers, list(range(engine.shape.n_layers))
    for place, number in enumerate(numbers):
        owners[number] = numbers[store.owner(place)]
    return owners


def _stored(kernels: Kernels) -> Kernels:
    """As they are kept: the large maps in half precision, the rest as it came."""
    large = (x.astype(np.float16) for x in kernels[:4])
    return Kernels(*[*large, *kernels[4:]])


def _weights(engine: Engine) -> str:
    """A digest that tells models of one architecture apart: of the first output projection.

    In half precision, in which the same weights are the same in every backend and type.
    """
    matrix = engine.output_projection(engine.shape.full_layers[0])
    if matrix is None:
        return ""
    halves = ops_of(matrix).to_numpy(matrix).astype("<f2")
    return hashlib.sha256(halves.tobytes()).hexdigest()[:16]
