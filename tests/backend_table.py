"""How far two backends agree on a model: `python -m tests.backend_table [MODEL] [KEY=VALUE ...]`.

PyTorch writes greedily; MLX is given the same tokens, so that a difference at one step does not
hide those of the next. Settings that every codec needs for a model, such as `gear.group_size=8`,
follow its path.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import kvc.demo
from kvc.api import load_engine
from kvc.backends.base import ModelShape, ops_of
from kvc.files import write_kernels
from kvc.methods import Method, parse
from kvc.ops.evict import Kernels
from tests.oracles.less_features import random_weights

CODECS = ("kivi", "kcvt", "token", "gear-l", "gear-s", "gear", "gear2")
EVICTING = ("streaming", "h2o", "tova", "less")
NAMES = (
    "none",
    *CODECS,
    *EVICTING,
    "minicache",
    "kvsharer",
    *(f"kvsharer+{name}" for name in (*CODECS, *EVICTING)),
    *(f"minicache+{name}" for name in CODECS),
    *(f"{name}+token" for name in EVICTING),
    "kvsharer+h2o+token",
)
PROMPT = """The code of Anna is 4821. The harbour lay still when the last boat came in, and the
keeper of the light counted three lamps along the mole before he climbed the stair. His daughter had
left the letter on the table, folded twice, with the seal of the customs house broken. He read it by
the window, slowly, as a man reads who has learned his letters late; then he put it into the stove
and watched the edges curl. The code of Peter is 1093. In the morning a stranger asked for him at
the inn, a tall woman in a grey coat, who paid in silver and spoke of the north. Nobody had seen her
arrive. She said that the winter would be long, that the price of oil had doubled in the capital,
and that somebody would have to answer for the ship. The old man listened, turned his cap in his
hands, and said nothing at all about the letter. The code of Anna is"""


@dataclass(frozen=True)
class Row:
    """One method on one model."""

    name: str
    prefill: str
    off: float  # largest difference of any logit at any step
    first: int | None  # step at which one first differs by more than 1e-4
    tokens: bool  # whether all greedy tokens are the same
    flips: int  # codes and choices that differ at the end
    n_codes: int

    def __str__(self) -> str:
        first = "-" if self.first is None else str(self.first)
        return (
            f"| `{self.name}` | {self.prefill} | {'same' if self.tokens else 'differ'} | "
            f"{self.off:.1e} | {first} | {self.flips} of {self.n_codes} |"
        )


def engines(model: str) -> list[Any]:
    """The model on PyTorch and on MLX, in float32."""
    return [load_engine(name, model, "float32") for name in ("cpu", "mlx")]


def method_of(name: str, shape: ModelShape, folder: Path, **settings: str) -> Method:
    """The method with what it needs for this model: a map, learned maps, groups that fit.

    LESS's maps are random, and large enough that the state is felt.
    """
    parts = name.split("+")
    owners = list(range(shape.n_layers))
    if "kvsharer" in parts:
        owners[-1] = shape.n_layers // 2 - 1
        settings["kvsharer.map"] = f"{shape.n_layers - 1}:{owners[-1]}"
    if "less" in parts:
        path = folder / "maps.safetensors"
        size = (shape.n_heads, shape.n_kv_heads, shape.head_dim, 32, 8)
        weights = random_weights(*size, seed=0, s1=0.05)
        fields = {name: getattr(weights, name).astype(np.float32) for name in Kernels._fields}
        layers = {i: Kernels(**fields) for i in range(shape.n_layers)}
        write_kernels(path, layers, shape.fingerprint, {"map": owners})
        settings["less.kernels"] = str(path)
    if "gear2" in parts:  # less than its 64 sinks and window of 128, which leave nothing to code
        settings |= {"gear.sink": "16", "gear.window": "32"}
    if not set(parts) & set(CODECS):
        settings = {key: value for key, value in settings.items() if not key.startswith("gear.")}
    return parse(name, settings)


def compare(engines: list[Any], method: Method, prefill: str, n: int, prompt: str = PROMPT) -> Row:
    """Writes `n` tokens behind a prompt on both engines."""
    torch, mx = import_module("torch"), import_module("mlx.core")
    ids = engines[0].encode(prompt)
    caches = [engine.make_cache(method, prefill) for engine in engines]
    step = 100 if prefill == "stream" else len(ids)

    def on_torch(part: list[int]) -> Any:
        with torch.no_grad():
            out = engines[0].model(torch.tensor([part]), past_key_values=caches[0], use_cache=True)
        return out.logits[0, -1].numpy()

    def on_mlx(part: list[int]) -> Any:
        return np.array(engines[1].model(mx.array([part]), cache=caches[1])[0, -1])

    for at in range(0, len(ids), step):
        logits = on_torch(ids[at : at + step])
    for at in range(0, len(ids) - 1, step):  # mlx-lm sends the last token of a prompt alone
        on_mlx(ids[at : min(at + step, len(ids) - 1)])
    others = on_mlx(ids[-1:])
    offs, same = [], True
    for _ in range(n):
        offs.append(float(np.abs(logits - others).max()))
        token = int(logits.argmax())
        same &= token == int(others.argmax())
        logits, others = on_torch([token]), on_mlx([token])
    flips, n_codes = _flips(*(e.store(c) for e, c in zip(engines, caches, strict=True)))
    first = next((i for i, off in enumerate(offs) if off > 1e-4), None)
    return Row(method.name, prefill, max(offs), first, same, flips, n_codes)


def _flips(a: Any, b: Any) -> tuple[int, int]:
    """Words of codes and other integers in which two stores differ, and how many there are."""
    pairs = [[_integers(x) for x in store.arrays()] for store in (a, b)]
    found = [(x, y) for x, y in zip(*pairs, strict=True) if x is not None]
    return sum(int((x != y).sum()) for x, y in found), sum(x.size for x, _ in found)


def _integers(x: Any) -> Any:
    x = np.asarray(ops_of(x).to_numpy(x))
    return x.view(f"i{x.itemsize}") if x.dtype.kind in "iu" else None


def main() -> None:
    """Prints the table."""
    model = sys.argv[1] if len(sys.argv) > 1 else str(kvc.demo.path())
    settings = dict(setting.split("=") for setting in sys.argv[2:])
    pair = engines(model)
    print("| method | prefill | tokens | logits differ by | above 1e-4 from step | flips |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            for prefill in ("exact", "stream"):
                method = method_of(name, pair[0].shape, Path(folder), **settings)
                print(compare(pair, method, prefill, 128), flush=True)


if __name__ == "__main__":
    main()
