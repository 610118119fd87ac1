"""The device under the races: its clock, its memory, and the rate at which it copies."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from kvc.measure.peak import forget_peak, resident
from kvc.measure.speed.clock import Times

Run = Callable[[], Any]
DRY_RUNS = 3  # on the CPU, where no figure means anything


class Device:
    """A GPU, timed by its own events, or the CPU of a dry run, timed by the wall."""

    def __init__(self, name: str) -> None:
        self.name, self.title, self.at = name, "cpu", torch.device(name)
        self.on_gpu = name == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        if self.on_gpu:
            about = torch.cuda.get_device_properties(0)
            self.title = about.name
            n = 4 * getattr(about, "L2_cache_size", 64 << 20)
            self._spoiler = torch.empty(n, dtype=torch.uint8, device=self.at)

    def sync(self) -> None:
        """Waits until all is done."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def sample(
        self, run: Run, *, seconds: float = 0.4, least: int = 5, most: int = 100, cold: bool = True
    ) -> Times:
        """Times of a run that has run twice before; with `cold` from an L2 of other data."""
        run()
        self.sync()
        start = time.perf_counter()
        run()
        self.sync()
        once = time.perf_counter() - start
        n = int(min(max(seconds / once, least), most)) if self.on_gpu else DRY_RUNS
        return Times.of([ms / 1e3 for ms in self.events([run] * n, cold=cold)])

    def events(self, runs: Sequence[Run], *, cold: bool = False) -> list[float]:
        """Milliseconds of each run between events on the GPU, enqueued behind one another."""
        if not self.on_gpu:
            return [self.wall(run) for run in runs]
        marks = []
        for run in runs:
            if cold:
                self._spoiler.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks.append((start, end))
        self.sync()
        return [start.elapsed_time(end) for start, end in marks]

    def wall(self, run: Run) -> float:
        """Milliseconds until all that a run asks for is done."""
        self.sync()
        start = time.perf_counter()
        run()
        self.sync()
        return (time.perf_counter() - start) * 1e3

    def host(self, run: Run, n: int = 3) -> float:
        """Milliseconds that the CPU takes to ask for a run; the GPU has nothing else to do."""
        each = []
        for _ in range(n):
            self.sync()
            start = time.perf_counter()
            run()
            each.append((time.perf_counter() - start) * 1e3)
        self.sync()
        return statistics.median(each)

    def graph(self, run: Run) -> Run:
        """A replay of a run as one CUDA graph.

        Raises:
            RuntimeError: if it cannot be captured, or there is no GPU.
        """
        if not self.on_gpu:
            raise RuntimeError("there is no GPU")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a large copy on the device."""
        n = min(4 << 30, self.free() // 4) if self.on_gpu else 1 << 24
        x = torch.empty(n // 4, dtype=torch.int32, device=self.at).random_()
        y = torch.empty_like(x)
        return 2 * x.nbytes / self.sample(lambda: y.copy_(x), cold=False).median

    def free(self) -> int:
        """Bytes that can still be allocated."""
        if not self.on_gpu:
            return 1 << 40
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return torch.cuda.mem_get_info()[1] if self.on_gpu else 1 << 40

    def tidy(self) -> None:
        """Gives back what nothing refers to."""
        if self.on_gpu:
            gc.collect()  # a cache and its layers refer to each other
            torch.cuda.empty_cache()

    def held(self) -> int:
        """Bytes that are held now."""
        return torch.cuda.memory_allocated() if self.on_gpu else resident()

    def forget_peak(self) -> None:
        """Lets `peak` start again."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()

    def peak(self) -> int:
        """The most bytes that were held since `forget_peak`."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else resident(peak=True)

    def broken(self) -> str | None:
        """Why nothing runs on the device any more, as after an access outside memory; or None."""
        try:
            self.sync()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None
