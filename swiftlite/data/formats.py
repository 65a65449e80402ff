"""One record of a dataset, in any of the common shapes -> Conversation.

Shapes, tried in this order (column names in any case, with the synonyms below):
  {"messages": [{"role", "content"}]}                   OpenAI; also under conversation(s), with from/value (ShareGPT)
  {"conversation": [{"human": .., "assistant": ..}]}    ShareGPT, pairs
  {"instruction", "input", "output"}                    Alpaca
  {"query", "response", "history", "system"}            SWIFT
  {"text"} or {"response"}, or one assistant message    plain text, pre-training
It does not know files, templates or tokens. Raises DataError with what is wrong, never with where: the caller knows that.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from swiftlite.chat.conversation import OTHER_ROLES, ROLES, Conversation, Message, learnt, weight
from swiftlite.errors import DataError

SYSTEM = ("system", "system_prompt")
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "completion", "content", "text",
)  # fmt: skip
MESSAGES = ("messages", "conversations", "conversation")
READ = (*SYSTEM, *QUERY, *RESPONSE, *MESSAGES, "history", "tools")  # all columns that mean something
_CALL_ROLES = ("function_call", "tool_call")
_NAMES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "bot": "assistant"}


def to_conversation(record: Any, columns: dict[str, str] | None = None, labelled: bool = True) -> Conversation:
    """The conversation in one record; `columns` renames its columns first (theirs -> ours).

    Rows to train on must be `labelled`: hold an assistant message. Rows to be answered need not.
    """
    if not isinstance(record, dict):
        raise DataError(f"a row must be an object with columns, got {type(record).__name__}")
    if columns:
        renames = {theirs.lower(): ours for theirs, ours in columns.items()}
        record = {columns.get(key, renames.get(str(key).lower(), key)): value for key, value in record.items()}
    row = {str(key).strip().lower(): value for key, value in record.items() if value is not None}
    system = _text(row, _pick(row, SYSTEM))
    tools = _parsed(row.get("tools"), "tools") or None
    if isinstance(tools, list):  # some files hold each tool as JSON
        tools = [_parsed(tool, "tools") for tool in tools]
    for key in MESSAGES:
        if key in row and row[key] != "":
            return _from_messages(_parsed(row[key], key), system, tools, labelled)
    if "instruction" in row and ("output" in row or "input" in row):
        query = "\n".join(part for part in (_text(row, "instruction"), _text(row, "input")) if part)
        return _from_query(query, _text(row, _pick(row, RESPONSE)), row.get("history"), system, tools, labelled)
    query_key, response_key = _pick(row, QUERY), _pick(row, RESPONSE)
    if query_key is None and response_key is not None and not row.get("history"):
        text = _text(row, response_key)
        if not text:
            raise DataError("the text is empty")
        return Conversation(text=text)
    if query_key is None or (response_key is None and labelled):
        raise DataError(
            f"unknown columns: {', '.join(map(str, record)) or 'none'}",
            fix="name them messages, or query and response, or text; --columns renames",
        )
    return _from_query(_text(row, query_key), _text(row, response_key), row.get("history"), system, tools, labelled)


def _pick(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the synonyms that the row has."""
    return next((name for name in names if name in row), None)


def _text(row: dict[str, Any], key: str | None) -> str:
    value = row.get(key) if key else None
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise DataError(f"column {key!r} must be text, got {type(value).__name__}")


def _parsed(value: Any, key: str) -> Any:
    """A list as it is; from a CSV cell as JSON, or as Python writes it."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise DataError(f"column {key!r} is neither JSON nor a Python list: {value[:60]!r}")


def _from_query(query: str, response: str, history: Any, system: str, tools: Any, labelled: bool) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for pair in _parsed(history, "history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise DataError(f"history must be a list of [query, response] pairs, got {pair!r}"[:120])
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": query})
    if response or labelled:
        messages.append({"role": "assistant", "content": response})
    return _checked(messages, tools, labelled)


def _from_messages(turns: Any, system: str, tools: Any, labelled: bool) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise DataError("messages must be a non-empty list")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"message {number} must be an object, got {type(turn).__name__}")
        messages += _turn(turn, number, messages)
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if len(messages) == 1 and messages[0]["role"] == "assistant" and not messages[0].get("tool_calls"):
        return Conversation(text=_checked(messages, tools, labelled).messages[0]["content"])
    return _checked(messages, tools, labelled)


def _turn(turn: dict[str, Any], number: int, messages: list[Message]) -> list[Message]:
    """One element of `messages`; a ShareGPT pair gives two. A tool call joins the assistant message before it in `messages`."""
    role = turn.get("role", turn.get("from"))
    if role is None:
        pair = [(_NAMES[key.lower()], value) for key, value in turn.items() if key.lower() in _NAMES]
        if len(pair) == 2:
            return [{"role": role, "content": value} for role, value in sorted(pair, key=lambda item: item[0] == "assistant")]
        raise DataError(f"message {number} has neither a role nor a human/assistant pair: {', '.join(turn)}")
    content = turn.get("content", turn.get("value"))
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value") and value is not None}
    if role in _CALL_ROLES:
        call = _parsed(content, "tool call")
        if not isinstance(call, dict) or "name" not in call:
            raise DataError(f"message {number}: a tool call must be an object with name and arguments")
        entry = {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", call.get("parameters", {}))}}
        before = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if before is not None:
            # one turn with what was said before the call: a model that learns to end its turn there never comes to call
            calls = before.get("tool_calls", [])
            if not isinstance(calls, list):
                raise DataError(f"message {number - 1}: tool_calls must be a list of objects", fix="follow OpenAI's chat format")
            if (learnt(rest), weight(rest)) != (learnt(before), weight(before)):
                raise DataError(f"message {number}: calls of one turn are learnt alike", fix="give them the same loss and loss_scale")
            before["tool_calls"] = [*calls, entry]
            return []
        return [{**rest, "role": "assistant", "content": "", "tool_calls": [entry]}]
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(f"message {number} has the unknown role {role!r}", fix=f"roles are {', '.join(ROLES)}")
    return [{**rest, "role": role, "content": content}]


def _checked(messages: list[Message], tools: Any, labelled: bool) -> Conversation:
    """Contents are text, and there is something to learn."""
    taught = False
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise DataError(f"message {number} ({message['role']}) has no content")
        if content is not None and not isinstance(content, (str, list)):
            raise DataError(f"message {number} ({message['role']}): content must be text, got {type(content).__name__}")
        if message["role"] == "assistant":
            if not _written(content) and not message.get("tool_calls") and learnt(message):
                raise DataError(f"the assistant's message {number} is empty")
            taught = taught or learnt(message)
    if labelled and not taught:
        raise DataError("no assistant message to learn from")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("tools must be a list of objects")
    return Conversation(messages=messages, tools=tools)


def _written(content: Any) -> bool:
    """Whether there is any text in it, whole or in parts; parts of other kinds are refused later."""
    if isinstance(content, list):
        return any(not isinstance(part, dict) or part.get("text") != "" for part in content)
    return bool(content)
