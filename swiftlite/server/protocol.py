"""The bodies of `/v1/chat/completions` and `/v1/completions`: OpenAI's fields and vLLM's extras, with vLLM's bounds.

A field that is null counts as not given. Unknown fields are ignored (clients send new ones every year); fields that are known
to change the answer and that we cannot honour are refused, so that nobody gets an unconstrained answer in silence.
It does not know the engine: token ids are checked against the vocabulary in `sampling`, which is told its size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from swiftlite.engine.request import SamplingParams
from swiftlite.server.errors import APIError

MAX_STOPS, MAX_STOP_LENGTH, MAX_PROMPTS, MAX_BIASES = 4, 1024, 1024, 4096
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
NOT_SUPPORTED = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "suffix", "bad_words",
    "allowed_token_ids", "prompt_logprobs", "truncate_prompt_tokens", "continue_final_message", "documents", "functions",
    "function_call",
)  # fmt: skip
# Template arguments a request may not set: they are ours, or they are code.
RESERVED_KWARGS = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(BaseModel):
    """What both routes share."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    use_beam_search: bool | None = None  # answers come when the search is over, also with stream=true
    best_of: int | None = Field(None, ge=1)  # beams
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_LENGTH)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list):
            if len(stops) > MAX_STOPS:
                raise ValueError(f"at most {MAX_STOPS} stop strings, got {len(stops)}")
            if any(isinstance(s, str) and not 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
                raise ValueError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters")
        return stops

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        for name in NOT_SUPPORTED:
            if body.get(name) not in (None, False, "", [], {}, 0):
                raise APIError(f"{name} is not supported by this server", param=name)
        return body

    @model_validator(mode="after")
    def _together(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise APIError("stream_options is for stream=true only", param="stream_options")
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise APIError("response_format other than {'type': 'text'} is not supported by this server", param="response_format")
        return self

    @property
    def token_limit(self) -> int | None:
        """The answer's limit that the request names, if any."""
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives a token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(BaseModel):
    """One turn. Text only: a part that names a file or an address is refused, so nothing is ever fetched."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('content parts must be {"type": "text", "text": ...}; this server reads text only')
            texts.append(part["text"])
        return "\n".join(texts)  # as vLLM does for templates that take strings

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        return self


class ChatRequest(Sampled):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[dict[str, Any]] | None = Field(None, min_length=1)
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = Field(None, max_length=16)

    @model_validator(mode="after")
    def _chat(self) -> ChatRequest:
        if self.chat_template is not None:
            raise APIError("chat templates from requests are not trusted; the model's own is used", param="chat_template")
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise APIError("tool_choice can be 'auto' or 'none' on this server", param="tool_choice")
        if self.tool_choice == "auto" and not self.tools:
            raise APIError("tool_choice needs tools", param="tool_choice")
        for name in self.chat_template_kwargs or {}:
            if name in RESERVED_KWARGS or not name.isidentifier() or name.startswith("_"):
                raise APIError(f"chat_template_kwargs cannot set {name[:64]!r}", param="chat_template_kwargs")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        turns = []
        for message in self.messages:
            turn = message.model_dump(exclude_none=True)
            turn.setdefault("content", "")
            if turn["role"] == "developer":  # OpenAI's newer word for system
                turn["role"] = "system"
            turns.append(turn)
        return turns


class CompletionRequest(Sampled):
    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or its token ids. APIError when they are neither, empty, or too many."""
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise APIError("prompt must be a text, a list of texts, a list of token ids, or a list of such lists", param="prompt")
        if len(prompt) > MAX_PROMPTS:
            raise APIError(f"at most {MAX_PROMPTS} prompts a request, got {len(prompt)}", param="prompt")
        for one in prompt:
            if not isinstance(one, str) and not (isinstance(one, list) and all(type(i) is int for i in one)):
                raise APIError("prompt must be a text, a list of texts, a list of token ids, or a list of such lists", param="prompt")
            if not one:
                raise APIError("prompt must not be empty", param="prompt")
        return prompt

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: dict[str, Any]) -> Body:
    """A request body, or APIError 400 that names the first field at fault. Values are quoted at most 100 characters long."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        lines = []
        for detail in details[:3]:
            where = ".".join(str(part) for part in detail["loc"])
            message = detail["msg"].removeprefix("Value error, ")
            got = "" if detail["type"] == "missing" else f" (got {_short(detail['input'])})"
            lines.append(f"{where}: {message}{got}" if where else message)
        more = f"; and {len(details) - 3} more" if len(details) > 3 else ""
        param = str(details[0]["loc"][0]) if details[0]["loc"] else None
        raise APIError("; ".join(lines) + more, param=param) from None


def _short(value: Any) -> str:
    """A value for an error message; never renders a large one whole."""
    if isinstance(value, str):
        return repr(value[:100])
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value)[:100]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the served model allows."""

    max_model_len: int  # tokens of prompt plus answer
    vocab_size: int
    max_logprobs: int
    max_n: int


def sampling(
    request: Sampled,
    defaults: dict[str, Any],
    limits: Limits,
    prompt_length: int,
    token_default: int | None,
    stop_ids: tuple[int, ...] = (),
) -> SamplingParams:
    """The request's SamplingParams: its own values, else `defaults` (command line, generation_config.json), else neutral ones.

    `prompt_length` in tokens; the answer's limit is cut to the room that the prompt leaves. `stop_ids` end a chat turn.
    """
    room = limits.max_model_len - prompt_length
    if room < 1:
        raise APIError(
            f"the prompt has {prompt_length} tokens; this model takes at most {limits.max_model_len}, prompt and answer together",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
        )
    wanted = request.token_limit
    least = 0 if isinstance(request, CompletionRequest) and request.echo else 1
    if wanted is not None and wanted < least:
        raise APIError(f"max_tokens must be at least {least}, got {_short(wanted)}", param="max_tokens")
    min_tokens = request.min_tokens or 0
    if wanted is not None and min_tokens > wanted:
        raise APIError(f"min_tokens ({_short(min_tokens)}) is more than max_tokens ({wanted})", param="min_tokens")
    limit = wanted if wanted is not None else defaults.get("max_tokens", token_default)
    limit = room if limit is None else min(limit, room)
    for name, count in (("n", request.n), ("best_of", request.best_of)):
        if (count or 1) > limits.max_n:
            raise APIError(f"{name} must be at most {limits.max_n}, got {_short(count)}", param=name)
    alternatives = request.top_logprobs_wanted
    if alternatives is not None and alternatives > limits.max_logprobs:
        raise APIError(f"at most {limits.max_logprobs} log-probabilities a token, got {_short(alternatives)}", param="logprobs")
    stop_token_ids = list(request.stop_token_ids or [])
    _check_ids(stop_token_ids, limits, "stop_token_ids")
    values = {
        name: given if given is not None else defaults[name]
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
        if (given := getattr(request, name)) is not None or name in defaults
    }
    return SamplingParams(
        **values,
        n=request.n or 1,
        max_tokens=limit,
        min_tokens=min(min_tokens, limit),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_bias(request.logit_bias, limits),
        seed=request.seed,
        stop_token_ids=stop_token_ids + ([] if request.ignore_eos else [i for i in stop_ids if i not in stop_token_ids]),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=alternatives,
        use_beam_search=bool(request.use_beam_search),
        best_of=request.best_of,
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        early_stopping=request.early_stopping or False,
    )


def check_prompt_ids(ids: list[int], limits: Limits) -> None:
    """Token ids from a client, against the length and the vocabulary of the model."""
    if len(ids) < limits.max_model_len:  # a longer one is refused by `sampling`, with the numbers
        _check_ids(ids, limits, "prompt")


def _check_ids(ids: list[int], limits: Limits, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
        raise APIError(f"{param} holds token ids outside 0..{limits.vocab_size - 1}", param=param)


def _bias(bias: dict[str, float] | None, limits: Limits) -> dict[int, float] | None:
    if not bias:
        return None
    try:
        ids = {int(key): max(-100.0, min(100.0, value)) for key, value in bias.items()}
    except ValueError:
        raise APIError("logit_bias maps token ids to numbers", param="logit_bias") from None
    _check_ids(list(ids), limits, "logit_bias")
    return ids


def generation_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What a model's generation_config.json says, under SamplingParams' names; a value that makes no sense is left out."""
    found: dict[str, Any] = {}
    ranges: dict[str, tuple[float, float]] = {
        "temperature": (0, 2), "top_p": (1e-6, 1), "top_k": (-1, 2**31), "min_p": (0, 1), "repetition_penalty": (1e-6, math.inf),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            found[name] = value
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    limit = config.get("max_new_tokens")
    if isinstance(limit, int) and limit > 0:
        found["max_tokens"] = limit
    return found
