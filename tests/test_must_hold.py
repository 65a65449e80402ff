"""What must hold of every run and is easy to lose, through the real command where it is a command's promise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from swiftlite import cli
from swiftlite.data.store import Sample
from swiftlite.models.loading import load_model
from swiftlite.models.segments import register
from swiftlite.train import checkpoint, gradients
from swiftlite.train import loss as loss_module
from swiftlite.train.evaluation import Evaluation
from swiftlite.train.loss import TargetLoss
from swiftlite.train.ranks import Ranks
from tests.test_sft import PAIRS, training

QUIET = ["--report_to", "none", "--logging_steps", "1", "--sample_answers", "0", "--split_dataset_ratio", "0"]


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": q, "response": a}, ensure_ascii=False) + "\n" for q, a in PAIRS), encoding="utf-8")
    return path


def command(model: Path, data: Path, out: Path, *flags: str) -> list[str]:
    return ["--model", str(model), "--dataset", str(data), "--output_dir", str(out), *QUIET, *flags]


def test_rows_that_lose_their_target_are_dropped_and_counted(tmp_path, model, data, capsys):
    rows = tmp_path / "rows.jsonl"
    long = json.dumps({"query": "word " * 60, "response": "never seen"})
    rows.write_text(data.read_text(encoding="utf-8") + f"{long}\n{long}\n", encoding="utf-8")
    flags = ["--max_length", "48", "--truncation_strategy", "right", "--max_steps", "1"]
    assert cli.main(["sft", *command(model, rows, tmp_path / "out", *flags)]) == 0
    printed = capsys.readouterr().out
    assert "dropped           2  no target left after truncation; first: rows.jsonl:6, rows.jsonl:7" in printed
    assert "kept              5" in printed
    (run,) = (tmp_path / "out").glob("*/v*")
    assert "no target left after truncation" in (run / "report.html").read_text(encoding="utf-8")


def test_a_template_without_stop_tokens_is_refused(tmp_path, make_model, data, capsys):
    directory = make_model("qwen3", seed=7)
    endless = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = directory / name
        if name.endswith("json"):
            config = json.loads(file.read_text())
            config.pop("chat_template", None)
            file.write_text(json.dumps(config))
        else:
            file.write_text(endless)
    assert cli.main(["sft", *command(directory, data, tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "no target ends in a stop token" in said and "rows.jsonl:1" in said
    assert not (tmp_path / "out").exists()


def test_nothing_that_learns_is_an_error_that_names_it(tmp_path, model, data, capsys):
    assert cli.main(["sft", *command(model, data, tmp_path, "--lora_alpha", "0", "--max_steps", "2")]) == 1
    said = capsys.readouterr().err
    assert "every gradient of the first step is zero" in said and "model.layers.0.self_attn.q_proj.lora_A" in said
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize("flags", [[], ["--use_dora"]], ids=["ours", "through PEFT"])
def test_a_dead_adapter_is_found_beside_modules_that_learn(tmp_path, model, data, capsys, flags):
    flags = [*flags, "--lora_alpha", "0", "--modules_to_save", "norm", "--max_steps", "2"]
    assert cli.main(["sft", *command(model, data, tmp_path, *flags)]) == 1
    said = capsys.readouterr().err
    assert "the adapter does not learn" in said and "model.layers.0.self_attn.q_proj" in said and "--lora_alpha" in said
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_one_dead_module_is_named():
    def named(**gradients: float | None) -> list[tuple[str, torch.nn.Parameter]]:
        found = []
        for name, value in gradients.items():
            parameter = torch.nn.Parameter(torch.ones(2, 2))
            parameter.grad = None if value is None else torch.full((2, 2), value)
            found.append((name.replace("__", "."), parameter))
        return found

    said: list[str] = []
    parameters = named(a__lora_A=0.0, a__lora_B=1.0, b__lora_A=0.0, b__lora_B=0.0, c__lora_A=None, c__lora_B=None, head__weight=1.0)
    gradients.check(parameters, torch.tensor(2.0), False, said.append)
    assert said == [
        "note: no gradient reached c.lora_A, c.lora_B (2 of 7 tensors); they are not used by the model's forward pass and stay as they are",
        "note: in the first step the gradient is zero in b (1 of 3 adapted modules)",
    ]


def test_what_is_trained_is_float32(tmp_path, model, data):
    flags = ["--torch_dtype", "bfloat16", "--max_steps", "2", "--modules_to_save", "embed_tokens"]
    assert cli.main(["sft", *command(model, data, tmp_path, *flags)]) == 0
    (saved,) = tmp_path.rglob("checkpoint-2")
    weights = load_file(saved / "adapter_model.safetensors")
    assert weights and all(tensor.dtype == torch.float32 for tensor in weights.values())
    states = torch.load(saved / "trainer_state.pt", weights_only=True)["optimizer"]["state"].values()
    assert all(tensor.dtype == torch.float32 for state in states for tensor in state.values() if tensor.ndim)


class Largest(TorchDispatchMode):
    """The most rows of vocabulary size that any product of an operation had."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        stored = function is not torch.ops.aten.t.default  # the head's weight, turned
        if stored and isinstance(out, torch.Tensor) and out.ndim and out.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, out.numel() // self.vocabulary)
        return out


def test_evaluation_never_stores_logits(model, monkeypatch):
    loaded = load_model(model, torch.float32, torch.device("cpu"), register())
    vocabulary = loaded.config.vocab_size
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 16 * 4 * vocabulary)  # 16 rows
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(3, 200, 90).astype(np.int32), np.arange(90) > 5) for _ in range(8)]
    evaluation = Evaluation(samples, 4, True, TargetLoss(loaded), Ranks(), False, None)
    with Largest(vocabulary) as seen:
        values = evaluation.values(lambda: False)
    assert values is not None and values["eval_loss"] > 1
    assert 0 < seen.rows <= 16  # of 672 targets


def test_killed_at_any_moment_a_run_goes_on(tmp_path, model, data):
    """SIGKILL while every step saves: what is named checkpoint-N is whole, and the newest one is gone on with."""
    flags = [*command(model, data, tmp_path / "out", "--max_steps", "100000", "--save_steps", "1"), "--gradient_accumulation_steps", "1"]
    resumed: list[str] = []
    for attempt in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "swiftlite.cli", "sft", *(resumed or flags)], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line.startswith("saved")
            if seen == 4:
                break
        time.sleep(0.003 + 0.011 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = sorted((tmp_path / "out").glob("*/v*/checkpoint-*"), key=checkpoint.step_of)
        assert found
        for path in found:
            state, tensors = checkpoint.read(path)
            assert state["global_step"] == checkpoint.step_of(path) and tensors is not None
        resumed = ["--resume_from_checkpoint", str(found[-1])]
    step = checkpoint.step_of(found[-1])
    assert step >= 8
    assert cli.main(["sft", *resumed, "--max_steps", str(step + 2)]) == 0
    run = found[-1].parent
    assert [row["global_step"] for row in training(run)] == list(range(1, step + 3))
    assert not list(run.glob(".checkpoint-*"))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, model, data):
    """The disk fills up in mid-run (files beyond a size fail from the third save on): one error line, and step 2 is whole."""
    limited = """
import resource, sys
from swiftlite import cli
from swiftlite.train import checkpoint, gradients
real, count = checkpoint.write, []
def write(*args):
    count.append(1)
    if len(count) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    return real(*args)
checkpoint.write = write
sys.exit(cli.main(sys.argv[1:]))
"""
    flags = command(model, data, tmp_path, "--max_steps", "9", "--save_steps", "1", "--gradient_accumulation_steps", "1")
    done = subprocess.run([sys.executable, "-c", limited, "sft", *flags], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "error: cannot write" in done.stderr and "checkpoint-3" in done.stderr
    assert "Traceback" not in done.stderr
    found = sorted(p.name for p in tmp_path.rglob("*checkpoint-*"))
    assert found == ["checkpoint-1", "checkpoint-2"]
    (last,) = tmp_path.rglob("checkpoint-2")
    assert cli.main(["sft", "--resume_from_checkpoint", str(last), "--max_steps", "3"]) == 0
