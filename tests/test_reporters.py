"""Reporters: every row reaches each of them; a missing package is said before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from swiftlite.errors import UsageError
from swiftlite.train import reporters
from swiftlite.train.log import Logbook

# Stands in where the real package is not installed: what our code calls, written down.
STAND_IN = """
import json, pathlib
class Run:
    def log(self, values, step): calls.append(["log", values, step])
    def finish(self): calls.append(["finish"]); pathlib.Path(out, "calls.json").write_text(json.dumps(calls))
def init(**settings):
    global calls, out, current
    calls, out, current = [["init", settings]], settings.get("dir") or settings["logdir"], Run()
    pathlib.Path(out).mkdir(exist_ok=True)
    return current
def log(values, step): current.log(values, step)
def finish(): current.finish()
"""


def write_rows(run: Path, *names: str) -> None:
    (run / "sft_args.json").write_text('{"lora_rank": 8}')
    logbook = Logbook(run, 4, [], names)
    row = {"loss": 2.0, "token_acc": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_s": 10.0, "memory_gb": 1.0, "epoch": 0.5}
    logbook.train({**row, "global_step": 2}, 1.0)
    logbook.evaluation({"eval_loss": 1.5, "eval_token_acc": 0.75, "epoch": 1.0, "global_step": 4})
    logbook.close()


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    reporters.check(("tensorboard",))
    reporters.check(("none",))
    with pytest.raises(UsageError, match="wandbb"):
        reporters.check(("wandbb",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "swanlab"):
        with pytest.raises(UsageError, match=f"pip install {name}"):
            reporters.check(("tensorboard", name))


def test_all_means_what_is_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in ("tensorboard", "swanlab") else None)
    assert reporters.installed() == ("tensorboard", "swanlab")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reporters.installed() == ()
    assert "none is installed" in capsys.readouterr().out


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_rows(tmp_path, "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(4, 1.5)]


@pytest.mark.parametrize(("name", "where"), [("wandb", "."), ("swanlab", "swanlog")])
def test_what_is_sent(name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / f"{name}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    write_rows(tmp_path, name)
    sys.modules.pop(name)
    (_, settings), first, second, last = json.loads((tmp_path / where / "calls.json").read_text())
    assert settings["project"] == "swiftlite" and settings["config"] == {"lora_rank": 8}
    assert first[1]["train/loss"] == 2.0 and first[2] == 2
    assert second[1:] == [{"eval/loss": 1.5, "eval/token_acc": 0.75, "eval/epoch": 1.0}, 4] and last == ["finish"]


@pytest.mark.parametrize(("name", "written"), [("wandb", "wandb/offline-run-*/*.wandb"), ("swanlab", "swanlog/*")])
def test_the_real_packages(name: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    write_rows(tmp_path, name)
    assert list(tmp_path.glob(written))
