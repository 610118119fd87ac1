"""What all races share: the device, models with random weights, and which kernels run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import kvc
from benchmarks.races.device import Device
from benchmarks.races.rows import Row
from benchmarks.races.sizes import Sizes
from kvc.backends.torch.graph import why_not_coded
from kvc.errors import KernelUnavailable
from kvc.measure.speed.clock import NotRaced
from kvc.methods import Method
from kvc.ops import dispatch
from kvc.ops.dispatch import Mode, mode


class Lab:
    """A device with its models, and the time that is left."""

    def __init__(self, device: Device, sizes: Sizes, wish: Mode, end: float) -> None:
        self.device, self.sizes, self.wish = device, sizes, wish
        self._end = end
        self._model: tuple[str, PreTrainedModel] | None = None

    def left(self) -> float:
        """Seconds until the race's time is up."""
        return self._end - time.monotonic()

    def model(self, name: str) -> PreTrainedModel:
        """A model of that shape with random weights; only the newest is held."""
        if self._model is None or self._model[0] != name:
            self._model = None
            self.device.tidy()
            config = LlamaConfig(**self.sizes.models[name], pad_token_id=0)
            config._attn_implementation = "sdpa"
            with self.device.at:
                model = AutoModelForCausalLM.from_config(config, dtype=self.device.dtype)
            self._model = (name, model.eval().requires_grad_(False))
        return self._model[1]

    def forget_model(self) -> None:
        """Frees the model, as one that a race has changed for good."""
        self._model = None
        self.device.tidy()

    def cache(
        self, model: PreTrainedModel, method: Method, prefill: str = "exact", graph: bool = False
    ) -> Any:
        """An empty cache of ours. The trial on the model runs the definitions."""
        with mode("reference"):
            return kvc.make_cache(model, method, prefill, graph=graph)

    def records(self, method: Method) -> bool:
        """Whether steps of a Llama with this method can be recorded here."""
        return self.device.on_gpu and why_not_coded(method) is None

    def randn(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Random numbers in the dtype of the caches."""
        generator = torch.Generator(self.device.at).manual_seed(seed)
        return torch.randn(
            shape, generator=generator, device=self.device.at, dtype=self.device.dtype
        )

    def need(self, nbytes: int) -> None:
        """That so much memory is free.

        Raises:
            NotRaced: if it is not.
        """
        free = self.device.free()
        if nbytes > free:
            raise NotRaced(f"needs {nbytes / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free")

    def in_mode(self, measure: Callable[[Mode], Row]) -> Row:
        """The row in mode fused; where an op has no kernel, that of the definitions, and why."""
        if self.wish == "fused":
            try:
                with mode("fused"):
                    return {"mode": "fused", **measure("fused")}
            except KernelUnavailable as error:
                why = str(error)
            self.device.tidy()
        else:
            why = "asked for"
        with mode("reference"):
            return {"mode": "reference", "no_kernel": why, **measure("reference")}

    @contextmanager
    def listed(self) -> Iterator[Row]:
        """Takes every kernel there is; the row says which ops ran their definition, and why.

        For whole prompts, of which kernels take a part. The mode is `fused` if they took all,
        `reference` if none, else `both`; `library` if no op was asked for.
        """
        asked, lacking = set[str](), dict[str, str]()
        why_no_kernel = dispatch.why_no_kernel

        def noted(op: str, *args: Any, **kwargs: Any) -> str | None:
            asked.add(op)
            why = why_no_kernel(op, *args, **kwargs)
            if why:
                lacking.setdefault(op, why)
            return why

        row: Row = {}
        if self.wish == "reference":
            with mode("reference"):
                yield row
            row.update(mode="reference", no_kernel="asked for")
            return
        with mode("auto"), patch.object(dispatch, "why_no_kernel", noted):
            yield row
        how = "both" if lacking else "fused" if asked else "library"
        if lacking and lacking.keys() == asked:
            how = "reference"
        row.update(mode=how, fused=sorted(asked - lacking.keys()), no_kernel=lacking)


@contextmanager
def interpreted() -> Iterator[bool]:
    """Whether kernels run here in Triton's interpreter; within the block they are not refused."""
    try:
        import triton

        import kvc.cuda_kernels
    except ImportError:
        yield False
        return
    asked = bool(triton.knobs.runtime.interpret) and not torch.cuda.is_available()
    unrefused = patch.object(kvc.cuda_kernels, "unavailable", lambda: None)
    with unrefused if asked else nullcontext():
        yield asked


def shape_fields(lab: Lab, name: str, batch: int, n: int) -> Row:
    """What is raced, as fields of a row."""
    config = lab.sizes.models[name]
    return {
        "model": name,
        "batch": batch,
        "tokens": n,
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "dtype": str(lab.device.dtype).removeprefix("torch."),
    }
