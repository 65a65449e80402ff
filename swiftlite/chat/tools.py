"""Whether a template writes what a row or a request holds of tools, asked by leaving it out and rendering again, and of thoughts.

A call that is not written would be learnt as an empty answer, and a tool, its result or a thought that is not written as guessing.
"""

from __future__ import annotations

from collections.abc import Callable

from swiftlite.chat.conversation import Message
from swiftlite.errors import DataError

Render = Callable[[list[Message], list | None], str]  # messages, tools -> the finished conversation


def check_written(render: Render, messages: list[Message], tools: list | None) -> None:
    """DataError for the first kind of thing that makes no difference to the rendering."""

    def same(rendered: str, changed: list[Message], offered: list | None) -> bool:
        try:
            return render(changed, offered) == rendered
        except DataError:
            return False  # what a template cannot do without, it writes

    for end, message in enumerate(messages):
        bare, what = message, ""
        if "tool_calls" in message:
            bare, what = {key: value for key, value in message.items() if key != "tool_calls"}, "tool calls"
        elif message["role"] == "tool" and message["content"]:
            bare, what = {**message, "content": ""}, "tool results"
        if what and same(render(messages[: end + 1], tools), [*messages[:end], bare], tools):
            raise _unwritten(what)
    if tools and same(render(messages, tools), messages, None):
        raise _unwritten("the tools")


def check_thought(message: Message, answer: str) -> None:
    """DataError when the thought of an assistant's turn is not in what the template makes of it, `answer`, spaces aside."""
    thought = message.get("reasoning_content")
    if isinstance(thought, str) and "".join(thought.split()) not in "".join(answer.split()):
        raise _unwritten("thoughts (reasoning_content)")


def _unwritten(what: str) -> DataError:
    return DataError(f"the chat template does not write {what}", fix="use a model whose template does, or leave such rows out")
