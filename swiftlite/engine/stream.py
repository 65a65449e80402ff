"""A request seen from outside the step loop: snapshots for threads and for asyncio, made when they are read.

The loop only counts changes (`Request.version`) and wakes whoever sleeps; the reader builds the snapshot and decodes the text
in its own thread. A slow reader therefore costs the loop nothing: what happened meanwhile is one snapshot. With stop strings
the loop has to decode itself, and the snapshot takes that text.

It does not know the scheduler or the model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from swiftlite.engine.request import CompletionOutput, RequestOutput
from swiftlite.engine.sequence import Request, Sequence


class Stream:
    """Snapshots of one request: `for output in stream`, or `async for`, or only `.result()`.

    Every snapshot is cumulative, the last has `finished=True`. A stream that is dropped unread aborts its request. Several
    threads may read one stream; only one event loop may.
    """

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self._request, self._signal, self._abort = request, request.signal, abort
        self._seen = -1  # version of the last snapshot given out
        self._ended = False
        self._lock = threading.Lock()

    @property
    def request_id(self) -> str:
        return self._request.id

    @property
    def finished(self) -> bool:
        return self._request.finished

    @property
    def changed(self) -> bool:
        """True when the next snapshot is there without waiting."""
        return not self._ended and (self._request.finished or self._request.version != self._seen)

    def abort(self) -> None:
        """End the request now; its last snapshot has finish_reason "abort"."""
        self._abort(self._request.id)

    def result(self) -> RequestOutput:
        """Wait for the end."""
        self._wait(None)
        return self._snapshot()

    async def aresult(self) -> RequestOutput:
        """Wait for the end without blocking the event loop."""
        while not self._request.finished:
            await self._sleep(None)
        return self._snapshot()

    def __iter__(self) -> Stream:
        self._signal.every = True
        return self

    def __next__(self) -> RequestOutput:
        if self._ended:
            raise StopIteration
        self._wait(self._seen)
        return self._next()

    def __aiter__(self) -> Stream:
        self._signal.every = True
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        while self._request.version == self._seen and not self._request.finished:
            await self._sleep(self._seen)
        return self._next()

    def __del__(self) -> None:
        if not self._request.finished:
            self.abort()

    def _next(self) -> RequestOutput:
        self._seen = self._request.version
        output = self._snapshot()
        self._ended = output.finished
        return output

    def _wait(self, seen: int | None) -> None:
        """Sleep until the version is not `seen` (None: until the end)."""
        request, signal = self._request, self._signal
        with signal.condition:
            while not request.finished:
                signal.waiting = True  # before looking: the loop changes the version first, then looks here
                if request.finished or (seen is not None and request.version != seen):
                    break
                signal.condition.wait()

    async def _sleep(self, seen: int | None) -> None:
        request, signal = self._request, self._signal
        if signal.event is None:
            signal.loop, signal.event = asyncio.get_running_loop(), asyncio.Event()
        signal.event.clear()
        signal.sleeping = True
        if not request.finished and (seen is None or request.version == seen):
            await signal.event.wait()

    def _snapshot(self) -> RequestOutput:
        request = self._request
        with self._lock:
            finished = request.finished  # before everything else: it is written last
            outputs = [_answer(seq) for seq in request.sequences]
        metrics = {"arrival": request.arrival}
        if request.first_token:
            metrics["first_token"] = request.first_token
        if finished:
            metrics["finished"] = request.finished_at
        return RequestOutput(
            request_id=request.id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_ids,
            outputs=outputs,
            finished=finished,
            num_cached_tokens=request.sequences[0].num_cached,
            prompt_logprobs=list(request.prompt_logprobs) if request.prompt_logprobs is not None else None,
            error=request.error,
            metrics=metrics,
        )


def _answer(seq: Sequence) -> CompletionOutput:
    reason = seq.finish_reason  # written after the text's length
    detok = seq.detok
    if not seq.request.params.stop:  # else the loop feeds it
        start = seq.prompt_len
        if detok.fed < seq.text_end:
            detok.feed(seq.token_ids[start + detok.fed : start + seq.text_end])
        if reason is not None:
            detok.finish()
    token_ids = seq.token_ids[seq.prompt_len :]
    return CompletionOutput(
        index=seq.index,
        text=detok.text,
        token_ids=token_ids,
        logprobs=seq.logprobs[: len(token_ids)] if seq.logprobs is not None else None,
        cumulative_logprob=seq.cumulative_logprob,
        finish_reason=reason,
        stop_reason=seq.stop_reason,
    )
