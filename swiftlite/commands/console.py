"""`swift infer`'s chat in the terminal, with SWIFT's prompts and words.

Ctrl-C stops the answer, Ctrl-D leaves. The conversation is plain messages; the service does the rest.
"""

from __future__ import annotations

import io
import sys
import time

from swiftlite.engine.engine import Stream
from swiftlite.engine.request import RequestOutput
from swiftlite.errors import SwiftError
from swiftlite.server.ask import ask
from swiftlite.server.errors import APIError
from swiftlite.server.service import Service

RULER = "-" * 50
# A model's text must not steer the terminal: control characters but newline and tab are left out.
HARMLESS = {code: None for code in [*range(32), *range(127, 160)] if code not in (9, 10)}


class Console:
    """One conversation with one of the served models."""

    def __init__(self, service: Service, model: str, stream: bool = True) -> None:
        self.service, self.served, self.stream = service, service.served(model), stream
        self.messages: list[dict[str, str]] = []
        self.system: str | None = None
        self.multi_line = False

    def run(self) -> None:
        """Read and answer until `exit`, `quit` or Ctrl-D."""
        for stream in (sys.stdin, sys.stdout):  # a byte that is no character must not end the chat
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if sys.stdin.isatty():
            import readline  # noqa: F401  line editing and history for input()
        print(self.help())
        while True:
            try:
                query = self.read("")
            except KeyboardInterrupt:
                print("\n(Ctrl-D or `exit` leaves)")
                continue
            except EOFError:
                print()
                return
            if query.strip().lower() in ("exit", "quit"):
                return
            if query.strip() and not self.command(query.strip()):
                self.answer(query)

    def help(self) -> str:
        lines = ["Input `exit` or `quit` to exit the conversation."]
        lines.append("Input `multi-line` to switch to multi-line input mode (end with `#`), `single-line` to switch back.")
        if self.served.template.has_chat:
            lines.append("Input `reset-system` to reset the system and clear the history.")
            lines.append("Input `clear` to clear the history.")
        else:
            lines.append(f"`{self.served.name}` is a base model without a chat template: it continues your text.")
        if self.service.adapters:
            lines.append(f"Input `lora <name>` to switch: {', '.join(self.service.names())}. Now: {self.served.name}.")
        return "\n".join(lines)

    def read(self, mode: str) -> str:
        """One input; in multi-line mode lines up to one that ends with `#`."""
        mode = ("M" if self.multi_line else "") + mode
        text = input(f"<<<[{mode}] " if mode else "<<< ")
        if not self.multi_line or text.strip().lower() in ("exit", "quit", "single-line", "clear", "reset-system"):
            return text
        lines = [text]
        while not lines[-1].rstrip().endswith("#"):
            lines.append(input())
        return "\n".join(lines).rstrip()[:-1]

    def command(self, word: str) -> bool:
        """True when the input was a command and not a question."""
        lowered = word.lower()
        if lowered in ("multi-line", "single-line"):
            self.multi_line = lowered == "multi-line"
        elif lowered == "clear":
            self.messages.clear()
        elif lowered == "reset-system" and self.served.template.has_chat:
            try:
                self.system = self.read("S").strip() or None
            except (KeyboardInterrupt, EOFError):
                print()
                return True
            self.messages.clear()
        elif self.service.adapters and lowered.split()[0] == "lora" and len(word.split()) <= 2:
            self.switch(word.split()[1:])
        else:
            return False
        return True

    def switch(self, names: list[str]) -> None:
        if names:
            try:
                self.served = self.service.served(names[0])
            except SwiftError as error:
                print(error)
                return
            self.messages.clear()
        print(f"{self.served.name} answers (served: {', '.join(self.service.names())})")

    def answer(self, query: str) -> None:
        """Print the answer as it grows and keep it in the history; a refused question leaves the history as it was."""
        chat = self.served.template.has_chat
        turn = {"role": "user", "content": query}
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            stream = ask(self.service, self.served.name, [*system, *self.messages, turn] if chat else query)
            text = self.show(stream)
        except (SwiftError, APIError) as error:
            print(f"error: {error}" + ("\n  `clear` empties the history" if self.messages else ""))
            return
        if chat:
            self.messages += [turn, {"role": "assistant", "content": text}]

    def show(self, stream: Stream) -> str:
        """Print a stream; Ctrl-C aborts it and keeps what came."""
        text, started, output = "", time.monotonic(), None
        try:
            for output in stream:
                grown = output.outputs[0].text
                if self.stream:
                    print(grown[len(text) :].translate(HARMLESS), end="", flush=True)
                text = grown
        except KeyboardInterrupt:
            stream.abort()
            print(" (stopped)" if self.stream else text.translate(HARMLESS) + " (stopped)", end="")
        else:
            if not self.stream:
                print(text.translate(HARMLESS), end="")
        print(f"\n{RULER}", flush=True)
        if output is not None and output.error:
            raise APIError(output.error, 500)
        if sys.stderr.isatty() and output is not None:
            print(speed(output, time.monotonic() - started), file=sys.stderr)
        return text


def speed(output: RequestOutput, seconds: float) -> str:
    tokens = len(output.outputs[0].token_ids)
    return f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"
