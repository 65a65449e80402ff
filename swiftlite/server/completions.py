"""`POST /v1/completions`: raw text or token ids in, their continuation out, for base models and adapters alike."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swiftlite.engine.engine import Stream
from swiftlite.engine.request import CompletionOutput, RequestOutput, SamplingParams, TokenLogprob
from swiftlite.server.answers import Cursor, ending, header
from swiftlite.server.protocol import COMPLETION_TOKENS, CompletionRequest, check_prompt_ids, sampling
from swiftlite.server.service import Served, Service
from swiftlite.server.sse import EventStream, abort_all, event, failed, merged, results, while_connected
from swiftlite.server.tokens import Tokens, usage


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str  # only filled when it is echoed


def prepare(service: Service, request: CompletionRequest) -> tuple[Served, list[Prompt], list[SamplingParams]]:
    """Who answers, the prompts, and how to sample each; a server calls it off its event loop."""
    served = service.served(request.model)
    prompts, wanted = [], []
    for one in request.prompts():
        if isinstance(one, str):
            service.check_length(one, "prompt")
            prompt = Prompt(served.template.encode_text(one, parse_special=True), one if request.echo else "")
        else:
            check_prompt_ids(one, service.limits)
            prompt = Prompt(one, str(service.engine.tokenizer.decode(one)) if request.echo else "")
        params = sampling(request, service.defaults, service.limits, len(prompt.ids), COMPLETION_TOKENS)
        if request.echo and request.logprobs is not None:
            params.prompt_logprobs = request.logprobs
        if request.max_tokens == 0:  # score the prompt only: the engine makes one token, which is not shown
            params.max_tokens = 1
        prompts.append(prompt)
        wanted.append(params)
    return served, prompts, wanted


async def create(service: Service, tokens: Tokens, request: CompletionRequest, http: Request) -> Response:
    """Continue one or several prompts. Choice index = prompt number * n + answer number."""
    served, prompts, wanted = await service.off_loop(prepare, service, request)
    streams: list[Stream] = []
    try:
        for prompt, params in zip(prompts, wanted, strict=True):
            streams.append(service.submit(prompt.ids, params, served))
    except BaseException:
        abort_all(streams)
        raise
    writer = Writer(request, tokens, prompts, header("cmpl", "text_completion", served.name))
    if request.stream:
        return EventStream(writer.chunks(streams), lambda: abort_all(streams))
    outputs = await while_connected(http, results(streams))
    choices = [writer.choice(number, answer, output) for number, output in enumerate(outputs) for answer in output.outputs]
    return JSONResponse({**writer.head, "choices": choices, "usage": writer.usage(outputs)})


class Writer:
    """Choices and chunks of one request."""

    def __init__(self, request: CompletionRequest, tokens: Tokens, prompts: list[Prompt], head: dict[str, Any]) -> None:
        self.request, self.tokens, self.prompts, self.head = request, tokens, prompts, head
        self.silent = request.max_tokens == 0

    def usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        counted = usage(outputs)
        if self.silent:
            counted |= {"completion_tokens": 0, "total_tokens": counted["prompt_tokens"]}
        return counted

    def choice(self, number: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        """One finished answer to prompt `number`."""
        prompt, request = self.prompts[number], self.request
        own = [] if self.silent else list(answer.logprobs or [])
        logprobs = None
        if request.logprobs is not None and request.echo:
            logprobs = self.tokens.completion_logprobs([*(output.prompt_logprobs or []), *own], prompt.ids)
        elif request.logprobs is not None:
            logprobs = self.tokens.completion_logprobs(own)
        choice: dict[str, Any] = {
            "index": number * (request.n or 1) + answer.index,
            "text": prompt.text + ("" if self.silent else answer.text),
            "logprobs": logprobs,
            **ending(answer, ()),
        }
        if self.silent:
            choice["finish_reason"] = "length"
        if request.return_token_ids:
            choice |= {"token_ids": [] if self.silent else answer.token_ids, "prompt_token_ids": prompt.ids}
        return choice

    async def chunks(self, streams: list[Stream]) -> AsyncIterator[bytes]:
        request, n = self.request, self.request.n or 1
        every_token = request.logprobs is not None or bool(request.return_token_ids)
        cursors = [Cursor(every_token) for _ in range(n * len(streams))]
        last: list[RequestOutput | None] = [None] * len(streams)
        always = bool(request.stream_options and request.stream_options.continuous_usage_stats)
        async for number, output in merged(streams):
            if (error := failed(output)) is not None:
                raise error
            last[number] = output
            for answer in output.outputs:
                index = number * n + answer.index
                cursor = cursors[index]
                first, characters = cursor.tokens == 0 and not cursor.finished, cursor.characters
                delta = cursor.advance(answer)
                if delta is None:
                    continue
                echoed = self.prompts[number].text if first and not characters else ""
                logprobs: list[TokenLogprob | None] = [] if self.silent else list(delta.logprobs or [])
                ids = self.prompts[number].ids
                offset = 0 if echoed else len(self.prompts[number].text) + characters
                if echoed:
                    logprobs = [*(output.prompt_logprobs or []), *logprobs]
                choice: dict[str, Any] = {
                    "index": index,
                    "text": echoed + ("" if self.silent else delta.text),
                    "logprobs": self.tokens.completion_logprobs(logprobs, ids, offset) if request.logprobs is not None else None,
                    "finish_reason": None,
                }
                if request.return_token_ids:
                    choice["token_ids"] = delta.token_ids
                if delta.finish_reason:
                    choice |= ending(answer, ()) | ({"finish_reason": "length"} if self.silent else {})
                yield event({**self.head, "choices": [choice], **({"usage": self.usage([output])} if always else {})})
        if request.include_usage:
            yield event({**self.head, "choices": [], "usage": self.usage([output for output in last if output is not None])})
