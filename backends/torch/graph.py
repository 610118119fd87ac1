"""Steps of decoding that are recorded once, as a CUDA graph, and replayed.

A step of one token launches the same kernels on the same buffers as the step before it; only counts
differ, and those are on the device (`kvc.store.clock`). The host then starts one graph in place of
some hundred kernels. What is due is compressed before, by launches of its own. Other calls run as
ever: prompts, and the first steps after buffers have grown.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from kvc.errors import ConfigError
from kvc.methods import Method, MiniCache
from kvc.store.clock import Clock
from kvc.store.tokens import Tokens

if TYPE_CHECKING:
    from kvc.backends.torch.entry import KVCCache

# Arguments of a step that say nothing new: the store knows padding, and one token has one logit.
KNOWN = {"attention_mask", "cache_position", "logits_to_keep", "past_key_values", "use_cache"}
TAKEN = {"input_ids", "position_ids"}

Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def why_not(model: PreTrainedModel, method: Method, mode: str, others: int) -> str | None:
    """Why steps of a model with a method cannot be recorded, or None.

    Args:
        model: The model.
        method: Of its cache.
        mode: How the model takes the cache; see `kvc.backends.torch.entry`.
        others: Layers that keep the library's own cache.
    """
    if model.device.type != "cuda":
        return f"a model on a CUDA GPU, got one on {model.device.type}"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "a model on one device, got one on several"
    if mode != "handle" or others:
        return "a model whose layers all read the compressed cache"
    return why_not_coded(method)


def why_not_coded(method: Method) -> str | None:
    """Why steps with a method cannot be recorded for any model, or None."""
    codec = method.codec
    if codec is None or method.memory or isinstance(method.layout, MiniCache):
        return "a method that codes whole buffers, such as gear; eviction and merging do not"
    if codec.value_window != "chunk":
        return "value_window=chunk, got a sliding window"
    return None


class Steps:
    """The recorded step of one cache, for one shape of the batch.

    Args:
        cache: What the step reads and writes.
        record: Takes a function, notes what it launches, and returns what replays that; the
            function runs once and launches nothing.
    """

    def __init__(self, cache: KVCCache, record: Recorder) -> None:
        self.cache, self.record = cache, record
        self.clocks: list[Clock] = []
        self._inputs: dict[str, torch.Tensor] = {}
        self._changes = -1  # of the store, when the clocks were set
        self._buffers: list[tuple[int, ...]] = []
        self._output: Any = None
        self._replay: Callable[[], None] | None = None

    def takes(self, given: dict[str, Any]) -> bool:
        """Whether these arguments of the model are a step that can be recorded."""
        ids, positions = given.get("input_ids"), given.get("position_ids")
        return (
            ids is not None
            and ids.shape[1] == 1
            and (positions is None or positions.shape[-1] == 1)
            and given.get("use_cache") is not False
            and given.get("return_dict") is not False
            and all(x is None or x is False for x in _rest(given))
            and bool(self.cache.store.units())
        )

    def _steady(self) -> bool:
        return all(isinstance(x, Tokens) and x.steady for x in self.cache.store.units())

    def __call__(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        """What `forward` returns for a step that is taken."""
        if not self._steady():
            self.cache.store.settle()
            if not self._steady():
                return forward(**given)
        same = self._take(given) & self._follow()
        if not same:
            # as it will be recorded, for kernels are compiled and loaded by the first launch
            self._replay = None
            self._run(forward)
        elif self._replay is None:
            self._replay = self._recorded(forward)
            self._replay()
        else:
            self.cache.store.advance()
            self._replay()
        for clock in self.clocks:
            clock.advance()
        self._changes = self.cache.store.changes
        values = self._output.items()
        new = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in values}
        return type(self._output)(**new)

    def _take(self, given: dict[str, Any]) -> bool:
        """Copies the inputs to where the graph reads them; whether that place is the same."""
        ids, positions = given["input_ids"], given.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids[:1], self.cache.store.length(0))
        new = {"input_ids": ids, "position_ids": positions}
        same = self._inputs.keys() == new.keys() and all(
            self._inputs[name].shape == x.shape for name, x in new.items()
        )
        if not same:
            self._inputs = {name: x.clone() for name, x in new.items()}
        for name, x in new.items():
            self._inputs[name].copy_(x)
        return same

    def _follow(self) -> bool:
        """Sets the clocks to the store's counts; whether its buffers are where they were."""
        store = self.cache.store
        if store.changes == self._changes:
            return True
        units = [unit for unit in store.units() if isinstance(unit, Tokens)]
        buffers = [(x.data_ptr(), *x.shape) for x in store.arrays()]
        if buffers == self._buffers and all(unit.clock in self.clocks for unit in units):
            for unit in units:
                assert unit.clock is not None
                unit.clock.set(unit.counts)
            return True
        found: dict[tuple[int, int], Clock] = {}
        for unit in units:  # those that count alike do so in all steps
            if unit.counts not in found:
                found[unit.counts] = Clock.of(unit.counts, unit.k.window.x)
            unit.clock = found[unit.counts]
        self.clocks, self._buffers = list(found.values()), buffers
        return False

    def _recorded(self, forward: Callable[..., Any]) -> Callable[[], None]:
        try:
            return self.record(lambda: self._run(forward))
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ConfigError(
                f"graph: this model's step cannot be recorded ({why}); make the cache without graph"
            ) from error

    def _run(self, forward: Callable[..., Any]) -> None:
        """One step by the clocks."""
        for clock in self.clocks:
            clock.on = True
        try:
            self._output = forward(**self._inputs, past_key_values=self.cache, use_cache=True)
        finally:
            for clock in self.clocks:
                clock.on = False
        for clock in self.clocks:
            clock.tick()


def _rest(given: dict[str, Any]) -> list[Any]:
    """Arguments that a recorded step does not have."""
    others = given.keys() - KNOWN - TAKEN - {"return_dict"}
    return [given[name] for name in others]


def record(run: Callable[[], None]) -> Callable[[], None]:
    """A `Recorder` of CUDA graphs.

    Raises:
        RuntimeError: If what runs waits for the device, or allocates outside the graph.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # of this thread alone: others may load models meanwhile
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def route(model: PreTrainedModel) -> None:
    """Lets the steps of caches that have some run by them; every other call runs as ever."""
    if "_kvc_forward" in vars(model):
        return
    vars(model)["_kvc_forward"] = vars(model).get("forward")
    vars(model)["forward"] = MethodType(_routed(type(model)), model)


def _routed(cls: type[PreTrainedModel]) -> Callable[..., Any]:
    names = list(inspect.signature(cls.forward).parameters)[1:]

    @functools.wraps(cls.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)["_kvc_forward"] or MethodType(cls.forward, self)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        steps = getattr(given.get("past_key_values"), "steps", None)
        if steps is None or len(args) > len(names) or not steps.takes(given):
            return own(*args, **kwargs)
        return steps(own, given)

    return forward
