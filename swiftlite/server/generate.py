"""`POST /v2/models/{name}/generate`: Triton's call as TensorRT-LLM's `ensemble` answers it, one flat JSON object.

`ensemble` is the base model; the names of /v1/models are served as well. The body is JSON whatever its content type says, as
Triton reads it, and what is wrong with a request is said as `{"error": text}`. As there, a request that asks for no sampling is greedy.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from swiftlite.errors import SwiftError
from swiftlite.server import completions
from swiftlite.server.errors import APIError, as_api_error
from swiftlite.server.gate import read_json
from swiftlite.server.protocol import CompletionRequest, parse
from swiftlite.server.service import Service
from swiftlite.server.sse import results, while_connected

ENSEMBLES = ("ensemble", "tensorrt_llm_bls")
FIELDS = {  # theirs -> ours
    "text_input": "prompt", "max_tokens": "max_tokens", "min_length": "min_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "random_seed": "seed", "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "stop_words": "stop", "bad_words": "bad_words",
}  # fmt: skip


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v2/models/{name}/generate")
    async def generate(name: str, http: Request) -> JSONResponse:
        try:
            return JSONResponse(await _answer(service, name, http))
        except (APIError, SwiftError) as error:
            refused = as_api_error(error, http.scope.get("request_id", ""))
            return JSONResponse({"error": _in_their_words(refused.message)}, 404 if refused.param == "model" else refused.status)


def _in_their_words(message: str) -> str:
    """What begins with one of our names begins with theirs."""
    field = re.match(r"\w*", message)[0]  # type: ignore[index]
    theirs = {**{ours: name for name, ours in FIELDS.items()}, "stop_token_ids": "end_id", "best_of": "beam_width"}.get(field, field)
    return theirs + message[len(field) :]


async def _answer(service: Service, name: str, http: Request) -> dict[str, Any]:
    if not service.healthy:
        raise APIError("the engine has stopped; restart the server", 503)
    body = await read_json(http, any_type=True)
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise APIError("parameters must be an object", param="parameters")
    given = {key: value for key, value in {**parameters, **body}.items() if value not in (None, "", [], [""])}
    for field, plain in (("stream", False), ("num_return_sequences", 1)):
        if given.get(field, plain) != plain:
            raise APIError(f"{field}: {given[field]!r} is not possible here, /v1/completions can do that", param=field)
    request = parse(CompletionRequest, _completion(service, name, given))
    served, [prompt], [params] = await service.off_loop(completions.prepare, service, request)
    [output] = await while_connected(http, results([service.submit(prompt.ids, params, served)]))
    [answer] = output.outputs
    asked = bool(given.get("return_log_probs"))
    return {
        "context_logits": 0.0,
        "cum_log_probs": answer.cumulative_logprob if asked else 0.0,
        "generation_logits": 0.0,
        "model_name": name,
        "model_version": "1",
        "output_log_probs": [one.logprob for one in answer.logprobs or []] if asked else [0.0] * (params.max_tokens or 0),
        "sequence_end": False,
        "sequence_id": 0,
        "sequence_start": False,
        "text_output": ("" if given.get("exclude_input_in_output") else given["text_input"]) + answer.text,
    }


def _completion(service: Service, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The request as /v1/completions takes it."""
    if not isinstance(given.get("text_input"), str):
        raise APIError("text_input must be a text that is not empty", param="text_input")
    fields = {ours: given[theirs] for theirs, ours in FIELDS.items() if theirs in given}
    fields["model"] = None if name in ENSEMBLES and name not in service.adapters else name
    if not {"temperature", "top_p", "top_k"} & fields.keys():
        fields["temperature"] = 0.0
    if "end_id" in given:
        fields["stop_token_ids"] = [given["end_id"]]
    if given.get("beam_width", 1) != 1:
        fields |= {"use_beam_search": True, "best_of": given["beam_width"]}
    if given.get("return_log_probs"):
        fields["logprobs"] = 0
    return fields
