"""Work outside the step loop, in threads that end with it: loading the model on all cores, loading adapters on one.

GNU's OpenMP keeps a team of threads for every thread that ever ran a parallel region, until that thread ends. As soon as all teams
together have more threads than there are cores, its barriers sleep instead of spinning (libgomp's gomp_managed_threads): decoding took a
quarter longer while the thread that had loaded the model lived on. It does not know what the work is.
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

from swiftlite.models.device import use_device

T = TypeVar("T")
NICE = 10


def in_own_thread(function: Callable[[], T], device: torch.device) -> T:
    """What the function returns or raises, on all cores."""
    with ThreadPoolExecutor(1, "swiftlite-load", use_device, (device,)) as pool:
        return pool.submit(function).result()


def aside(function: Callable[[], T], library: ctypes.CDLL | None, device: torch.device) -> T:
    """What the function returns or raises. Without `library` (kernels/build.py) torch's operations take all cores as everywhere."""
    with ThreadPoolExecutor(1, "swiftlite-aside", _begin_aside, (library, device)) as pool:
        return pool.submit(function).result()


def _begin_aside(library: ctypes.CDLL | None, device: torch.device) -> None:
    use_device(device)
    torch.get_num_threads()  # torch sets OpenMP's number at a thread's first look; not after ours
    if library is not None:
        library.swift_one_thread()


def give_way() -> None:
    """The rest of this thread's work can wait (Linux only: elsewhere a priority belongs to the process)."""
    if sys.platform == "linux":
        me = (os.PRIO_PROCESS, threading.get_native_id())
        os.setpriority(*me, max(NICE, os.getpriority(*me)))
