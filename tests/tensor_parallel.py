"""Greedy tokens of every method in one process, or in each of several that share a model's heads.

`python -m tests.tensor_parallel LIBRARY FOLDER` prints a JSON line from the first process; torchrun
and mlx.launch start it in several.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kvc
from kvc.errors import KVCError
from kvc.files import write_kernels
from kvc.methods import parse
from kvc.ops.evict import Kernels
from tests.settings import lossy

LAYERS, HEADS, KV_HEADS, D, VOCAB = 4, 8, 4, 8, 97
PROMPT, NEW = 50, 10
HELD = [1, 2, 3]  # tokens of a cache in a file
SOME = {"gear.outliers": 0.1}  # so that rows as short as these have some
OUTLIERS = {"gear-s", "gear", "gear2", "minicache+gear", "kvsharer+gear"}
METHODS = {
    "none": {},
    **{name: {**given, **(SOME if name in OUTLIERS else {})} for name, given in lossy(8).items()},
}


def prepare(folder: Path) -> None:
    """Writes a small model, kernels of LESS for it and a file of a cache into a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvc.backends.torch.cache import shape_of

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=HEADS * D, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCAB,
        max_position_embeddings=512, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    theta = saved["rope_parameters"]["rope_theta"]  # mlx-lm looks for it at the top level
    path.write_text(json.dumps({**saved, "rope_theta": theta}))
    rng = np.random.default_rng(0)
    wide = [(HEADS, D, 8), (HEADS, 8, 4), (KV_HEADS, D, 8), (KV_HEADS, 8, 4)]
    shapes = [*wide, (KV_HEADS, 4, 4), (KV_HEADS, 4), (KV_HEADS, 4)]
    maps = {
        layer: Kernels(*(0.3 * rng.standard_normal(s).astype("f4") for s in shapes))
        for layer in range(LAYERS)
    }
    write_kernels(folder / "kernels.safetensors", maps, shape_of(model).fingerprint, {})
    cache = kvc.make_cache(model, "none")
    model(torch.tensor([HELD]), past_key_values=cache)
    kvc.save_cache(cache, folder / "held.kvc", HELD, model=model)


class Torch:
    """A model of transformers, under torchrun split by `tp_plan`."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.torch, self.first = torch, os.environ.get("RANK", "0") == "0"
        split = {"tp_plan": "auto"} if "RANK" in os.environ else {}
        if split:
            torch.distributed.init_process_group("gloo")
        self.model = LlamaForCausalLM.from_pretrained(folder, **split)

    def run(self, ids: list[int], cache: Any) -> list[int]:
        """New tokens."""
        out = self.model.generate(
            self.torch.tensor([ids]), past_key_values=cache, max_new_tokens=NEW, do_sample=False
        )
        found: list[int] = out[0, len(ids) :].tolist()
        return found

    def end(self) -> None:
        """Leaves the others."""
        if self.torch.distributed.is_initialized():
            self.torch.distributed.destroy_process_group()


class MLX:
    """A model of mlx-lm, under mlx.launch split by its own `shard`."""

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        group = mx.distributed.init()
        self.mx, self.first = mx, group.rank() == 0
        self.model, _ = load_model(folder, lazy=True)
        if group.size() > 1:
            self.model.shard(group)
        mx.eval(self.model.parameters())

    def run(self, ids: list[int], cache: Any) -> list[int]:
        """New tokens."""
        from mlx_lm.generate import generate_step

        steps = generate_step(self.mx.array(ids), self.model, prompt_cache=cache, max_tokens=NEW)
        return [int(token) for token, _ in steps]

    def end(self) -> None:
        """Nothing is to be left."""


def refused(model: Any, folder: Path) -> list[str]:
    """What is said of requests that need all heads, where it is refused."""
    cache = kvc.make_cache(model, "none")
    token = parse("minicache", {"granularity": "token"})
    requests: list[Callable[[], Any]] = [
        lambda: kvc.load_cache(model, folder / "held.kvc"),
        lambda: kvc.save_cache(cache, folder / "no.kvc", HELD, model=model),
        lambda: kvc.make_cache(model, token),
        lambda: kvc.make_cache(model, "kcvt", graph=True),
    ]
    found = []
    for request in requests:
        try:
            request()
        except KVCError as error:
            found.append(str(error))
    return found


def main(library: str, folder: Path) -> None:
    """Runs every method."""
    lab = {"torch": Torch, "mlx": MLX}[library](folder)
    kernels = str(folder / "kernels.safetensors")
    ids = [(i * i + 11 * i) % VOCAB for i in range(PROMPT)]
    found: dict[str, Any] = {}
    for name, given in METHODS.items():
        settings = {k: kernels if v == "KERNELS" else v for k, v in given.items()}
        cache = kvc.make_cache(lab.model, parse(name, settings))
        tokens = lab.run(ids, cache)
        found[name] = {"tokens": tokens, "parts": kvc.report(cache).parts}
    found["refused"] = refused(lab.model, folder)
    if lab.first:
        print(json.dumps(found), flush=True)
    lab.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
