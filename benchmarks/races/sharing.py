"""Layers that share: what KVSharer at 25 % saves in time and bytes, what MiniCache in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.races.generate import row as generation
from benchmarks.races.inputs import COSINE, fill, store_error
from benchmarks.races.lab import Lab, shape_fields
from benchmarks.races.rows import Row, Task
from benchmarks.races.sizes import LLAMA3_8B
from benchmarks.races.step import dense_bytes
from kvc.backends.torch.projections import free_projections
from kvc.methods import KVSharer, Method, method_of, parse
from kvc.ops.dispatch import mode

MERGED = ("minicache+kivi", "minicache+gear-l", "minicache")


def quarter(n_layers: int) -> str:
    """A map in which a quarter of the layers, behind the middle, read those a quarter before."""
    n = n_layers // 4
    return ",".join(f"{layer}:{layer - n}" for layer in range(n_layers // 2, n_layers // 2 + n))


def sharer(lab: Lab, arm: str) -> Row:
    """A generation; `freed` has no weights any more for the projections that do not run."""
    text = lab.sizes.shared
    model = lab.model(text.model)
    method = Method()
    if arm != "dense":
        method = method_of(KVSharer(quarter(model.config.num_hidden_layers)))
    before = lab.device.held()
    if arm == "freed":
        free_projections(model, lab.cache(model, method).sharers)
        lab.device.tidy()
    freed = before - lab.device.held()
    found = generation(lab, text, method)
    if arm == "freed":
        lab.forget_model()
    return found | {"freed_bytes": freed}


def merged(lab: Lab, how: str, start: int) -> Row:
    """Bytes of a store whose layers are alike as MiniCache's authors report; bits are four."""
    settings = {"gear.bits": 4} if "+" in how else {}
    method = parse(how, {**settings, "minicache.start": start})
    n = lab.sizes.merged
    of, model = shape_fields(lab, LLAMA3_8B, 1, n), lab.model(LLAMA3_8B)
    cache = lab.cache(model, method)
    with mode("reference"):
        fill(lab, cache.store, of["kv_heads"], of["head_dim"], 1, n)
        off = store_error(lab, cache.store, of["heads"])
    report = cache.store.report()
    used = report.nbytes - report.parts.get("slack", 0)
    dense = dense_bytes(lab, LLAMA3_8B, 1, n + 1)
    return {
        **of,
        "mode": "reference",
        "start": start,
        "cosine": COSINE,
        "cache_bytes": used,
        "dense_bytes": dense,
        "ratio": dense / used,
        "parts": report.parts,
        "error": off,
    }


def race(lab: Lab) -> Iterator[Task]:
    """MiniCache's bytes, then KVSharer; freed weights last, since they are gone for good."""
    half = lab.sizes.models[LLAMA3_8B]["num_hidden_layers"] // 2
    for how in MERGED:
        for start in (half, 0):
            key = f"{how} from layer {start}"
            yield Task(key, partial(merged, lab, how, start))
    shared = lab.sizes.shared
    for arm in ("dense", "shared", "freed"):
        key = f"kvsharer {shared.model} {shared.batch} x {shared.n} + {shared.new} {arm}"
        yield Task(key, partial(sharer, lab, arm))
