"""Several processes through the real command: equal to one, resumed, stopped, and explained when they fail.

What the launcher itself does starts processes; the rest shares two warm ones (pair.py): most of a start is importing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from swiftlite import cli
from swiftlite.errors import TrainError, UsageError
from swiftlite.train import launch
from tests.test_sft import PAIRS, assert_close, training, trajectory

COMMON = ["--report_to", "none", "--logging_steps", "1", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"query": f"{question} {i}", "response": answer} for i in range(4) for question, answer in PAIRS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words(make_model, data) -> list[str]:
    return ["--model", str(make_model("qwen3", tie_word_embeddings=True)), "--dataset", str(data)]


def launched() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2"}


def folder(out: Path) -> Path:
    (found,) = out.glob("*/v*")  # one run's folder, whatever the number of processes
    return found


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_two_processes_equal_one_and_resume(tuner, tmp_path, words, pair):
    """20 rows, 8 a step in passes of 2: the last step of an epoch has one pass for two processes."""
    flags = ["sft", *COMMON, *words, "--tuner_type", tuner, "--max_steps", "6", "--split_dataset_ratio", "0.1", "--packing", "false"]
    flags += ["--save_steps", "3", "--save_total_limit", "9", "--eval_steps", "3"]
    assert cli.main([*flags, "--gradient_accumulation_steps", "4", "--output_dir", str(tmp_path / "one")]) == 0
    printed = pair(*flags, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "two"))
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    assert_close(trajectory(two), trajectory(one))
    assert len(trajectory(two)) == 6
    assert printed.count("last_model_checkpoint: ") == 1

    def last(run: Path) -> tuple[dict, dict]:
        rows = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
        return next(row for row in reversed(rows) if "eval_loss" in row), rows[-1]

    (evaluated, ended), (evaluated_1, ended_1) = last(two), last(one)
    assert evaluated == pytest.approx(evaluated_1, rel=1e-4)
    assert ended["tokens"] == ended_1["tokens"]
    name = "adapter_model.safetensors" if tuner == "lora" else "model.safetensors"
    weights, weights_1 = (load_file(run / "checkpoint-6" / name) for run in (two, one))
    assert all((weights[key] - weights_1[key]).abs().max() < 1e-3 for key in weights_1)

    if tuner == "lora":
        broken = tmp_path / "broken"
        shutil.copytree(two, broken)
        shutil.rmtree(broken / "checkpoint-6")
        resume = ["sft", "--resume_from_checkpoint", str(broken / "checkpoint-3")]
        pair(*resume)
        assert trajectory(broken) == trajectory(two)
        again = load_file(broken / "checkpoint-6" / name)
        assert all((weights[key] == again[key]).all() for key in weights)


def test_a_signal_saves(tmp_path, words):
    process = subprocess.Popen(
        [sys.executable, "-m", "swiftlite.cli", "sft", *COMMON, *words, "--output_dir", str(tmp_path), "--max_steps", "100000"],
        env=launched(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    before = []
    for line in process.stdout:
        before.append(line)
        if line.startswith("step") and "/100000" in line and not line.split("/")[0].endswith(" 1"):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "".join(before) + rest
    assert "Traceback" not in rest
    resume = next(line.strip() for line in rest.splitlines() if line.strip().startswith("swift sft --resume_from_checkpoint"))
    step = json.loads((Path(resume.split()[-1]) / "trainer_state.json").read_text())["global_step"]
    assert [row["global_step"] for row in training(folder(tmp_path))] == list(range(1, step + 1))


def test_errors_are_said_once(tmp_path, words):
    done = subprocess.run(
        [sys.executable, "-m", "swiftlite.cli", "sft", *COMMON, *words, "--target_modules", "q_prj", "--output_dir", str(tmp_path)],
        env=launched(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert "q_proj" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named(rank, tmp_path, words):
    """What the others say about it is no cause, and the first may be the one that can say nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "swiftlite.cli", "sft", *COMMON, *words, "--output_dir", str(tmp_path), "--max_steps", "100000"],
        env=launched(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step"))
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[rank], signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: process {rank} was killed (SIGKILL)" in rest
    assert "Traceback" not in rest


def test_the_process_that_failed_is_quoted_not_the_one_that_misses_it():
    """The first is told by its connection that the second has gone; why, only the second knows."""
    script = (
        "import os, sys\nfrom swiftlite.train.ranks import Lost\n"
        "if os.environ['RANK'] == '0': sys.exit(Lost.exit_code)\nsys.exit('CUDA out of memory')"
    )
    with tempfile.TemporaryFile() as errors:
        running = [subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "RANK": rank}, stderr=errors) for rank in ("0", "1")]
        with pytest.raises(TrainError, match=r"process 1 failed \(exit code 1\)\n  why: CUDA out of memory"):
            launch._wait(running, errors, [])


@pytest.mark.parametrize(
    ("given", "processes"),
    [
        ({}, 0),
        ({"NPROC_PER_NODE": "1"}, 0),
        ({"NPROC_PER_NODE": "4"}, 4),
        ({"NNODES": "2"}, 1),
        ({"NPROC_PER_NODE": "4", "RANK": "1"}, 0),  # a child, or under torchrun
    ],
)
def test_when_processes_are_launched(given, processes):
    assert launch.wanted(given) == processes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE must be a number"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "machines count from 0"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR"),
    ],
)
def test_wrong_environments_are_explained(given, message):
    with pytest.raises(UsageError, match=message):
        launch.launch(["sft"], launch.wanted(given) or 1, given)
