"""One question to a served model from Python: what the terminal, the page and batch runs use in place of HTTP.

It goes through the same request types, templates and defaults as the routes, so the answer is the same.
"""

from __future__ import annotations

from typing import Any

from swiftlite.engine.engine import Stream
from swiftlite.engine.request import SamplingParams
from swiftlite.server import chat, completions
from swiftlite.server.protocol import ChatRequest, CompletionRequest, parse
from swiftlite.server.service import Served, Service


def prepare(service: Service, model: str, question: list[dict[str, Any]] | str, **fields: Any) -> tuple[Served, list[int], SamplingParams]:
    """A conversation, or a text to continue, as the engine takes it. `fields` are those of the HTTP body.

    Raises APIError or RequestError when it cannot be answered. Unlike over HTTP, a text is continued as far as the context goes.
    """
    if isinstance(question, str):
        request = parse(CompletionRequest, {"model": model, "prompt": question, **fields})
        served, [prompt], [params] = completions.prepare(service, request)
        if request.max_tokens is None and "max_tokens" not in service.defaults:
            params.max_tokens = service.limits.max_model_len - len(prompt.ids)
        return served, prompt.ids, params
    return chat.prepare(service, parse(ChatRequest, {"model": model, "messages": question, **fields}))


def ask(service: Service, model: str, question: list[dict[str, Any]] | str, **fields: Any) -> Stream:
    """Prepare and submit. From an event loop, call `prepare` in a thread and `service.submit` on the loop."""
    served, ids, params = prepare(service, model, question, **fields)
    return service.submit(ids, params, served)
