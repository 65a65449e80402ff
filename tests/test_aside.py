"""Work beside the step loop has one core, and whoever asked for it keeps theirs."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from swiftlite.engine.aside import NICE, aside, give_way
from swiftlite.engine.native import load_library


def test_it_has_one_core_and_leaves_the_others_theirs() -> None:
    library = load_library()
    if library is None:
        pytest.skip("no C++ compiler")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert aside(torch.get_num_threads, library) == 1
        assert torch.get_num_threads() == 2
        assert aside(torch.get_num_threads, None) == 2  # and so has any other new thread
    finally:
        torch.set_num_threads(before)


def test_what_it_raises_is_raised_and_its_thread_ends() -> None:
    def fail() -> None:
        raise KeyError("here")

    threads = threading.active_count()
    with pytest.raises(KeyError, match="here"):
        aside(fail, None)
    assert threading.active_count() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_giving_way_is_the_threads_own() -> None:
    def nice() -> int:
        give_way()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert aside(nice, None) == max(NICE, before) and os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
