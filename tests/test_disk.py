"""Full disks and early signals: a run that cannot write goes on or says why; one that has not begun leaves nothing behind."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swiftlite import cli
from swiftlite.disk import mount
from swiftlite.errors import CheckpointError
from swiftlite.train.log import Logbook
from tests.test_ranks import data, launched, words  # noqa: F401 (fixtures)
from tests.test_sft import command

ROW = {"loss": 2.0, "token_acc": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_s": 10.0, "memory_gb": 1.0, "epoch": 0.5}


@contextmanager
def full(size: int) -> Iterator[None]:
    """No file grows beyond `size`, as on a full disk (root, who may write anywhere, is refused too)."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_mount():
    assert mount(Path("/proc/self/none/at/all")) == Path("/proc") and mount(Path("/")) == Path("/")


def test_rows_that_cannot_be_written_are_made_up_for(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    logbook = Logbook(tmp_path, 9, [], ("tensorboard",))
    logbook.train({**ROW, "global_step": 1}, 1.0)
    with full(400):
        for step in (2, 3, 4):
            logbook.train({**ROW, "global_step": step}, 1.0)
    logbook.train({**ROW, "global_step": 5}, 1.0)
    logbook.final({"global_step": 5})
    logbook.close()
    rows = [json.loads(line)["global_step"] for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 5]
    printed = capsys.readouterr().out
    assert printed.count("logging.jsonl lacks rows: File too large") == 1 and f"make room on {mount(tmp_path)}" in printed
    assert printed.count("note: TensorBoard fails and gets no more rows") == 1
    assert not list(tmp_path.glob(".logging*"))


def test_no_first_row_is_an_error(tmp_path):
    with full(5), pytest.raises(CheckpointError, match=r"make room on "):
        Logbook(tmp_path, 9, [{**ROW, "global_step": 1}], ())


FILLING = """
import resource, sys
from swiftlite import cli
from swiftlite.train import log
real, size = log.Logbook.train, int(sys.argv[1])
def train(self, row, eta):
    if row["global_step"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    real(self, row, eta)
log.Logbook.train = train
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_disk_that_fills_in_mid_run(tmp_path, words):  # noqa: F811
    """The log fails, then the checkpoint: notes and one typed error, the last good checkpoint stays."""
    flags = ["sft", *words, "--max_steps", "8", "--save_steps", "2", "--logging_steps", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", FILLING, "500", *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "logging.jsonl lacks rows" in done.stdout and "note: TensorBoard fails" in done.stdout
    assert "error: cannot write" in done.stderr and f"make room on {mount(tmp_path)}, then" in done.stderr
    (last,) = tmp_path.rglob("checkpoint-2")
    assert cli.main(["sft", "--resume_from_checkpoint", str(last), "--max_steps", "3"]) == 0


def test_what_comes_after_the_last_checkpoint_may_fail(tmp_path, words, monkeypatch, capsys):  # noqa: F811
    """Curves, report and the last row do not fit any more: the run is done all the same."""
    from swiftlite.train import plots

    real = plots._draw

    def draw(*args):
        with full(100):
            return real(*args)

    monkeypatch.setattr(plots, "_draw", draw)
    assert cli.main(["sft", *words, "--max_steps", "2", "--logging_steps", "1", "--output_dir", str(tmp_path)]) == 0
    assert "note: no curves in" in capsys.readouterr().out


@pytest.mark.parametrize("until", ["device: ", "rows encoded", "trained: "])
def test_sigterm_before_training(until, tmp_path, words):  # noqa: F811
    """While it loads and encodes: exit code 0, nothing written."""
    model, rows = Path(words[1]), Path(words[3])
    slow = [sys.executable, "-u", *command(model, rows, tmp_path / "out", "--max_steps", "100000")[1:]]
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(until):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    assert "nothing was to be saved" in rest or "--resume_from_checkpoint" in rest
    if until != "trained: ":  # there the loop may have begun
        assert "stopped before training began; nothing was to be saved" in rest and not (tmp_path / "out").exists()


def test_sigterm_before_several_processes_train(tmp_path, words):  # noqa: F811
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "swiftlite.cli", "sft", *words, "--output_dir", str(tmp_path / "out"), "--max_steps", "100000"],
        env={**launched(), "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("device: "):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in rest, rest
    assert rest.count("nothing was to be saved") == 1 and not (tmp_path / "out").exists()
