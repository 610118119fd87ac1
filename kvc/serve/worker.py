"""The thread that has the model: it loads it, and no other touches its arrays.

Arrays of MLX that one thread makes cannot be evaluated in another. So everything of the model's,
from loading to the last file, happens here; jobs come in by a queue with a bound.
"""

from __future__ import annotations

import contextvars
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvc.errors import KVCError
from kvc.serve.errors import APIError
from kvc.serve.jobs import Job, Run, Update
from kvc.serve.stops import Stops

if TYPE_CHECKING:
    from kvc.backends.sequences import Batch, Event
    from kvc.serve.metrics import Metrics
    from kvc.serve.model import Model
    from kvc.serve.prefixes import Prefixes

LOG = logging.getLogger("uvicorn.error")
IDLE = 5.0  # seconds without work after which memory is given back


class Worker:
    """Runs jobs in a thread of its own, as many at a time as the batch takes.

    Args:
        load: Makes the model, in that thread.
        max_waiting: How many jobs may wait for their turn.
        metrics: Counts what happens.
    """

    def __init__(self, load: Callable[[], Model], max_waiting: int, metrics: Metrics) -> None:
        self.load, self.max_waiting, self.metrics = load, max_waiting, metrics
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Run] = {}
        self._closing = self._ended = False
        self._limit = 1
        self._mean = 1.0  # seconds that a job takes, lately
        self._loaded: Future[Model] = Future()
        # The thread sees the caller's context variables, such as the choice of kernels.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._main,), daemon=True)

    def start(self) -> Model:
        """Loads the model and returns it; nobody but this worker may run it.

        Raises:
            KVCError: As loading does.
        """
        self._thread.start()
        return self._loaded.result()

    @property
    def prefixes(self) -> Prefixes | None:
        """The stored caches, of which others may ask the numbers."""
        return self._loaded.result().prefixes

    @property
    def alive(self) -> bool:
        """Whether jobs will be done."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs are in the batch."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            APIError: 429 where the queue is full, 503 where the server ends.
        """
        with self._wake:
            if not self.alive:
                raise APIError(503, "the server is shutting down", code="unavailable")
            ahead = len(self._waiting) + len(self._running)
            if ahead >= self._limit + self.max_waiting:
                seconds = max(1, round(self._mean * ahead / self._limit))
                raise APIError(
                    429,
                    f"{ahead} requests are ahead of this one, as many as may be; try again later",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job at any stage, without another update; one that is over is no error."""
        with self._wake:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.cancelled.inc()
            self._wake.notify()

    def close(self) -> None:
        """Cancels what runs or waits, keeps stored caches if there is a place, and ends."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _main(self) -> None:
        try:
            model = self.load()
            batch = model.batch()
        except BaseException as error:  # raised again in the thread that waits for it
            self._loaded.set_exception(error)
            return
        # What is loaded stays: looking for cycles is quick without it.
        gc.collect()
        gc.freeze()
        self._limit = batch.batch_limit
        self._loaded.set_result(model)
        try:
            while self._turn(model, batch):
                try:
                    self._step(model, batch)
                except Exception as error:  # of a library, or for want of memory
                    LOG.warning("the batch failed; a new one is made")
                    self._fail_running(error)
                    batch = model.batch()
            if model.prefixes is not None and model.prefixes.shelf is not None:
                LOG.info("%d caches of prompts are kept in files", model.prefixes.spill())
        finally:
            gc.unfreeze()
            with self._wake:
                self._closing = True
                left = [*self._waiting, *(run.job for run in self._running.values())]
                self._waiting.clear()
                self._running.clear()
            for job in left:
                job.deliver(Update(error=APIError(503, "the server ended", code="unavailable")))
            model.close()

    def _step(self, model: Model, batch: Batch) -> None:
        """One step; while the worker waits, nothing here holds on to a cache."""
        for event in batch.step():
            self._take(model, batch, event)

    def _turn(self, model: Model, batch: Batch) -> bool:
        """Waits for something to do and brings the batch up to date; False at the end."""
        if self._ended:
            # A cache of transformers and its layers know each other, and would live on for long.
            self._ended = False
            gc.collect()
        if not self._called(IDLE):
            model.rest()
            self._called(None)
        with self._wake:
            if self._closing:
                return False
            room = max(0, self._limit - len(self._running))
            jobs = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            gone = [key for key, run in self._running.items() if run.job.cancelled]
        for key in gone:
            del self._running[key]
            batch.remove(key)
            self._ended = True
            self.metrics.cancelled.inc()
        for job in jobs:
            try:
                self._begin(model, batch, job)
            except Exception as error:
                job.deliver(Update(error=_failure(error)))
        return True

    def _called(self, seconds: float | None) -> bool:
        """Waits so long at most for something to do; whether there is something."""
        with self._wake:
            return bool(
                self._wake.wait_for(
                    lambda: self._waiting or self._running or self._closing, seconds
                )
            )

    def _begin(self, model: Model, batch: Batch, job: Job) -> None:
        """Puts a job into the batch, behind the longest beginning of its prompt that is stored."""
        prefixes = model.prefixes
        stored = prefixes.find(job.ids) if prefixes is not None else None
        start, cache = stored or (0, model.cache())
        cuts = prefixes.cuts(job.ids, start, job.cuts) if prefixes is not None else []
        borders = [start, *cuts, len(job.ids)]
        segments = [job.ids[a:b] for a, b in pairwise(borders)]
        key = batch.add(
            segments,
            cache,
            max_tokens=job.max_tokens,
            temp=job.temp,
            top_p=job.top_p,
            seed=job.seed,
        )
        self._running[key] = Run(job, cuts, start, Stops(job.stop))
        self.metrics.tokens.labels("cached").inc(start)
        self.metrics.tokens.labels("prompt").inc(len(job.ids) - start)

    def _take(self, model: Model, batch: Batch, event: Event) -> None:
        """Passes on what a step has done for one job."""
        run = self._running.get(event.key)
        if run is None:
            return
        job = run.job
        if event.kind == "segment" and event.index < len(run.cuts):
            _keep(model, job.ids[: run.cuts[event.index]], event.cache)
        elif event.kind == "token" and event.piece is not None:
            if not run.generated:
                self.metrics.first_token.observe(time.perf_counter() - job.created)
            run.generated += 1
            text = run.stops.add(event.piece.text)
            if text:
                job.deliver(Update(text))
            # without an end of its own here, the sequence's is in this very step
            if run.stops.found and (end := batch.remove(event.key)):
                self._finish(model, run, end)
        elif event.kind == "end":
            self._finish(model, run, event)
        elif event.kind == "error" and event.error is not None:
            self._end(event.key, Update(error=_failure(event.error)))

    def _finish(self, model: Model, run: Run, end: Event) -> None:
        """Ends a job whose cache is whole, and stores that."""
        stopped, ids = run.stops.found, run.job.ids[: run.start] + list(end.ids)
        counts = run.counts(model.report(end.cache))
        text = "" if stopped else run.stops.rest()
        self._end(end.key, Update(text, "stop" if stopped else end.finish, counts))
        _keep(model, ids, end.cache)

    def _end(self, key: int, update: Update) -> None:
        run = self._running.pop(key)
        self._ended = True
        seconds = time.perf_counter() - run.job.created
        self._mean += (seconds - self._mean) / 8
        self.metrics.seconds.observe(seconds)
        self.metrics.tokens.labels("generated").inc(run.generated)
        run.job.deliver(update)

    def _fail_running(self, error: Exception) -> None:
        for key in list(self._running):
            self._end(key, Update(error=_failure(error)))


def _keep(model: Model, ids: list[int], cache: Any) -> None:
    """Stores a cache; that it fails concerns no job."""
    if model.prefixes is None:
        return
    try:
        model.settle(cache)
        model.prefixes.put(ids, cache)
    except Exception:  # of a library, or for want of memory
        LOG.exception("a cache of %d tokens is not kept", len(ids))


def _failure(error: Exception) -> APIError:
    """What a client hears of an error; others' are in the server's log alone."""
    if isinstance(error, KVCError):
        return APIError(500, str(error), code="failed")
    LOG.error("a job failed", exc_info=error)
    return APIError(500, "the server failed; see its log", code="failed")
