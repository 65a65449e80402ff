"""Work beside the step loop, in a thread of its own that takes one core at most and ends with its work.

A thread that once ran a parallel region of OpenMP keeps its helpers until it ends, and while there are more of them than cores, nobody
spins at a barrier: one load in a server's worker thread would slow down every step from then on. It does not know what the work is.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
NICE = 10


def aside(function: Callable[[], T], library: ctypes.CDLL | None) -> T:
    """What the function returns or raises. Without `library` (native.py) torch's operations take all cores as everywhere."""
    with ThreadPoolExecutor(1, "swiftlite-aside", _one_core, (library,)) as pool:
        return pool.submit(function).result()


def _one_core(library: ctypes.CDLL | None) -> None:
    torch.get_num_threads()  # torch sets OpenMP's number at a thread's first look; not after ours
    if library is not None:
        library.swift_one_thread()


def give_way() -> None:
    """The rest of this thread's work can wait (Linux only: elsewhere a priority belongs to the process)."""
    if sys.platform == "linux":
        me = (os.PRIO_PROCESS, threading.get_native_id())
        os.setpriority(*me, max(NICE, os.getpriority(*me)))
