"""How the loop's thread wakes the readers of a request: threads by a condition, asyncio tasks by an event of their loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable


class Signal:
    """How the loop's thread wakes the readers of one request."""

    __slots__ = ("condition", "event", "every", "loop", "sleeping", "waiting")

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiting = False  # a thread sleeps on the condition
        self.sleeping = False  # a task sleeps on the event
        self.every = False  # somebody wants each change, not only the end
        self.loop: asyncio.AbstractEventLoop | None = None
        self.event: asyncio.Event | None = None


def wake(signals: Iterable[Signal]) -> None:
    """Wake the readers; asyncio loops are entered once each, however many of their streams changed."""
    tasks: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for signal in signals:
        if signal.waiting:
            with signal.condition:
                signal.waiting = False
                signal.condition.notify_all()
        if signal.sleeping and signal.loop is not None and signal.event is not None:
            signal.sleeping = False
            tasks.setdefault(signal.loop, []).append(signal.event)
    for loop, events in tasks.items():
        try:
            loop.call_soon_threadsafe(_set_all, events)
        except RuntimeError:  # that event loop is closed: nobody reads there any more
            continue


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
