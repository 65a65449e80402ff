"""Which checkpoints a run keeps, through the real command: its own newest and its best, and everybody else's."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swiftlite import cli
from swiftlite.train.progress import Progress
from tests.test_ranks import data, words  # noqa: F401 (fixtures)

BARE = ["--report_to", "none", "--logging_steps", "1", "--split_dataset_ratio", "0"]


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))


def state(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())


def result(run: Path) -> dict:
    return json.loads((run / "logging.jsonl").read_text().splitlines()[-1])


def test_a_second_run_into_the_same_folder_keeps_its_own_result(tmp_path, words):  # noqa: F811
    same = ["sft", *words, *BARE, "--add_version", "false", "--output_dir", str(tmp_path)]
    assert cli.main([*same, "--max_steps", "6", "--save_steps", "2", "--lora_rank", "4"]) == 0
    assert steps(tmp_path) == [4, 6]
    assert cli.main([*same, "--max_steps", "3", "--save_steps", "1"]) == 0
    assert steps(tmp_path) == [2, 3, 4, 6]
    assert Path(result(tmp_path)["last_model_checkpoint"]) == tmp_path / "checkpoint-3"
    assert json.loads((tmp_path / "checkpoint-3" / "adapter_config.json").read_text())["r"] == 8  # the second run's


def test_going_back_keeps_what_is_to_be_gone_on_with(tmp_path, words):  # noqa: F811
    same = ["sft", *words, *BARE, "--add_version", "false", "--output_dir", str(tmp_path)]
    assert cli.main([*same, "--max_steps", "40", "--save_steps", "10", "--save_total_limit", "9"]) == 0
    flags = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-10"), "--save_total_limit", "1", "--save_steps", "5"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "swiftlite.cli", "sft", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("saved "):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    advice = next(line.split()[-1] for line in rest.splitlines() if "--resume_from_checkpoint" in line)
    assert Path(advice).is_dir() and 15 <= int(advice.rpartition("-")[2]) < 40, rest
    assert set(steps(tmp_path)) >= {20, 30, 40} and 10 not in steps(tmp_path)  # the run before the turn is left alone


def test_strangers_beside_a_copied_checkpoint_stay(tmp_path, words):  # noqa: F811
    """Both runs wrote a checkpoint-2; only the copied one's own may go."""
    for name, limit in (("mine", "9"), ("stranger", "9")):
        flags = ["--max_steps", "4", "--save_steps", "2", "--save_total_limit", limit, "--add_version", "false"]
        assert cli.main(["sft", *words, *BARE, *flags, "--output_dir", str(tmp_path / name)]) == 0
    shared = tmp_path / "stranger"
    shutil.copytree(tmp_path / "mine" / "checkpoint-4", shared / "checkpoint-3")  # whatever it is called there
    before = state(shared, 2)
    resume = ["--resume_from_checkpoint", str(shared / "checkpoint-3"), "--save_total_limit", "1", "--save_steps", "1"]
    assert cli.main(["sft", *resume, "--max_steps", "7"]) == 0
    assert state(shared, 2) == before and steps(shared)[-1] == 7
    assert {2, 4} <= set(steps(shared)) and not {5, 6} & set(steps(shared))


@pytest.mark.parametrize(("limit", "rate"), [("1", "3"), ("2", "1e-2")])
def test_a_new_best_is_saved_whenever_it_is_found(tmp_path, words, limit, rate):  # noqa: F811
    """Evaluations between the saves; a rate that destroys the model after a while, and one that improves it to the end."""
    flags = ["--max_steps", "8", "--save_steps", "8", "--eval_steps", "1", "--save_total_limit", limit, "--split_dataset_ratio", "0.2"]
    flags += ["--warmup_steps", "6", "--learning_rate", rate, "--tuner_type", "full", "--report_to", "none", "--add_version", "false"]
    assert cli.main(["sft", *words, *flags, "--output_dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    evals = {row["global_step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(evals, key=evals.__getitem__)
    assert (best < 8) == (rate == "3")
    assert rows[-1]["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    assert rows[-1]["best_metric"] == evals[best]
    assert {best, 8} <= set(steps(tmp_path)) and len(steps(tmp_path)) <= 2
    assert state(tmp_path, best)["progress"]["best_metric"] == evals[best]


def test_best_is_found_after_moving_and_linked_from_another_folder(tmp_path, words, capsys):  # noqa: F811
    flags = ["--max_steps", "4", "--save_steps", "1", "--eval_steps", "1", "--split_dataset_ratio", "0.2", "--save_total_limit", "9"]
    flags += ["--warmup_steps", "4", "--learning_rate", "30", "--report_to", "none", "--add_version", "false", "--tuner_type", "full"]
    assert cli.main(["sft", *words, *flags, "--output_dir", str(tmp_path / "old")]) == 0
    best = Path(result(tmp_path / "old")["best_model_checkpoint"]).name
    assert best in ("checkpoint-1", "checkpoint-2", "checkpoint-3")
    (tmp_path / "old").rename(tmp_path / "moved")
    last = str(tmp_path / "moved" / "checkpoint-4")
    new = [
        "--output_dir",
        str(tmp_path / "new"),
        "--add_version",
        "false",
        "--create_checkpoint_symlink",
        "true",
        "--save_total_limit",
        "1",
    ]
    assert cli.main(["sft", "--resume_from_checkpoint", last, "--max_steps", "5", *new]) == 0
    assert (tmp_path / "new" / "best").resolve() == tmp_path / "moved" / best
    assert (tmp_path / "new" / "best" / "model.safetensors").is_file() and (tmp_path / "new" / "last" / "model.safetensors").is_file()
    assert steps(tmp_path / "moved") == [1, 2, 3, 4]  # another folder's are not rotated

    shutil.rmtree(tmp_path / "moved" / best)
    capsys.readouterr()
    link = ["--create_checkpoint_symlink", "true", "--max_steps", "5"]
    assert cli.main(["sft", "--resume_from_checkpoint", last, *link]) == 0
    assert "is no longer there" in capsys.readouterr().out
    assert (tmp_path / "moved" / "best").resolve() == tmp_path / "moved" / "checkpoint-5"


def test_judgement():
    progress = Progress()
    seen = [progress.judge(value, True, Path(f"checkpoint-{value}")) for value in (float("nan"), 2.0, 3.0, float("nan"), 1.0)]
    assert seen == [False, True, False, False, True]
    assert (progress.best_metric, progress.best_model_checkpoint, progress.without_best) == (1.0, "checkpoint-1.0", 0)
    assert progress.judge(1.5, False, Path("x"))
