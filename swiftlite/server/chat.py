"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swiftlite.engine.engine import Stream
from swiftlite.engine.request import CompletionOutput, SamplingParams
from swiftlite.server.answers import Cursor, ending, header
from swiftlite.server.errors import APIError
from swiftlite.server.protocol import ChatRequest, sampling
from swiftlite.server.service import Served, Service
from swiftlite.server.sse import EventStream, event, failed, results, while_connected
from swiftlite.server.tokens import Tokens, usage


def prepare(service: Service, request: ChatRequest) -> tuple[Served, list[int], SamplingParams]:
    """Who answers, the conversation as token ids, and how to sample. Takes milliseconds: a server calls it off its event loop.

    Raises UnknownModel, and APIError when the model has no template, refuses the turns, or has no room for them.
    """
    served = service.served(request.model)
    if not served.template.has_chat:
        raise APIError(
            f"`{served.name}` is a base model without a chat template: use /v1/completions, or start the server with --template",
            param="messages",
        )
    conversation = request.conversation()
    service.check_length("".join(turn["content"] for turn in conversation), "messages")
    ids = served.template.encode_prompt(
        conversation,
        tools=None if request.tool_choice == "none" else request.tools,
        add_generation_prompt=request.add_generation_prompt is not False,
        **(request.chat_template_kwargs or {}),
    )
    return served, ids, sampling(request, service.defaults, service.limits, len(ids), None, served.template.stop_ids)


async def create(service: Service, tokens: Tokens, request: ChatRequest, http: Request) -> Response:
    """Answer one conversation, whole or streamed."""
    served, ids, params = await service.off_loop(prepare, service, request)
    stop_ids = served.template.stop_ids
    stream = service.submit(ids, params, served)
    if request.stream:
        head = header("chatcmpl", "chat.completion.chunk", served.name)
        return EventStream(_chunks(stream, request, head, tokens, stop_ids), stream.abort)
    [output] = await while_connected(http, results([stream]))
    body = header("chatcmpl", "chat.completion", served.name)
    body["choices"] = [_choice(answer, request, tokens, stop_ids) for answer in output.outputs]
    body["usage"] = usage([output])
    if request.return_token_ids:
        body["prompt_token_ids"] = output.prompt_token_ids
    return JSONResponse(body)


def _choice(answer: CompletionOutput, request: ChatRequest, tokens: Tokens, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    choice = {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": tokens.chat_logprobs(answer.logprobs or []) if request.logprobs else None,
        **ending(answer, stop_ids),
    }
    if request.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice


async def _chunks(
    stream: Stream, request: ChatRequest, head: dict[str, Any], tokens: Tokens, stop_ids: tuple[int, ...]
) -> AsyncIterator[bytes]:
    cursors = [Cursor(every_token=bool(request.logprobs or request.return_token_ids)) for _ in range(request.n or 1)]
    always = bool(request.stream_options and request.stream_options.continuous_usage_stats)
    for index in range(len(cursors)):
        first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield event({**head, "choices": [first]})
    async for output in stream:
        if (error := failed(output)) is not None:
            raise error
        for answer in output.outputs:
            delta = cursors[answer.index].advance(answer)
            if delta is None:
                continue
            choice: dict[str, Any] = {"index": answer.index, "delta": {"content": delta.text}, "logprobs": None, "finish_reason": None}
            if request.logprobs:
                choice["logprobs"] = tokens.chat_logprobs(delta.logprobs or [])
            if request.return_token_ids:
                choice["token_ids"] = delta.token_ids
            if delta.finish_reason:
                choice |= ending(answer, stop_ids)
            yield event({**head, "choices": [choice], **({"usage": usage([output])} if always else {})})
    if request.include_usage:
        yield event({**head, "choices": [], "usage": usage([output])})
