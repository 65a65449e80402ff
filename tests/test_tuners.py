"""LoRA's variants, freezing, noise and optimizers: what is trained, what is saved, equal to PEFT's and torch's own."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swiftlite.errors import UsageError
from swiftlite.models.loading import load_model
from swiftlite.models.segments import register
from swiftlite.train import neftune
from swiftlite.train.full import Freezing, Full
from swiftlite.train.lora import Lora, LoraSpec
from swiftlite.train.optimizers import NAMES, OptimizerSettings, build
from swiftlite.train.peft_lora import STARTS, PeftLora, Variant
from tests.test_sft import QUIET, data, model, sft, training, trajectory  # noqa: F401 (fixtures)

CPU = torch.device("cpu")
VARIANTS = {
    "dora": (LoraSpec(4, 8), Variant(use_dora=True)),
    "bias": (LoraSpec(4, 8, target_modules=("q_proj", "v_proj")), Variant(bias="all")),
    "pissa": (LoraSpec(4, 8), Variant(init_weights="pissa")),
    "pissa_niter+rslora": (LoraSpec(4, 8, use_rslora=True), Variant(init_weights="pissa_niter_4")),
    "olora": (LoraSpec(4, 8), Variant(init_weights="olora")),
    "olora+bias": (LoraSpec(4, 8, target_modules=("q_proj", "v_proj")), Variant(bias="all", init_weights="olora")),
    "pissa+dora+whole": (LoraSpec(4, 8, modules_to_save=("lm_head", "norm")), Variant(use_dora=True, init_weights="pissa")),
    "pissa+embeddings": (LoraSpec(4, 8, target_modules=("q_proj", "all-embedding")), Variant(init_weights="pissa", embeddings=True)),
    "embeddings": (LoraSpec(4, 8, target_modules=("q_proj", "all-embedding")), Variant(embeddings=True)),
}


def load(path):
    return load_model(path, torch.float32, CPU, register())


def logits(net, ids):
    with torch.no_grad():
        return net(input_ids=ids, use_cache=False, swift_segments=(ids.shape[1],)).logits


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_is_trained_is_what_peft_loads(kind, make_model, tmp_path):
    from peft import PeftModel

    path, ids = make_model("qwen2"), torch.arange(3, 40)[None]
    spec, variant = VARIANTS[kind]
    net = load(path)
    before = logits(net, ids)
    tuner = PeftLora(net, spec, variant)
    torch.testing.assert_close(logits(net.eval(), ids), before, rtol=1e-4, atol=1e-4)  # every start is the base itself
    torch.manual_seed(1)
    for _, parameter in tuner.named_parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    after = logits(net.eval(), ids)
    assert not torch.allclose(after, before, atol=1e-2)
    tuner.save(tmp_path, str(path))
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, ids), after, rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    assert config["r"] == (8 if variant.changes_base else 4)
    torch.testing.assert_close(logits(net.eval(), ids), after, rtol=0, atol=0)  # saving changed nothing


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_dora", "true"], ["--use_dora", "true", "--modules_to_save", "lm_head"],
        ["--use_dora", "true", "--modules_to_save", "embed_tokens", "norm"], ["--lora_bias", "all"], ["--lora_bias", "lora_only"],
        ["--target_modules", "all-linear", "all-embedding"],
        *(["--init_weights", start] for start in (*(start for start in STARTS if start != "true"), "pissa_niter_4")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_variants_train_float32_on_a_bfloat16_base(sft, make_model, flags):  # noqa: F811
    """Their trained parts meet bfloat16 neighbours, and learn as on a float32 base."""
    common = ["--model", str(make_model("qwen2")), "--max_steps", "4", "--split_dataset_ratio", "0.2", *QUIET]
    run = sft("--torch_dtype", "bfloat16", *flags, *common)
    weights = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    trained = {key: tensor for key, tensor in weights.items() if not key.endswith("base_layer.weight")}  # PEFT adds an adapted embedding
    assert trained and all(tensor.dtype == torch.float32 for tensor in trained.values())
    losses = trajectory(run)
    assert losses[-1][0] < 0.8 * losses[0][0]
    exact = trajectory(sft("--torch_dtype", "float32", *flags, *common))
    # From the second step on, paths part. Some take their start out of the base, which is rounded again: OLoRA's gradients then lie 2 to
    # 4 % off, by which of its instructions the linear algebra library chooses on this machine.
    assert losses[0][0] == pytest.approx(exact[0][0], rel=0.01)
    assert losses[0][1] == pytest.approx(exact[0][1], rel=0.06 if "olora" in flags else 0.03)


def test_plain_lora_through_peft_equals_ours(make_model):
    path, ids = make_model("qwen3"), torch.arange(3, 30)[None]
    torch.manual_seed(0)
    ours = Lora(load(path), LoraSpec(4, 8))
    torch.manual_seed(0)
    theirs = PeftLora(load(path), LoraSpec(4, 8), Variant())
    mine, other = list(ours.named_parameters()), list(theirs.named_parameters())
    assert [n.replace(".default.weight", "").removeprefix("base_model.model.") for n, _ in other] == [n for n, _ in mine]
    for (_, a), (_, b) in zip(mine, other, strict=True):
        a.data.copy_(b.data)
    for net in (ours.model, theirs.adapted):
        net(input_ids=ids, use_cache=False, swift_segments=(ids.shape[1],)).logits.square().mean().backward()
    for (name, a), (_, b) in zip(mine, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "flags",
    [["--use_dora"], ["--init_weights", "pissa"], ["--lora_bias", "all"], ["--target_modules", "all-linear", "all-embedding"]],
    ids=["dora", "pissa", "bias", "embedding"],
)
def test_variants_learn_and_go_on(sft, flags, capsys):  # noqa: F811
    run = sft(*flags, "--max_steps", "4", *QUIET)
    losses = [loss for loss, _ in trajectory(run)]
    assert losses[-1] < losses[0]
    assert "PEFT" in capsys.readouterr().out
    again = sft("--adapters", str(run / "checkpoint-4"), "--max_steps", "1", *QUIET)
    assert training(again)[0]["loss"] < losses[0]
    assert (again / "checkpoint-1" / "adapter_model.safetensors").is_file()


def test_turned_linears_go_through_peft(sft, make_model, capsys):  # noqa: F811
    """GPT-2's Conv1D: adapted by the command, and what it saves is what PEFT loads."""
    from peft import PeftModel

    path = make_model("gpt2")
    common = ["--model", str(path), "--split_dataset_ratio", "0", *QUIET]
    run = sft("--max_steps", "4", *common)
    assert "PEFT" in capsys.readouterr().out
    losses = [loss for loss, _ in trajectory(run)]
    assert losses[-1] < losses[0]
    weights = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in weights} == {"c_attn", "c_proj", "c_fc"}
    plain, ids = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), torch.arange(3, 30)[None]
    before = logits(plain, ids)
    adapted = logits(PeftModel.from_pretrained(plain, run / "checkpoint-4").eval(), ids)
    assert not torch.allclose(before, adapted, atol=1e-2)
    again = sft("--adapters", str(run / "checkpoint-4"), "--max_steps", "1", *common)
    assert training(again)[0]["loss"] < losses[0]
    named = sft("--target_modules", "c_attn", "--max_steps", "1", *common) / "checkpoint-1" / "adapter_model.safetensors"
    assert all("c_attn" in key for key in load_file(named))


@pytest.mark.parametrize(
    "flags", [["--init_weights", "pissa", "--optim", "muon"], ["--use_dora", "--optim", "adafactor"]], ids=["pissa", "dora"]
)
def test_variants_resume_exactly(sft, flags, tmp_path):  # noqa: F811
    straight = sft(*flags, "--max_steps", "4", "--save_steps", "2", "--neftune_noise_alpha", "5", *QUIET)
    broken = tmp_path / "broken"
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoint-4")
    sft("--resume_from_checkpoint", str(broken / "checkpoint-2"))
    assert trajectory(broken) == trajectory(straight)
    a, b = (load_file(run / "checkpoint-4" / "adapter_model.safetensors") for run in (straight, broken))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_weights", "pisa"], "unknown 'pisa'"),
        (["--tuner_type", "full", "--use_dora"], "--use_dora has no meaning"),
        (["--freeze_parameters_ratio", "0.5"], "--freeze_parameters_ratio has no meaning"),
        (["--tuner_type", "full", "--freeze_parameters_regex", "nothing"], "finds no parameter"),
        (["--tuner_type", "full", "--freeze_parameters_ratio", "1"], "every parameter is frozen"),
        (["--label_smoothing_factor", "2"], "from 0 to below 1"),
    ],
)
def test_wrong_settings_are_explained(sft, flags, message, capsys):  # noqa: F811
    sft(*flags, *QUIET, code=2)
    assert message in capsys.readouterr().err


def test_eight_bits_need_their_package(sft, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as where it is not installed
    sft("--optim", "adamw_8bit", *QUIET, code=2)
    assert "pip install bitsandbytes" in capsys.readouterr().err


def test_freezing(make_model):
    net = load(make_model("llama"))
    named = dict(net.named_parameters())
    everything = sum(p.numel() for p in named.values())
    tuner = Full(net, torch.float32, Freezing(0.5))
    trained = [name for name, _ in tuner.named_parameters()]
    assert trained == list(named)[-len(trained) :]  # the first are frozen
    assert 0.5 * everything <= sum(named[name].numel() for name in trained) < 0.7 * everything
    tuner = Full(net, torch.float32, Freezing(1.0, None, r"layers\.2\.mlp"))
    assert [name for name, _ in tuner.named_parameters()] == [name for name in named if "layers.2.mlp" in name]
    tuner = Full(net, torch.float32, Freezing(0.0, "embed|norm", "final|model.norm"))
    assert all(("embed" not in name and "norm" not in name) or "model.norm" in name for name, _ in tuner.named_parameters())


def test_frozen_weights_stay(sft, model):  # noqa: F811
    run = sft("--tuner_type", "full", "--freeze_parameters_regex", r"embed|layers\.0", "--max_steps", "2", *QUIET)
    before, after = load_file(model / "model.safetensors"), load_file(run / "checkpoint-2" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("embed" in name or "layers.0" in name), name


def test_noise_only_in_training_and_by_document(make_model):
    net = load(make_model("llama"))
    seen = []
    neftune.attach(net, 5.0)
    net.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    ids = torch.arange(3, 67)[None]

    def embedded():
        net.base_model(input_ids=ids, use_cache=False, swift_segments=(4, 60))
        return seen.pop()[0]

    clean = net.get_input_embeddings().weight[ids[0]]
    assert torch.equal(net.eval() and embedded(), clean)
    net.train()
    noise = (embedded() - clean).abs()
    for part, length in ((noise[:4], 4), (noise[4:], 60)):
        bound = 5.0 / (length * clean.shape[1]) ** 0.5
        assert 0.9 * bound < part.max() <= bound * 1.0001
    assert not torch.equal(embedded(), embedded())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw_8bit"])
def test_optimizers_learn(name, sft):  # noqa: F811
    rate = "0.5" if name == "sgd" else "1e-2"
    run = sft("--optim", name, "--learning_rate", rate, "--max_steps", "6", "--lr_scheduler_type", "constant", *QUIET)
    losses = [loss for loss, _ in trajectory(run)]
    assert losses[-1] < 0.95 * losses[0]


def test_lora_plus_and_decay_groups():
    shapes = {"a.lora_A": (2, 4), "a.lora_B": (4, 2), "norm.weight": (4,), "embed_tokens.weight": (6, 4)}
    named = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    groups = build(named, 1e-3, OptimizerSettings(lora_plus=16.0), torch.nn.Module()).param_groups
    settings = {id(p): (group["ratio"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: settings[id(p)] for name, p in named}
    assert found == {"a.lora_A": (1, 0.1), "a.lora_B": (16, 0.1), "norm.weight": (1, 0), "embed_tokens.weight": (1, 0.1)}
    muon = build(named, 1e-3, OptimizerSettings("muon"), torch.nn.Module())
    assert [sum(len(g["params"]) for g in part.param_groups) for part in muon.parts] == [2, 2]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "phi"])
def test_muon_leaves_embeddings_and_heads_to_adamw(make_model, family):
    """Whatever their names: GPT-2's are wte and wpe."""
    net = load(make_model(family))
    named = list(Full(net, torch.float32).named_parameters())
    inner, outer = build(named, 1e-3, OptimizerSettings("muon"), net).parts
    names = {id(p): name for name, p in named}
    inner_names, outer_names = ([names[id(p)] for group in part.param_groups for p in group["params"]] for part in (inner, outer))
    assert len(inner_names) + len(outer_names) == len(named)
    tables = [net.get_input_embeddings().weight, net.get_output_embeddings().weight]
    tables += [net.transformer.wpe.weight] if family == "gpt2" else []
    assert {names[id(table)] for table in tables} <= set(outer_names)
    assert all("attn" in name or "mlp" in name for name in inner_names) and len(inner_names) >= 4


def test_lora_plus_moves_b_further(sft):  # noqa: F811
    """Adam's first step is the rate, whatever the gradient."""
    common = ["--max_steps", "1", "--warmup_ratio", "0", "--learning_rate", "1e-3", *QUIET]
    plain, plus = sft(*common), sft(*common, "--lorap_lr_ratio", "4")
    a, b = (load_file(run / "checkpoint-1" / "adapter_model.safetensors") for run in (plain, plus))
    for key in a:
        ratio = 4 if "lora_B" in key else 1
        torch.testing.assert_close(b[key], a[key] * ratio, rtol=1e-3, atol=1e-6)


def test_early_stop_and_links(sft, capsys):  # noqa: F811
    """A rate that destroys the model: evaluation gets worse, the run ends, the best checkpoint is linked."""
    flags = ["--max_steps", "40", "--save_steps", "1", "--warmup_steps", "6", "--learning_rate", "3", "--split_dataset_ratio", "0.2"]
    run = sft("--tuner_type", "full", *flags, "--early_stop_interval", "3", "--create_checkpoint_symlink", *QUIET)
    assert "stopping early: 3 evaluations" in capsys.readouterr().out
    last = json.loads((run / "logging.jsonl").read_text().splitlines()[-1])
    assert last["global_step"] < 40
    assert (run / "last").resolve() == (run / f"checkpoint-{last['global_step']}").resolve()
    assert str((run / "best").resolve()) == last["best_model_checkpoint"]


def test_unknown_start():
    with pytest.raises(UsageError, match="pissa_niter"):
        Variant(init_weights="pissa_niter_x").check()


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantized_base(bits, sft, make_model, data):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    path = make_model("qwen3", hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.1)
    run = sft("--model", str(path), "--quant_bits", bits, "--optim", "adamw_8bit", "--max_steps", "6", *QUIET)
    losses = [loss for loss, _ in trajectory(run)]
    assert losses[-1] < 0.9 * losses[0]
