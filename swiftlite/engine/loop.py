"""The step loop: take what came in, schedule, run the model, sample, append, see who is done, wake the readers.

Invariants: only the loop's thread touches the scheduler, the blocks and a request's state; a request is marked finished only
after its blocks and its adapter reference are given back; a failing request ends alone, a failing step ends its batch with an
error, and the loop goes on; when nothing runs, every block is free.

It does not know text (but for stop strings, through the request's detokenizer), tokenizers, devices or how requests are checked.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from swiftlite.engine.blocks import BlockPool
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.request import Request, Sequence, TokenLogprob
from swiftlite.engine.sampler import Sampler, token_logprobs
from swiftlite.engine.scheduler import Scheduled, Scheduler
from swiftlite.engine.spec import count_accepted
from swiftlite.engine.stream import Signal, wake
from swiftlite.errors import OverloadError, RequestError

if TYPE_CHECKING:
    from swiftlite.engine.lora import AdapterVersion
    from swiftlite.engine.lora_store import Weights

logger = logging.getLogger("swiftlite.engine")
NOT_FINITE = "the model's logits are not finite (NaN or infinite)"
MAX_FAILED_STEPS = 3  # in a row; then the loop calls itself unhealthy
T = TypeVar("T")


class Model(Protocol):
    """What the loop needs of `runner.Runner`."""

    num_blocks: int

    def execute(self, scheduled: list[Scheduled]) -> Tensor: ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None: ...


@dataclass(slots=True)
class _Rows:
    """Which rows of a step's logits are whose."""

    sequences: list[Sequence] = field(default_factory=list)  # one for each token that is sampled; a draft's sequence several times
    where: list[int] = field(default_factory=list)  # their rows
    drafts: list[tuple[int, Scheduled]] = field(default_factory=list)  # place of a draft's first row in `sequences`
    beams: list[Sequence] = field(default_factory=list)
    beam_where: list[int] = field(default_factory=list)
    best: int = 0  # continuations that the beams want


class Adapters(Protocol):
    """What the loop needs of `lora.LoraManager`."""

    def seat(self, version: AdapterVersion, waiter: Callable[[Weights | None, str], None]) -> Weights | None: ...

    def leave(self, seat: Weights | None) -> None: ...

    def release(self, version: AdapterVersion) -> None: ...


class StepLoop:
    """Runs requests on a model in one thread, which starts with the first request."""

    def __init__(self, model: Model, config: EngineConfig, adapters: Adapters) -> None:
        self.model, self.config, self._adapters = model, config, adapters
        self.sampler = Sampler()
        self.counters = dict.fromkeys(
            ("steps", "failed_steps", "requests", "finished_requests", "failed_requests", "prompt_tokens", "cached_tokens",
             "generated_tokens", "preemptions", "draft_tokens", "accepted_tokens", "allocated_slots", "empty_slots"), 0,
        )  # fmt: skip
        self._lock = threading.Condition()  # guards what callers and the loop share: the next four
        self._inbox: list[Callable[[], None]] = []
        self._requests: dict[str, Request] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failures = 0  # steps in a row
        self._gone: deque[str] = deque()  # digests of adapters
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        pool = BlockPool(self.model.num_blocks, self.config.block_size, self.config.enable_prefix_caching)
        config = self.config
        return Scheduler(pool, config.max_num_seqs, config.max_num_batched_tokens, config.speculate_ngram)

    # -- called from any thread

    @property
    def healthy(self) -> bool:
        """It takes requests, and the last steps did not all fail."""
        return not self._stopping and self._failures < MAX_FAILED_STEPS

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
        with torch.inference_mode():
            while True:
                with self._lock:
                    while not self._inbox and not self._stopping and self.scheduler.idle:
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
                    if not self.scheduler.idle:
                        self._step()
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
            self.counters["preemptions"] += self.scheduler.num_preemptions
            self.scheduler = self._new_scheduler()

    def _reset(self, error: Exception) -> None:
        message = f"the engine failed: {type(error).__name__}: {error}"
        self._failures += 1
        self.counters["failed_steps"] += 1
        self.counters["preemptions"] += self.scheduler.num_preemptions
        self.scheduler = self._new_scheduler()
        for request in list(self._requests.values()):
            for seq in (*request.sequences, *(request.beam.beams if request.beam is not None else ())):
                seq.block_table, seq.running = [], False
            self._end_request(request, "error", message)

    def _step(self) -> None:
        scheduler = self.scheduler
        batch = scheduler.schedule()
        assert batch, "there is work, but nothing was scheduled"
        self.counters["steps"] += 1
        try:
            if scheduler.copies:
                self.model.copy_blocks(scheduler.copies)
            logits = self.model.execute(batch)  # [S, V]
            rows = self._rows(batch, logits)
            allocated, empty = scheduler.count_slots()
            self.counters["allocated_slots"] += allocated
            self.counters["empty_slots"] += empty
            best = self.sampler.best(logits[rows.beam_where], [b.sampling for b in rows.beams], rows.best) if rows.beams else None
            if rows.where and (len(rows.where) != len(logits) or rows.where[-1] != len(logits) - 1):
                logits = logits[rows.where]  # some rows are of prompts, of beams, or of siblings that start together
            tokens, logprobs = self.sampler.sample(logits, [seq.sampling for seq in rows.sequences]) if rows.where else ([], [])
        except Exception as error:
            logger.exception("a step failed; its %d requests end with an error", len(batch))
            self._failures += 1
            self.counters["failed_steps"] += 1
            for item in batch:
                self._end_request(item.seq.request, "error", f"the step failed: {type(error).__name__}: {error}")
            return
        self._failures = 0
        if best is not None:
            self._search(rows.beams, *best)
        if rows.drafts:
            self._drop_rejected(rows, tokens, logprobs)
        if rows.sequences:
            self._append(rows.sequences, tokens, logprobs)
        for _, item in rows.drafts:
            if item.seq.running:
                scheduler.keep(item.seq)

    def _rows(self, batch: list[Scheduled], logits: Tensor) -> _Rows:
        """Who gets a token now, from which rows of `logits`; starts the siblings of finished prompts."""
        scheduler = self.scheduler
        rows = _Rows()
        end = 0
        for item in batch:
            scheduler.done(item)
            end += item.rows
            seq, request = item.seq, item.seq.request
            if request.finished or not item.rows:  # the prompt goes on in the next step
                continue
            if request.prompt_logprobs is not None and seq.index == 0 and len(request.prompt_logprobs) < seq.prompt_len:
                self._note_prompt(item, logits[end - item.rows : end])
            if item.start + item.count < len(seq.token_ids):
                continue
            if len(seq.token_ids) >= seq.max_len:  # max_tokens 0: only the prompt was asked for
                self._end_request(request, "length")
                continue
            if seq.text_end == 0 and request.first_token == 0:
                self.counters["prompt_tokens"] += seq.prompt_len
                self.counters["cached_tokens"] += seq.num_cached
                request.sequences[0].num_cached = seq.num_cached
            if request.beam is not None:
                rows.beams.append(seq)
                rows.beam_where.append(end - 1)
                rows.best = max(rows.best, request.beam.candidates)
                continue
            if item.draft:
                rows.drafts.append((len(rows.where), item))
            count = 1 + len(item.draft)
            rows.sequences += [seq] * count
            rows.where += range(end - count, end)
            if request.siblings_pending:
                request.siblings_pending = False
                started = [sibling for sibling in request.sequences[1:] if scheduler.fork(seq, sibling)]
                rows.sequences += started
                rows.where += [end - 1] * len(started)
        return rows

    def _drop_rejected(self, rows: _Rows, tokens: list[int], logprobs: list[TokenLogprob | None]) -> None:
        """Take the rows after each draft's first wrong token out of all three lists."""
        for start, item in reversed(rows.drafts):
            accepted = count_accepted(item.draft, tokens[start : start + item.rows])
            for values in (rows.sequences, tokens, logprobs):
                del values[start + accepted + 1 : start + item.rows]
            self.counters["draft_tokens"] += len(item.draft)
            self.counters["accepted_tokens"] += accepted
            assert item.seq.ngrams is not None
            item.seq.ngrams.learn(len(item.draft), accepted, self.config.speculate_ngram)

    def _search(self, beams: list[Sequence], tokens: list[list[int]], values: list[list[float]]) -> None:
        """Hand each beam its best continuations; searches that have all of theirs go one token further."""
        now = time.monotonic()
        for beam, best, scores in zip(beams, tokens, values, strict=True):
            request = beam.request
            assert request.beam is not None
            if request.finished:  # a sibling failed a moment ago
                continue
            if math.isnan(scores[0]):
                self._end_request(request, "error", NOT_FINITE)
                continue
            self.counters["generated_tokens"] += 1
            request.first_token = request.first_token or now
            if request.beam.take(beam, best, scores) and not request.beam.advance(self.scheduler):
                request.beam.settle()
                self._finish(request)

    @staticmethod
    def _note_prompt(item: Scheduled, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens that the item's logits rows [rows, V] predict."""
        seq = item.seq
        known = seq.request.prompt_logprobs
        assert known is not None
        first = item.start + item.count - item.rows  # position of the first row; it predicts the next token
        targets = seq.token_ids[len(known) : min(item.start + item.count + 1, seq.prompt_len)]
        skip = len(known) - 1 - first
        if targets:
            count = seq.request.params.prompt_logprobs or 0
            known += token_logprobs(logits[skip : skip + len(targets)].float(), targets, [count] * len(targets))

    def _append(self, rows: list[Sequence], tokens: list[int], logprobs: list[TokenLogprob | None]) -> None:
        """Give each sequence its token; end those that are done."""
        now = time.monotonic()
        ended: list[Sequence] = []
        signals: list[Signal] = []
        for index, (seq, token) in enumerate(zip(rows, tokens, strict=True)):
            request = seq.request
            if request.finished or seq.finish_reason is not None:  # a sibling failed, or an accepted draft's token was the last
                continue
            if token < 0:
                self._end_request(request, "error", NOT_FINITE)
                continue
            self.counters["generated_tokens"] += 1
            seq.token_ids.append(token)
            if logprobs and (entry := logprobs[index]) is not None and seq.logprobs is not None:
                seq.logprobs.append(entry)
                seq.cumulative_logprob += entry.logprob
            params = request.params
            reason: str | None = None
            if token in request.stop_ids:
                reason = "stop"
                if token in params.stop_token_ids:
                    seq.stop_reason = token
            if reason is None or params.include_stop_str_in_output:
                seq.text_end += 1
                if params.stop and seq.detok.feed([token], params.min_tokens) and reason is None:
                    reason, seq.stop_reason = "stop", seq.detok.matched
            if reason is None and len(seq.token_ids) >= seq.max_len:
                reason = "length"
            if request.first_token == 0:
                request.first_token = now
            if reason is not None:
                if params.stop:
                    seq.detok.finish()
                seq.finish_reason = reason
                ended.append(seq)
            request.version += 1
            if request.signal.every:
                signals.append(request.signal)
        if ended:
            self.scheduler.remove(ended)
            for request in {seq.request for seq in ended}:
                if all(seq.finish_reason for seq in request.sequences):
                    self._finish(request)
        wake(signals)

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
