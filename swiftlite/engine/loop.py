"""The step loop: one thread that takes what came in, makes a step (step.py), and begins again; and the books of all requests.

Invariants: only the loop's thread touches the scheduler, the blocks and a request's state; a request is marked finished only
after its blocks and its adapter reference are given back; a failing request ends alone, and the loop goes on whatever happens;
when nothing runs, every block is free.

It does not know what a step is made of, text, tokenizers, devices or how requests are checked.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.scheduler import Scheduler
from swiftlite.engine.sequence import Request
from swiftlite.engine.signal import wake
from swiftlite.engine.step import Model, Stepper
from swiftlite.errors import OverloadError, RequestError

if TYPE_CHECKING:
    from swiftlite.engine.lora import AdapterVersion
    from swiftlite.engine.lora_store import Weights

logger = logging.getLogger("swiftlite.engine")
MAX_FAILED_STEPS = 3  # in a row; then the loop calls itself unhealthy
T = TypeVar("T")


class Adapters(Protocol):
    """What the loop needs of `lora.LoraManager`."""

    def seat(self, version: AdapterVersion, waiter: Callable[[Weights | None, str], None]) -> Weights | None: ...

    def leave(self, seat: Weights | None) -> None: ...

    def release(self, version: AdapterVersion) -> None: ...


class StepLoop:
    """Runs requests on a model in one thread, which starts with the first request."""

    def __init__(self, model: Model, config: EngineConfig, adapters: Adapters, begin: Callable[[], None]) -> None:
        """`begin` is called first in the loop's thread."""
        self._adapters, self._begin = adapters, begin
        self.counters: dict[str, float] = dict.fromkeys(
            ("steps", "failed_steps", "requests", "finished_requests", "failed_requests", "prompt_tokens", "cached_tokens",
             "generated_tokens", "preemptions", "draft_tokens", "accepted_tokens", "allocated_slots", "empty_slots"), 0,
        )  # fmt: skip
        self._lock = threading.Condition()  # guards what callers and the loop share: the next four
        self._inbox: list[Callable[[], None]] = []
        self._requests: dict[str, Request] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._gone: deque[str] = deque()  # digests of adapters
        self._steps = Stepper(model, config, self.counters, self._end_request, self._finish)

    @property
    def scheduler(self) -> Scheduler:
        return self._steps.scheduler

    # -- called from any thread

    @property
    def healthy(self) -> bool:
        """It takes requests, and the last steps did not all fail."""
        return not self._stopping and self._steps.failures < MAX_FAILED_STEPS

    def add(self, requests: SequenceOf[Request], limit: int | None = None) -> None:
        """Queue checked requests. With `limit`, OverloadError when so many wait already; RequestError for an id in use."""
        with self._lock:
            if self._stopping:
                raise RequestError("the engine is shut down")
            if taken := next((request.id for request in requests if request.id in self._requests), None):
                raise RequestError(f"a request {taken!r} is running already", fix="give each request its own id", param="request_id")
            waiting = len(self._requests) - self.scheduler.max_running
            if limit is not None and waiting >= limit:
                raise OverloadError(f"{waiting} requests are waiting", f"the queue holds {limit}", "try again later")
            for request in requests:
                self._requests[request.id] = request
                self._inbox.append(functools.partial(self._admit, request))
            self.counters["requests"] += len(requests)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="swiftlite-engine", daemon=True)
                self._thread.start()
            self._lock.notify()

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens when it is unknown or finished."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                self._inbox.append(functools.partial(self._end_request, request, "abort"))
                self._lock.notify()

    def between_steps(self, function: Callable[[], T]) -> T:
        """Run a function in the loop's thread, between two steps, and return what it returns."""
        done = threading.Event()
        result: list[T] = []
        error: list[BaseException] = []

        def call() -> None:
            try:
                result.append(function())
            except BaseException as caught:
                error.append(caught)
            done.set()

        with self._lock:
            if self._thread is None:
                return function()
            self._inbox.append(call)
            self._lock.notify()
        done.wait()
        if error:
            raise error[0]
        return result[0]

    def adapter_gone(self, digest: str) -> None:
        """Nobody uses these weights any more: their cached prefixes go at the next step, or with `poke` at once. Takes no lock."""
        self._gone.append(digest)

    def poke(self) -> None:
        """Let an idle loop look round."""
        with self._lock:
            self._lock.notify()

    def stop(self) -> None:
        """Abort everything and end the thread. Safe to call twice."""
        with self._lock:
            self._stopping = True
            thread = self._thread
            self._lock.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def stats(self) -> dict[str, float]:
        """Counters since the start and gauges of this moment."""
        scheduler = self.scheduler
        gauges = {
            "running": len(scheduler.running), "waiting": max(0, len(self._requests) - len(scheduler.running)),
            "total_blocks": scheduler.pool.num_blocks, "free_blocks": scheduler.pool.num_free,
            "cached_blocks": scheduler.pool.num_cached,
            "kv_waste": self.counters["empty_slots"] / max(1, self.counters["allocated_slots"]),  # share of the slots of used blocks
        }  # fmt: skip
        return {**self.counters, **gauges, "preemptions": self.counters["preemptions"] + scheduler.num_preemptions}

    def adapters_held(self) -> list[AdapterVersion]:
        """The adapter of each unfinished request that has one."""
        with self._lock:
            return [request.adapter for request in self._requests.values() if request.adapter is not None]

    def check(self) -> None:
        """AssertionError when blocks and sequences disagree. Between steps only (see `between_steps`)."""
        self.scheduler.check()
        if not self._requests:
            assert self.scheduler.idle, "sequences without a request"
            assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks, "nothing runs, but blocks are held"

    # -- the loop's thread

    def _run(self) -> None:
        self._begin()
        with torch.inference_mode():
            while True:
                with self._lock:
                    while not self._inbox and not self._stopping and self._steps.idle:
                        self._forget_gone()
                        self._look_for_leaks()
                        self._lock.wait()
                    inbox, self._inbox = self._inbox, []
                    if self._stopping:
                        break
                try:
                    for message in inbox:
                        message()
                    self._forget_gone()
                    if not self._steps.idle:
                        self._steps.step()
                except Exception as error:  # a bug of ours: give up what runs, not the engine
                    logger.exception("the step loop failed; all its requests end with an error")
                    self._reset(error)
        for request in list(self._requests.values()):  # not under the lock: ending a request wakes its readers, who have locks too
            self._end_request(request, "abort")
        with self._lock:
            for message in [*inbox, *self._inbox]:
                message()
            self._inbox, self._thread = [], None

    def _admit(self, request: Request) -> None:
        """Hand a request to the scheduler once its adapter's weights are there."""
        if request.finished:
            return
        if request.adapter is not None and request.seat is None:
            request.seat = self._adapters.seat(request.adapter, functools.partial(self._seat_came, request))
            if request.seat is None:
                return
        self.scheduler.add(request.beam.beams[0] if request.beam is not None else request.sequences[0])

    def _seat_came(self, request: Request, seat: Weights | None, error: str) -> None:
        """Called by the adapters' loader, in its thread."""
        with self._lock:
            self._inbox.append(functools.partial(self._sit, request, seat, error))
            self._lock.notify()

    def _sit(self, request: Request, seat: Weights | None, error: str) -> None:
        if request.finished:  # aborted while it waited
            self._adapters.leave(seat)
        elif seat is None:
            self._end_request(request, "error", error)
        else:
            request.seat = seat
            self._admit(request)

    def _forget_gone(self) -> None:
        while self._gone:
            pool = self.scheduler.pool
            pool.forget_root(pool.root(self._gone.popleft()))

    def _look_for_leaks(self) -> None:
        pool = self.scheduler.pool
        if not self._requests and pool.num_free != pool.num_blocks:
            logger.error("nothing runs, but %d blocks are held: please report this", pool.num_blocks - pool.num_free)
            self._steps.start_over()

    def _reset(self, error: Exception) -> None:
        message = f"the engine failed: {type(error).__name__}: {error}"
        self._steps.count_failure()
        self._steps.start_over()
        for request in list(self._requests.values()):
            for seq in (*request.sequences, *(request.beam.beams if request.beam is not None else ())):
                seq.block_table, seq.running = [], False
            request.beam = None  # its search may be what failed, and would again
            self._end_request(request, "error", message)

    def _end_request(self, request: Request, reason: str, error: str | None = None) -> None:
        """End whatever of a request still goes on, at any stage."""
        if request.finished:
            return
        if request.beam is not None:
            self.scheduler.remove(request.beam.beams)
            request.beam.settle(reason)
        request.error = error
        live = [seq for seq in request.sequences if seq.finish_reason is None]
        self.scheduler.remove(live)
        for seq in live:
            if request.params.stop:
                seq.detok.finish()
            seq.finish_reason = reason
        if error is not None:
            self.counters["failed_requests"] += 1
        self._finish(request)

    def _finish(self, request: Request) -> None:
        if request.adapter is not None:
            self._adapters.leave(request.seat)
            self._adapters.release(request.adapter)
        with self._lock:
            del self._requests[request.id]
        self.counters["finished_requests"] += 1
        request.finished_at = time.monotonic()
        request.version += 1
        request.finished = True
        wake([request.signal])


def shut_down(loop: Any) -> None:
    """For atexit: stop the loop behind a weak reference while torch still works."""
    if (live := loop()) is not None:
        live.stop()
