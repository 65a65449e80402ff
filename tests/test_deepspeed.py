"""--deepspeed in our flags: the names, files as guides have them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swiftlite import cli
from swiftlite.errors import UsageError
from swiftlite.options.parse import Options, parse
from swiftlite.train.deepspeed import apply
from tests.test_ranks import COMMON, data, folder, words  # noqa: F401 (fixtures)
from tests.test_sft import assert_close, trajectory

GUIDE = {  # as SWIFT and transformers ship it, everything left to the trainer
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True}, "overlap_comm": False},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def applied(text: str, *flags: str, world: int = 2) -> Options:
    options = parse("sft", ["--deepspeed", text, *flags])
    apply(options, world)
    return options


@pytest.mark.parametrize(
    ("name", "fsdp", "said"),
    [
        ("zero0", None, "plain data parallel"),
        ("zero1", None, "each process holds the whole optimizer state"),
        ("zero2", "shard_grad_op", ""),
        ("zero3", "full_shard", ""),
        ("none", None, ""),
        ("", None, ""),
    ],
)
def test_names(name, fsdp, said, capsys):
    options = applied(name)
    assert options.fsdp == fsdp and options.given("fsdp")  # a resumed run does not take the checkpoint's
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)


def test_a_guides_file(tmp_path, capsys):
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(GUIDE))
    options = applied(str(path))
    changed = {name for name in options.values if options.given(name)}
    assert (changed, options.fsdp) == ({"deepspeed", "fsdp", "optim"}, "shard_grad_op")
    idle = "fp16.loss_scale, fp16.initial_scale_power, zero_optimization.offload_optimizer.device"
    assert f"note: --deepspeed {path}: without effect here: {idle}" in capsys.readouterr().out


def test_values_are_taken_and_must_agree_with_flags():
    own = {
        "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "fp16": {"enabled": False}, "gradient_clipping": 0.5,
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.8, 0.9], "weight_decay": 0}},
    }  # fmt: skip
    options = applied(json.dumps(own), "--max_grad_norm", "0.5")
    assert (options.fsdp, options.torch_dtype, options.max_grad_norm) == ("full_shard", "bfloat16", 0.5)
    assert (options.per_device_train_batch_size, options.gradient_accumulation_steps) == (2, 4)
    assert (options.learning_rate, options.adam_beta1, options.adam_beta2, options.weight_decay) == (2e-4, 0.8, 0.9, 0)
    for flags, said in [
        (["--max_grad_norm", "1"], "--max_grad_norm 1.0 contradict each other"),
        (["--torch_dtype", "float32"], "bf16.enabled means --torch_dtype bfloat16"),
        (["--fsdp", "none"], "--fsdp none contradict"),
        (["--gradient_accumulation_steps", "2"], "train_batch_size 16 cannot be"),
    ]:
        with pytest.raises(UsageError, match="--deepspeed") as raised:
            applied(json.dumps(own), *flags)
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("zero3_offload", "zero3_offload: nothing is offloaded"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param.device: nothing is offloaded"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type Lamb is not done here"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled True is not done here"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage 4 is not done here"),
        ({"optimizer": {"params": {"betas": 0.9}}}, "betas 0.9 is not done here"),
        ({"gradient_clipping": "much"}, "is no value for --max_grad_norm: 'much'"),
        ({"gradient_accumulation_steps": 2.5}, "is no value for --gradient_accumulation_steps"),
        ("{", "is not valid JSON"),
        ("zero4", "neither zero0 to zero3 nor a file"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(UsageError, match="--deepspeed") as raised:
        applied(given if isinstance(given, str) else json.dumps(given))
    assert message in str(raised.value)


def test_a_file_through_the_command(tmp_path, words, pair):  # noqa: F811
    """The file's numbers are those of the flags: the same losses; and they are what resuming compares with."""
    flags = ["sft", *COMMON[:-2], *words, "--max_steps", "3", "--save_steps", "2", "--packing", "false", "--split_dataset_ratio", "0"]
    by_flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.1"]
    assert cli.main([*flags, *by_flags, "--output_dir", str(tmp_path / "one")]) == 0
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**GUIDE, "gradient_clipping": 0.1, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}))
    printed = pair(*flags, "--deepspeed", str(file), "--output_dir", str(tmp_path / "two"))
    assert "sharded (shard_grad_op)" in printed and printed.count("without effect here") == 1
    assert_close(trajectory(folder(tmp_path / "two")), trajectory(folder(tmp_path / "one")))
    resume = ["sft", "--resume_from_checkpoint", str(folder(tmp_path / "two") / "checkpoint-2")]
    assert cli.main([*resume, "--deepspeed", "none"]) == 0
    assert "sharded" in pair(*resume, "--deepspeed", "zero3")
    assert Path(folder(tmp_path / "two"), "checkpoint-3").is_dir()
