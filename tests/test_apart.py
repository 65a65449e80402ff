"""Models that do not keep packed documents apart are found out, and trained one row a forward pass: equal to transformers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from swiftlite.errors import UsageError
from swiftlite.models import apart
from swiftlite.models.loading import load_model
from swiftlite.models.segments import NAME, Unheard, register
from swiftlite.train.batches import collate
from swiftlite.train.lora import Lora, LoraSpec, select
from swiftlite.train.loss import TargetLoss
from tests.test_segments import Row, rows
from tests.test_sft import QUIET, assert_close, data, model, sft, trajectory  # noqa: F401 (fixtures)

CPU = torch.device("cpu")
PACKED = ["qwen3", "mistral", "gemma2", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "phimoe", "granitemoe", "phi", "gpt2"]
UNHEARD = {"nemotron": "where a row ends", "stablelm": "where a row ends", "phimoe_window": "how far", "llama4": "how far"}
RUN_ON = [
    "lfm2", "qwen3_5", "qwen3_next", "falcon_h1", "bamba", "mamba2", "nemotron_h", "recurrent_gemma", "minimax", "jamba",
]  # fmt: skip


def load(path):
    return load_model(path, torch.float32, CPU, register())


def stock(path, samples: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of plain transformers, row by row."""
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(())
    for sample in samples:
        ids = torch.tensor(sample.ids.astype(np.int64))[None]
        logits = net(input_ids=ids, use_cache=False).logits[0, :-1].float()
        keep = torch.tensor(sample.mask[1:])
        total = total + F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="sum")
    total.backward()
    return total.item(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [*PACKED, *UNHEARD, *RUN_ON])
def test_loss_and_gradient_are_those_of_rows_alone(make_model, family):
    path, samples = make_model(family), rows(40, 7, 33, 23)
    net = load(path)
    reason = apart.why_not(net)
    assert (reason is None) == (family in PACKED)
    assert not net.training
    assert net.config._attn_implementation == ("sdpa" if family in UNHEARD else NAME)
    assert UNHEARD.get(family, "") in (reason or "")
    loss, total = TargetLoss(net), 0.0
    for group in [samples] if reason is None else [[sample] for sample in samples]:
        nll, _ = loss(collate(group, CPU))
        nll.backward()
        total += nll.item()
    want, gradients = stock(path, samples)
    assert total == pytest.approx(want, rel=2e-5)
    mine = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert set(mine) == set(gradients)
    for name, grad in gradients.items():
        torch.testing.assert_close(mine[name], grad, rtol=2e-3, atol=2e-4 * max(1.0, grad.abs().max().item()), msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "phimoe", *UNHEARD, *RUN_ON])
def test_adapters_on_them_have_the_gradients_of_their_definition(make_model, family):
    """W + s B A in plain transformers: our layers stand where models read their linears' weights, and not where routers are."""
    path, (sample,) = make_model(family), rows(33)
    net = load(path)
    apart.why_not(net)
    lora = Lora(net, LoraSpec(4, 8))
    generator = torch.Generator().manual_seed(0)
    for _, parameter in lora.named_parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    TargetLoss(net)(collate([sample], CPU))[0].backward()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    weights = dict(theirs.named_parameters())
    unused = {name for name, linear in lora.linears.items() if linear.lora_B.grad is None}  # the model takes their weight as it is
    assert all(name.endswith("dt_proj") for name in unused)
    used = {name: linear for name, linear in lora.linears.items() if name not in unused}
    pairs = {name: tuple(x.detach().clone().requires_grad_() for x in (one.lora_A, one.lora_B)) for name, one in used.items()}
    changed = {f"{name}.weight": weights[f"{name}.weight"].detach() + 2 * b @ a for name, (a, b) in pairs.items()}
    ids, keep = torch.tensor(sample.ids.astype(np.int64))[None], torch.tensor(sample.mask[1:])
    logits = torch.func.functional_call(theirs, changed, (), {"input_ids": ids, "use_cache": False}).logits[0, :-1]
    F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="sum").backward()
    for name, (a, b) in pairs.items():
        for mine, want in ((lora.linears[name].lora_A.grad, a.grad), (lora.linears[name].lora_B.grad, b.grad)):
            torch.testing.assert_close(mine, want, rtol=2e-3, atol=2e-4 * max(1.0, want.abs().max().item()), msg=name)


def test_what_passes_adapters_by_gets_none(make_model):
    """As PEFT, which would not load them."""
    net = load(make_model("falcon_h1"))
    assert not any(name.endswith("out_proj") for name in select(net, ("all-linear",)))
    with pytest.raises(UsageError, match="out_proj"):
        select(net, ("out_proj",))


@pytest.mark.parametrize("family", RUN_ON)
def test_packing_them_would_have_been_wrong(make_model, family):
    """The probe finds what is there: with another first document the second's loss is another."""
    loss = TargetLoss(load(make_model(family)))
    first, other, second = rows(19, 19, 30)
    nothing = np.arange(19) == 18  # teaches one token only
    losses = []
    for before in (first, other):
        with torch.no_grad():
            both, alone = loss(collate([Row(before.ids, nothing), second], CPU))[0], loss(collate([Row(before.ids, nothing)], CPU))[0]
        losses.append((both - alone).item())
    assert abs(losses[0] - losses[1]) > 1e-4


def test_attention_refuses_to_guess_where_documents_end(make_model):
    with pytest.raises(Unheard, match="where a row ends"):
        load(make_model("nemotron"))(input_ids=torch.arange(9)[None], use_cache=False, swift_segments=(4, 5))


@pytest.mark.parametrize("family", ["lfm2", "nemotron", "falcon_h1", "llama4"])
def test_the_command_takes_one_row_a_pass(sft, make_model, capsys, family):  # noqa: F811
    """Whatever the batch size and the default of --packing, a step's loss is that of its rows alone."""
    common = ["--model", str(make_model(family)), "--split_dataset_ratio", "0.2", "--max_steps", "3", *QUIET]
    sizes = (["--per_device_train_batch_size", str(n), "--gradient_accumulation_steps", str(8 // n)] for n in (1, 4))
    runs = [trajectory(sft("--packing", "false", *size, *common)) for size in sizes]
    assert_close(*runs)
    capsys.readouterr()
    run = sft(*common)
    printed = capsys.readouterr().out
    assert "one row a forward pass, without packing" in printed and "no packing: 1 rows a forward pass" in printed
    assert len(trajectory(run)) == 3
    sft("--packing", "true", *common, code=2)
    assert "rows would see each other" in capsys.readouterr().err


def test_they_resume_and_stream(sft, make_model, tmp_path, capsys):  # noqa: F811
    common = ["--model", str(make_model("lfm2")), "--split_dataset_ratio", "0", "--max_steps", "4", "--save_steps", "2", *QUIET]
    for flags in (["--per_device_train_batch_size", "2"], ["--streaming", "true", "--shuffle_buffer_size", "9"]):
        straight = sft(*common, *flags)
        assert "one row a forward pass" in capsys.readouterr().out
        broken = tmp_path / f"broken{len(flags)}"
        shutil.copytree(straight, broken)
        shutil.rmtree(broken / "checkpoint-4")
        sft("--resume_from_checkpoint", str(broken / "checkpoint-2"))
        assert trajectory(broken) == trajectory(straight)


def test_experts_say_what_the_loss_leaves_out(sft, make_model, capsys):  # noqa: F811
    common = ["--max_steps", "1", "--split_dataset_ratio", "0", *QUIET]
    sft("--model", str(make_model("qwen3_moe")), *common)
    assert "balancing loss is not part of the loss (as in" in capsys.readouterr().out
    sft("--model", str(make_model("qwen3_moe", output_router_logits=True)), *common)
    assert "although its config sets output_router_logits" in capsys.readouterr().out
