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

import swiftlite.engine.lora
from swiftlite.engine.aside import NICE, aside, give_way
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.request import SamplingParams
from swiftlite.kernels.build import load_library
from swiftlite.models import device as devices

CPU = torch.device("cpu")


def test_it_has_one_core_and_leaves_the_others_theirs() -> None:
    library = load_library()
    if library is None:
        pytest.skip("no C++ compiler")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert aside(torch.get_num_threads, library, CPU) == 1
        assert torch.get_num_threads() == 2
        assert aside(torch.get_num_threads, None, CPU) == 2  # and so has any other new thread
    finally:
        torch.set_num_threads(before)


def test_what_it_raises_is_raised_and_its_thread_ends() -> None:
    def fail() -> None:
        raise KeyError("here")

    threads = threading.active_count()
    with pytest.raises(KeyError, match="here"):
        aside(fail, None, CPU)
    assert threading.active_count() == threads


def test_every_thread_of_an_engine_takes_its_device(make_model, make_adapter, monkeypatch) -> None:
    """A thread begins with the first GPU, whichever the engine's is."""
    taken: dict[str, torch.device] = {}

    def note(device: torch.device) -> None:
        taken[threading.current_thread().name.rpartition("_")[0] or threading.current_thread().name] = device

    for module in (devices, swiftlite.engine.aside, swiftlite.engine.lora):
        monkeypatch.setattr(module, "use_device", note)
    path = make_model("llama", num_hidden_layers=1)
    with Engine(path, EngineConfig(num_blocks=8), device="cpu", dtype="float32") as engine:
        assert taken == {"swiftlite-load": CPU}
        engine.register_adapter("a", make_adapter(path))
        assert engine.generate([3], SamplingParams(max_tokens=1), "a")[0].error is None
    assert taken == dict.fromkeys(("swiftlite-load", "swiftlite-engine", "swiftlite-adapters", "swiftlite-aside"), CPU)


def test_a_gpu_is_taken_by_its_number(monkeypatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("cuda:1", "cuda", "cpu"):
        devices.use_device(torch.device(name))
    assert taken == [torch.device("cuda:1")]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_giving_way_is_the_threads_own() -> None:
    def nice() -> int:
        give_way()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert aside(nice, None, CPU) == max(NICE, before) and os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


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
