"""Work beside the step loop has one core, and whoever asked for it keeps theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from swiftlite.engine.aside import NICE, aside, give_way
from swiftlite.kernels.build import load_library


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


THREADS_OF_AN_ENGINE = """
import os, sys, time, torch
torch.set_num_threads(2)
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
before = set(os.listdir("/proc/self/task"))
engine = Engine(sys.argv[1], EngineConfig(num_blocks=8))
for _ in range(50):  # the last ones need a moment to end
    left = set(os.listdir("/proc/self/task")) - before
    if not left:
        break
    time.sleep(0.1)
print("left:", len(left))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_an_engine_leaves_no_team_with_the_thread_that_made_it(make_model, tmp_path: Path) -> None:
    """With every choice left to `auto`, the probe of the dtype included."""
    path: Path = make_model("qwen3")
    settings = json.loads((path / "config.json").read_text()) | {"dtype": None}  # else the checkpoint's dtype is taken without a probe
    shutil.copytree(path, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    env = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS_OF_AN_ENGINE, str(tmp_path / "model")], env=env, capture_output=True, text=True, timeout=120
    )
    assert "a matrix product in bfloat16 runs at" in done.stdout and done.stdout.endswith("left: 0\n"), done.stdout + done.stderr
