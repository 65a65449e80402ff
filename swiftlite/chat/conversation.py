"""A conversation as plain data, and the one place where messages from outside (rows, requests) are checked.

After `check_messages` every message has a known role and a string content, so that templates and the tokenizer see nothing
else. It knows neither templates nor tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swiftlite.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",  # OpenAI's newer name
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
DROPPED_KEYS = ("loss", "loss_scale")  # ours, not the template's


@dataclass
class Conversation:
    """One row: a chat (`messages`), or a plain text to continue (`text`, pre-training)."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None


def learnt(message: Message) -> bool:
    """A message's `loss`: whether it is to be learnt. DataError unless it says yes or no."""
    value = message.get("loss")
    known = {True: True, False: False, "true": True, "false": False, None: True}  # 1 and 0 are equal to True and False
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, (str, int, float, type(None))) and key in known:
        return known[key]
    raise DataError(f"a message's loss is {value!r}", fix="write true or false")


def weight(message: Message) -> float:
    """A message's `loss_scale`. DataError unless it is a number from 0 up."""
    value = message.get("loss_scale")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise DataError(f"a message's loss_scale is {value!r}", fix="write a number from 0 up")
    return float(value)


def flat_text(content: Any, refuse: Callable[[str, str], Exception]) -> str:
    """Content as one string. Text parts are joined by newlines, as vLLM's server does for templates that take strings."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise refuse(f"content must be a string or a list of text parts, got {type(content).__name__}", "write the content as text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise refuse(
                f"content part of type {kind!r} is not supported", 'only {"type": "text", "text": "..."} parts are: the model reads text'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, refuse: Callable[[str, str], Exception]) -> list[dict[str, Any]]:
    """OpenAI sends arguments as a JSON string, templates expect the object: parse what parses."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise refuse("tool_calls must be a list of objects", "follow OpenAI's chat format")
    parsed = []
    for call in calls:
        call = dict(call)
        function = dict(call["function"]) if isinstance(call.get("function"), dict) else call
        if isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except ValueError:
                arguments = None
            if isinstance(arguments, dict):
                function["arguments"] = arguments
        if function is not call:
            call["function"] = function
        parsed.append(call)
    return parsed


def check_messages(messages: Sequence[Message], refuse: Callable[[str, str], Exception]) -> list[Message]:
    """Messages in the form that templates read; the caller's are not touched.

    `refuse(what, fix)` makes the error that is raised (a RequestError for a request, a DataError for a row).
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise refuse("messages must be a non-empty list", 'e.g. [{"role": "user", "content": "Hello"}]')
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise refuse(f"message {number} must be an object with role and content, got {type(message).__name__}", "")
        role = message.get("role")
        role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise refuse(f"message {number} has the unknown role {role!r}", f"roles are {', '.join(ROLES)}")
        kept = {k: v for k, v in message.items() if v is not None and k not in DROPPED_KEYS}
        kept["role"], kept["content"] = role, flat_text(message.get("content"), refuse)
        if "tool_calls" in kept:
            kept["tool_calls"] = _tool_calls(kept["tool_calls"], refuse)
            if not kept["tool_calls"]:
                del kept["tool_calls"]
        reasoning = next((kept[key] for key in REASONING_KEYS if isinstance(kept.get(key), str)), None)
        if reasoning is not None:  # templates read one of two names
            kept["reasoning_content"] = kept["thinking"] = reasoning
        checked.append(kept)
    return checked
