"""Whether a template writes what a row or a request holds of tools, asked by leaving it out and rendering again, and of thoughts.

A call that is not written would be learnt as an empty answer, and a tool, its result or a thought that is not written as guessing.
"""

from __future__ import annotations

from collections.abc import Callable

from swiftlite.chat.conversation import Message
from swiftlite.errors import DataError

TOOLS = "the tools"
Render = Callable[[list[Message], list | None], str]  # messages, tools -> the finished conversation


def check_written(render: Render, messages: list[Message], tools: list | None, known: set[str] | None = None) -> None:
    """DataError for the first kind of thing that makes no difference to the rendering.

    `known`: kinds that were found to be written before and are not looked at again; what is found joins it.
    """

    def check(what: str, whole: list[Message], changed: list[Message], offered: list | None) -> None:
        if known is not None and what in known:
            return
        try:
            same = render(whole, tools) == render(changed, offered)
        except DataError:
            same = False  # what a template cannot do without, it writes
        if same:
            raise _unwritten(what)
        if known is not None:
            known.add(what)

    for end, message in enumerate(messages):
        if "tool_calls" in message:
            bare = {key: value for key, value in message.items() if key != "tool_calls"}
            check("tool calls", messages[: end + 1], [*messages[:end], bare], tools)
        elif message["role"] == "tool" and message["content"]:
            check("tool results", messages[: end + 1], [*messages[:end], {**message, "content": ""}], tools)
    if tools:
        check(TOOLS, messages, messages, None)


def check_thought(message: Message, answer: str) -> None:
    """DataError when the thought of an assistant's turn is not in what the template makes of it, `answer`, spaces aside."""
    thought = message.get("reasoning_content")
    if isinstance(thought, str) and "".join(thought.split()) not in "".join(answer.split()):
        raise _unwritten("thoughts (reasoning_content)")


def _unwritten(what: str) -> DataError:
    return DataError(f"the chat template does not write {what}", fix="use a model whose template does, or leave such rows out")
