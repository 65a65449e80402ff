"""Ctrl-C and SIGTERM as a wish that the loop grants at the next safe point. A second Ctrl-C does not wait.

Before the loop there is nothing to save: SIGTERM then ends the command as an exception would, so that what is half written goes.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn


class Terminated(BaseException):
    """SIGTERM before training began."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Within, until an Interrupt takes over: SIGTERM raises Terminated. Does nothing outside the main thread (Python's rule)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupt:
    """`with Interrupt() as stop: ... if stop.signal: save and leave`. Does nothing outside the main thread (Python's rule)."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is _terminate else handler)  # training has begun, and is over

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # \n: the shell has just printed ^C
        print("\nstopping after this forward pass and saving; Ctrl-C again leaves at once", flush=True)
