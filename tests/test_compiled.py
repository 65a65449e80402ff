"""--torch_compile: the same losses and gradients as without; without a compiler training goes on."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from swiftlite import cli
from swiftlite.models.loading import load_model
from swiftlite.models.segments import register
from swiftlite.train import compiled
from swiftlite.train.batches import collate
from swiftlite.train.loss import TargetLoss
from tests.test_attention_native import needs_compiler
from tests.test_segments import rows
from tests.test_sft import PAIRS, assert_close, trajectory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def words(make_model, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"query": f"{question} {'so ' * i}", "response": answer} for i in range(4) for question, answer in PAIRS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    model = make_model("qwen3", tie_word_embeddings=True, num_hidden_layers=2)
    flags = ["--report_to", "none", "--logging_steps", "1", "--learning_rate", "1e-2", "--per_device_train_batch_size", "3"]
    flags += ["--gradient_accumulation_steps", "2", "--max_steps", "3"]
    return ["sft", "--model", str(model), "--dataset", str(path), "--add_version", "false", *flags]


@pytest.fixture
def traced(monkeypatch) -> None:
    """Traced and cut as for inductor, but run by eager kernels: no C++ is compiled."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))


def test_same_losses(words, tmp_path, traced, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(compiled, "unavailable", lambda device: None)
    assert cli.main([*words, "--output_dir", str(tmp_path / "eager")]) == 0
    torch._dynamo.utils.counters.clear()
    assert cli.main([*words, "--torch_compile", "true", "--output_dir", str(tmp_path / "compiled")]) == 0
    assert_close(trajectory(tmp_path / "compiled"), trajectory(tmp_path / "eager"))
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 20  # layers share them, lengths too


@needs_compiler
def test_through_inductor(make_model):
    same_gradients(make_model, checkpointing=False)


def test_recomputed_layers(make_model, traced):
    same_gradients(make_model, checkpointing=True)


def same_gradients(make_model, checkpointing: bool) -> None:
    torch.compiler.reset()
    model = load_model(make_model("llama", num_hidden_layers=1), torch.float32, CPU, register()).train()
    loss = TargetLoss(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [collate(rows(*lengths), CPU) for lengths in ((9, 20, 31), (40, 7))]

    def gradients() -> list[torch.Tensor]:
        found = []
        for batch in batches:
            loss(batch)[0].backward()
            found += [parameter.grad for parameter in model.parameters()]
            model.zero_grad()
        return found

    want = gradients()
    torch._dynamo.utils.counters.clear()
    assert compiled.compile_layers(model, checkpointing) == (4 if checkpointing else 1)
    for got, expected in zip(gradients(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_without_a_compiler_training_goes_on(words, tmp_path, capsys):
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        assert cli.main([*words, "--torch_compile", "true", "--output_dir", str(tmp_path)]) == 0
    assert "training goes on without" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-3").is_dir()
