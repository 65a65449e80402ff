"""--fsdp in two processes (gloo, CPU): the same training as one process with the whole model, half the parameters in each."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swiftlite import cli
from tests.test_ranks import COMMON, data, folder  # noqa: F401 (data: a fixture)
from tests.test_sft import assert_close, trajectory

STEPS = ["--max_steps", "4", "--save_steps", "2", "--save_total_limit", "9", "--eval_steps", "2", "--split_dataset_ratio", "0.1"]
PACKED = ["--packing", "false", *STEPS]
KINDS = {
    "lora": ["--max_grad_norm", "0.5"],  # clipped at every step
    "lora-copies": ["--modules_to_save", "embed_tokens", "norm", "--lora_dropout", "0"],
    "full": ["--tuner_type", "full", "--fsdp", "shard_grad_op"],
    "full-frozen": ["--tuner_type", "full", "--freeze_parameters_ratio", "0.3"],
    "lora-bf16": ["--torch_dtype", "bfloat16"],
    "full-bf16": ["--tuner_type", "full", "--torch_dtype", "bfloat16", "--gradient_checkpointing", "false"],
}


@pytest.fixture(scope="module")
def words(make_model, data) -> list[str]:  # noqa: F811
    tied = make_model("qwen3", tie_word_embeddings=True)
    return ["sft", *COMMON, "--model", str(tied), "--dataset", str(data), *PACKED]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (run / f"checkpoint-{step}").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process(kind, tmp_path, words, pair):
    """Four passes a step of 2 rows each; the epoch's last step has one pass for two processes."""
    flags = [*words, *KINDS[kind]]
    alone = [flag for flag in flags if flag not in ("--fsdp", "shard_grad_op")]
    assert cli.main([*alone, "--gradient_accumulation_steps", "4", "--output_dir", str(tmp_path / "one")]) == 0
    more = [] if "--fsdp" in flags else ["--fsdp", "fsdp2"]
    printed = pair(*flags, *more, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "two"))
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    near = 0.02 if "bf16" in kind else 1e-4
    assert_close(trajectory(two), trajectory(one), near)
    held, everything = (int(n.replace(",", "")) for n in re.search(r"holds ([\d,]+) of ([\d,]+)", printed).groups())
    assert 0.49 < held / everything < 0.51
    got, want = weights(two, 4), weights(one, 4)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in got.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in want.items()
    }
    if "bf16" not in kind:
        assert all((got[key] - want[key]).abs().max() < 1e-3 for key in want)
    evaluated = [
        [row["eval_loss"] for row in map(json.loads, (run / "logging.jsonl").read_text().splitlines()) if "eval_loss" in row]
        for run in (one, two)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=near)
    if kind in ("lora", "full"):  # it serves
        answers = tmp_path / "answers.jsonl"
        flags = ["--val_dataset", words[words.index("--dataset") + 1], "--max_new_tokens", "2", "--result_path", str(answers)]
        assert cli.main(["infer", "--ckpt_dir", str(two / "checkpoint-4"), *flags]) == 0
        assert len(answers.read_text().splitlines()) == 20
    if kind in ("lora-copies", "full-bf16"):  # resumed: bit for bit
        broken = tmp_path / "broken"
        shutil.copytree(two, broken)
        shutil.rmtree(broken / "checkpoint-4")
        pair("sft", "--resume_from_checkpoint", str(broken / "checkpoint-2"), "--fsdp", "shard_grad_op")  # how it is cut may change
        assert trajectory(broken) == trajectory(two)
        again = weights(broken, 4)
        assert all(torch.equal(got[key], again[key]) for key in got)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_resumes_in_any_other_way(tuner, tmp_path, words, pair, capsys):
    """Whole or in shares, in one process or in two: a checkpoint does not tell, and the losses go on as in the straight run."""
    passes = {"one": "4", "two": "2", "shares": "2"}
    flags = [*words, "--tuner_type", tuner]
    for way, count in passes.items():
        given = [*flags, "--gradient_accumulation_steps", count, "--output_dir", str(tmp_path / way)]
        if way == "one":
            assert cli.main(given) == 0
        else:
            pair(*given, *(["--fsdp", "full_shard"] if way == "shares" else []))
    straight = trajectory(folder(tmp_path / "one"))
    for before in passes:
        for after in passes:
            if after == before:
                continue
            broken = tmp_path / f"{before}-{after}"
            shutil.copytree(folder(tmp_path / before), broken)
            shutil.rmtree(broken / "checkpoint-4")
            resume = ["sft", "--resume_from_checkpoint", str(broken / "checkpoint-2")]
            resume += ["--fsdp", "full_shard" if after == "shares" else "none"]
            if after == "one":
                capsys.readouterr()
                assert cli.main(resume) == 0
                assert "note: processes: 1, before: 2" in capsys.readouterr().out
            else:
                printed = pair(*resume)
                assert ("sharded (" in printed) == (after == "shares")
            assert_close(trajectory(broken), straight)
            want = weights(folder(tmp_path / "one"), 4)
            assert all((tensor - want[key]).abs().max() < 1e-3 for key, tensor in weights(broken, 4).items())
    assert cli.main(["sft", "--resume_from_checkpoint", str(folder(tmp_path / "shares") / "checkpoint-2")]) == 2
    assert "--fsdp none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "muon"], "--optim muon looks at whole matrices"),
        (["--use_dora", "true"], "plain LoRA"),
        (["--predict_with_generate", "true"], "--predict_with_generate cannot run with --fsdp"),
    ],
)
def test_what_cannot_be_sharded_is_refused(flags, message, words, pair, tmp_path):
    printed = pair(*words, "--fsdp", "full_shard", *flags, "--output_dir", str(tmp_path), code=2)
    assert message in printed
