"""Server-sent events, and what happens when a client leaves: its requests are aborted and their KV blocks freed.

Each chunk is `data: <json>` and a blank line; a fault after the first chunk is a chunk that holds `error`; the last line is always
`data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from swiftlite.engine.engine import Stream
from swiftlite.engine.request import RequestOutput
from swiftlite.server.errors import APIError, as_api_error

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `chunks` as they come; `abort` is called once at the end, however it comes."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], abort: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.abort = chunks, abort

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send, scope.get("request_id", "")))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            self.abort()

    async def _send(self, send: Send, request_id: str) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:  # the status line is sent already: say it in the stream
            await send({"type": "http.response.body", "body": event(as_api_error(error, request_id).body()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result; it is cancelled when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError("the client went away", 400)
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def failed(output: RequestOutput) -> APIError | None:
    """The error that ended a request, if one did."""
    if output.error:
        return APIError(output.error.partition(":")[0], 500)  # what follows a colon is an exception's text: for the log only
    if output.finished and any(one.finish_reason in ("abort", "error") for one in output.outputs):
        return APIError("the request was aborted: the server is stopping", 503)
    return None


async def results(streams: Sequence[Stream]) -> list[RequestOutput]:
    """Every stream's last snapshot, in order. Aborts all of them when one fails or the caller is cancelled."""
    outputs = []
    try:
        for stream in streams:
            output = await stream.aresult()
            if (error := failed(output)) is not None:
                raise error
            outputs.append(output)
    except BaseException:
        abort_all(streams)
        raise
    return outputs


def abort_all(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.abort()


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Snapshots of several streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(number: int) -> None:
        try:
            async for output in streams[number]:
                await queue.put((number, output))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    pumps = [asyncio.ensure_future(pump(number)) for number in range(len(streams))]
    try:
        left = len(streams)
        while left:
            number, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield number, item
    finally:
        for task in pumps:
            task.cancel()
