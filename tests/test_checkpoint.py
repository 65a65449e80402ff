"""Checkpoints: whole or absent, rotated, checked on reading."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from swiftlite.errors import CheckpointError
from swiftlite.train import checkpoint


def save(size: int):
    return lambda folder: (folder / "weights.bin").write_bytes(b"x" * size)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_round_trip(tmp_path):
    tensors = {"random": {"cpu": torch.get_rng_state()}, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}}
    path = checkpoint.write(tmp_path, 7, {"global_step": 7}, tensors, save(10))
    assert path == tmp_path / "checkpoint-7"
    assert checkpoint.step_of(path) == 7
    state, read = checkpoint.read(path)
    assert state["global_step"] == 7
    assert state["files"]["weights.bin"] == 10
    assert torch.equal(read["random"]["cpu"], tensors["random"]["cpu"])
    assert names(tmp_path) == ["checkpoint-7"]


def test_same_step_is_replaced(tmp_path):
    checkpoint.write(tmp_path, 1, {"global_step": 1}, None, save(10))
    checkpoint.write(tmp_path, 1, {"global_step": 1}, None, save(20))
    assert (tmp_path / "checkpoint-1" / "weights.bin").stat().st_size == 20
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 248832 vs 248724"),  # torch.save on a full disk
    ],
)
def test_full_disk_leaves_the_last_good_one(tmp_path, error):
    checkpoint.write(tmp_path, 1, {"global_step": 1}, None, save(10))

    def full(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"x")
        raise error

    for step in (1, 2):
        with pytest.raises(CheckpointError, match=f"checkpoint-{step}"):
            checkpoint.write(tmp_path, step, {}, None, full)
    assert names(tmp_path) == ["checkpoint-1"]
    checkpoint.read(tmp_path / "checkpoint-1")


def test_our_own_bugs_keep_their_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        checkpoint.write(tmp_path, 1, {}, None, lambda folder: 1 / 0)
    assert names(tmp_path) == []


def test_damage_is_named(tmp_path):
    path = checkpoint.write(tmp_path, 3, {"global_step": 3}, None, save(100))
    (path / "weights.bin").write_bytes(b"x" * 60)
    with pytest.raises(CheckpointError, match=r"weights.bin has 60 of 100 bytes"):
        checkpoint.read(path)
    (path / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match=r"weights.bin is missing"):
        checkpoint.read(path)
    (path / checkpoint.STATE).write_text("{")
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        checkpoint.read(path)
    with pytest.raises(CheckpointError, match=r"newest there is .*checkpoint-3"):
        checkpoint.read(tmp_path / "checkpoint-4")


def test_rotation_keeps_best_and_newest_of_its_own(tmp_path):
    for step in (1, 2, 3, 10, 99):
        checkpoint.write(tmp_path, step, {}, None, save(1))
    own, best = ["checkpoint-1", "checkpoint-10", "checkpoint-2", "checkpoint-3"], str(tmp_path / "checkpoint-1")  # 99: a stranger
    own = checkpoint.rotate(tmp_path, own, 3, best)
    assert own == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # the order written decides, not the number
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-99"]
    assert checkpoint.rotate(tmp_path, own, 1, best) == ["checkpoint-1", "checkpoint-3"]
    assert checkpoint.rotate(tmp_path, ["checkpoint-1", "checkpoint-3"], 1, "/elsewhere/checkpoint-1") == ["checkpoint-3"]
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-99"]


WRITER = """
import sys
from pathlib import Path
from swiftlite.train import checkpoint
def save(folder):
    for i in range(20):
        (folder / f"part{i}.bin").write_bytes(b"x" * 200_000)
print("ready", flush=True)
own = []
for step in range(100_000):
    own.append(checkpoint.write(Path(sys.argv[1]), step, {"global_step": step}, None, save).name)
    own = checkpoint.rotate(Path(sys.argv[1]), own, 2, None)
"""


def test_killed_at_any_moment_what_is_named_checkpoint_is_whole(tmp_path):
    seen = 0
    for attempt in range(5):
        run = tmp_path / str(attempt)
        run.mkdir()
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.11 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in run.glob("checkpoint-*"):
            state, _ = checkpoint.read(path)
            assert json.loads((path / checkpoint.STATE).read_text())["global_step"] == state["global_step"] == checkpoint.step_of(path)
            seen += 1
    assert seen > 0
