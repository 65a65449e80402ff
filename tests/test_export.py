"""`swift export` as users type it: names of the results, what it finds by itself, and mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swiftlite.adapters.directory import read
from swiftlite.cli import main

PROMPT = [5, 9, 30, 42]


@pytest.fixture
def run(make_model, make_adapter, tmp_path) -> Path:
    """A LoRA run's checkpoint as `swift sft` leaves it."""
    base = make_model("qwen2")
    path = tmp_path / "output" / "v0-x" / "checkpoint-7"
    shutil.copytree(make_adapter(base, 1), path)
    (path / "sft_args.json").write_text(json.dumps({"model": str(base), "tuner_type": "lora", "template": None}))
    (path / "optimizer.pt").write_bytes(b"big")
    return path


def results(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


@torch.inference_mode()
def logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=torch.tensor([PROMPT])).logits[0]


def test_merge_to_peft_and_quantize(run: Path, capsys) -> None:
    assert main(["export", "--ckpt_dir", str(run), "--merge_lora", "true"]) == 0
    out = capsys.readouterr().out
    assert f"merged model: {run}-merged" in out and "check: logits" in out
    assert main(["export", "--ckpt_dir", str(run), "--to_peft_format", "true"]) == 0
    assert f"PEFT adapter: {run}-peft" in capsys.readouterr().out
    assert main(["export", "--ckpt_dir", str(run), "--merge_lora", "true", "--quant_bits", "8", "--quant_method", "rtn"]) == 0
    assert "checkpoint-7-merged is there already: used as it is" in capsys.readouterr().out
    names = ["checkpoint-7", "checkpoint-7-merged", "checkpoint-7-merged-rtn-int8", "checkpoint-7-peft"]
    assert results(run) == names
    assert read(f"{run}-peft").digest == read(run).digest
    merged, quantized = logits(run.with_name(names[1])), logits(run.with_name(names[2]))
    assert ((merged - quantized).norm() / merged.norm()).item() < 0.1
    args = json.loads((run.with_name(names[2]) / "sft_args.json").read_text())
    assert args["tuner_type"] == "full" and args["model"] is None


def test_merge_and_quantize_in_one_command(run: Path, capsys) -> None:
    assert main(["export", "--ckpt_dir", str(run), "--merge_lora", "true", "--quant_bits", "4"]) == 0
    out = capsys.readouterr().out
    assert "awq, SWIFT's default method, is not built yet" in out
    assert results(run) == ["checkpoint-7", "checkpoint-7-merged", "checkpoint-7-merged-rtn-int4"]
    config = json.loads((run.with_name("checkpoint-7-merged-rtn-int4") / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def test_engine_serves_what_was_exported(run: Path, make_model) -> None:
    from swiftlite.engine.engine import Engine
    from swiftlite.engine.request import SamplingParams

    assert main(["export", "--ckpt_dir", str(run), "--merge_lora", "--quant_bits", "8", "--quant_method", "rtn"]) == 0
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with Engine(make_model("qwen2"), dtype="float32", adapters={"a": str(run)}) as engine:
        base, adapted = engine.generate([PROMPT, PROMPT], greedy, adapter=[None, "a"])
        engine.check()
    with Engine(f"{run}-merged", dtype="float32") as engine:
        merged = engine.generate([PROMPT], greedy)[0]
    assert merged.outputs[0].token_ids == adapted.outputs[0].token_ids != base.outputs[0].token_ids
    with Engine(f"{run}-merged-rtn-int8", dtype="float32", adapters={"again": str(run)}) as engine:
        plain, adapted = engine.generate([PROMPT, PROMPT], greedy, adapter=[None, "again"])
        assert len(plain.outputs[0].token_ids) == 12 and adapted.outputs[0].token_ids != plain.outputs[0].token_ids
    reloaded = logits(Path(f"{run}-merged-rtn-int8"))[-1].argmax().item()
    assert plain.outputs[0].token_ids[0] == reloaded


def test_base_model_goes_to_the_working_directory(make_model, tmp_path, monkeypatch, capsys) -> None:
    base = make_model("llama")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", str(base), "--quant_bits", "4", "--quant_method", "rtn", "--group_size", "8"]) == 0
    assert f"quantized model: {tmp_path / (base.name + '-rtn-int4')}" in capsys.readouterr().out
    assert main(["export", "--model", str(base), "--quant_bits", "8", "--quant_method", "rtn", "--export_dir", "mine"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{base.name}-rtn-int4", "mine"]


def test_base_is_found_from_the_adapter_itself(make_model, make_adapter, tmp_path, capsys) -> None:
    base = make_model("qwen2")
    plain = tmp_path / "plain"
    shutil.copytree(make_adapter(base, 1), plain)
    assert main(["merge-lora", "--adapters", str(plain)]) == 0
    assert f"base model: {base}" in capsys.readouterr().out
    (plain / "sft_args.json").write_text(json.dumps({"model": "/gone/away"}))  # the run's own name for it is no longer there
    assert main(["merge-lora", "--adapters", str(plain), "--exist_ok", "true"]) == 0
    raw = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps({**raw, "base_model_name_or_path": None}))
    assert main(["merge-lora", "--adapters", str(plain), "--exist_ok", "true"]) == 1
    assert "pass it: --model DIRECTORY" in capsys.readouterr().err
    assert main(["merge-lora", "--adapters", str(plain), "--exist_ok", "true", "--model", str(base)]) == 0


def test_swift_layout_is_merged_too(run: Path, make_model, capsys) -> None:
    from test_adapters import swift_layout

    old = swift_layout(run, run.with_name("old"))
    command = ["export", "--ckpt_dir", str(old), "--merge_lora", "true", "--model", str(make_model("qwen2"))]
    assert main(command) == 0 and main(["export", "--ckpt_dir", str(run), "--merge_lora", "true"]) == 0
    assert torch.equal(logits(run.with_name("old-merged")), logits(run.with_name("checkpoint-7-merged")))
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "nothing to do"),
        (["--ckpt_dir", "CKPT"], 2, "nothing to do"),
        (["--merge_lora", "true"], 2, "--merge_lora needs a checkpoint"),
        (["--ckpt_dir", "/no/where", "--merge_lora", "true"], 1, "no such directory"),
        (["--ckpt_dir", "BASE", "--merge_lora", "true"], 1, "is a full model"),
        (["--ckpt_dir", "BASE", "--to_peft_format", "true"], 1, "is a full model"),
        (["--ckpt_dir", "EMPTY", "--to_peft_format", "true"], 1, "holds no adapter"),
        (["--ckpt_dir", "EMPTY", "--merge_lora", "true"], 1, "holds no adapter"),
        (["--ckpt_dir", "CKPT", "--merge_lora", "true", "--model", "OTHER"], 1, "belongs to another base model"),
        (["--ckpt_dir", "CKPT", "--merge_lora", "true", "--model", "/no/where"], 1, "/no/where"),
        (["--ckpt_dir", "CKPT", "--quant_bits", "8", "--quant_method", "rtn"], 2, "add --merge_lora true"),
        (["--ckpt_dir", "CKPT", "--merge_lora", "true", "--quant_bits", "3"], 2, "--quant_bits 3"),
        (["--ckpt_dir", "CKPT", "--merge_lora", "true", "--quant_bits", "4", "--quant_method", "awq"], 1, "pass --quant_method rtn"),
        (["--model", "BASE", "--quant_bits", "4", "--quant_method", "rtn", "--group_size", "128"], 1, "--group_size 16"),
        (["--quant_bits", "8", "--quant_method", "rtn"], 2, "--quant_bits needs a model"),
        (["--ckpt_dir", "CKPT", "--merge_lora", "true", "--to_peft_format", "true", "--export_dir", "x"], 2, "names one result"),
        (["--ckpt_dir", "CKPT", "--merge_lora", "true", "--export_dir", "CKPT", "--exist_ok", "true"], 1, "cannot be the result"),
        (["--ckpt_dir", "CKPT", "--to_peft_format", "true", "--export_dir", "OUTPUT", "--exist_ok", "true"], 1, "cannot be the result"),
        (["--ckpt_dir", "CKPT", "--adapters", "EMPTY", "--merge_lora", "true"], 2, "takes one checkpoint"),
    ],
)
def test_mistakes_say_what_to_do_and_write_nothing(run: Path, make_model, tmp_path, monkeypatch, capsys, flags, code, message) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    other = make_model("qwen2", intermediate_size=96)
    places = {"OUTPUT": tmp_path / "output", "CKPT": run, "EMPTY": empty, "BASE": make_model("qwen2"), "OTHER": other}
    before = sorted(make_model("qwen2").parent.iterdir())
    assert main(["export", *(str(places.get(flag, flag)) for flag in flags)]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert results(run) == ["checkpoint-7"] and list(empty.iterdir()) == []
    assert sorted(make_model("qwen2").parent.iterdir()) == before


def test_existing_result_is_not_overwritten(run: Path, capsys) -> None:
    target = run.with_name("checkpoint-7-peft")
    target.mkdir()
    assert main(["export", "--ckpt_dir", str(run), "--to_peft_format", "true"]) == 1
    assert "--exist_ok true" in capsys.readouterr().err and list(target.iterdir()) == []
    assert main(["export", "--ckpt_dir", str(run), "--to_peft_format", "true", "--exist_ok", "true"]) == 0
    assert (target / "adapter_model.safetensors").is_file()


def test_what_is_no_earlier_result_is_never_emptied(run: Path, tmp_path: Path, capsys) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    flags = ["--to_peft_format", "true", "--exist_ok", "true", "--export_dir", str(home)]
    assert main(["export", "--ckpt_dir", str(run), *flags]) == 0
    assert (home / "thesis.txt").read_text() == "years of work" and (home / "adapter_model.safetensors").is_file()
    assert main(["export", "--ckpt_dir", str(run), *flags[:-1], str(home / "thesis.txt")]) == 1
    assert "is a file" in capsys.readouterr().err and (home / "thesis.txt").read_text() == "years of work"


def test_the_command_in_a_process_of_its_own(run: Path) -> None:
    command = [sys.executable, "-m", "swiftlite.cli", "export", "--ckpt_dir", str(run) + "/", "--to-peft-format", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"PEFT adapter: {run}-peft" in done.stdout and (run.with_name("checkpoint-7-peft") / "adapter_config.json").is_file()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
