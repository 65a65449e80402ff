"""What we write, real vLLM reads: base, adapter, merged and quantized checkpoints give the same greedy tokens there and here.

vLLM needs another transformers, so it runs in its own environment; scripts/test_vllm.sh makes one and names its Python in
SWIFTLITE_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from swiftlite import LLM, SamplingParams
from swiftlite.cli import main
from swiftlite.hub import TINY_CHAT

PYTHON = os.environ.get("SWIFTLITE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="vLLM's environment is not there: run scripts/test_vllm.sh"),
]
QUESTIONS = ["who are you?", "浙江的省会在哪？", "What is ML?", "你好"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A LoRA run on tiny-chat, exported in every way."""
    root = tmp_path_factory.mktemp("run")
    name = ["--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope"]
    sft = ["sft", "--model", str(TINY_CHAT), "--dataset", "self-cognition#64", *name]
    assert main([*sft, "--max_steps", "24", "--learning_rate", "4e-3", "--add_version", "false", "--output_dir", str(root / "run")]) == 0
    adapter = next(iter((root / "run").rglob("checkpoint-24")))
    assert main(["export", "--ckpt_dir", str(adapter), "--to_peft_format", "true"]) == 0
    assert main(["export", "--ckpt_dir", str(adapter), "--merge_lora", "true"]) == 0
    # vLLM's CPU build has a kernel for 4-bit weights only
    int4 = ["export", "--model", str(TINY_CHAT), "--quant_bits", "4", "--quant_method", "rtn", "--group_size", "32"]
    assert main([*int4, "--export_dir", str(root / "int4")]) == 0
    return {"adapter": Path(f"{adapter}-peft"), "merged": Path(f"{adapter}-merged"), "int4": root / "int4"}


def test_vllm_gives_the_same_greedy_tokens(checkpoints, tmp_path):
    base = str(TINY_CHAT)
    # model, adapter, arithmetic; vLLM's 4-bit kernel has no float32
    cases = [
        (base, None, "float32"),
        (base, str(checkpoints["adapter"]), "float32"),
        (str(checkpoints["merged"]), None, "float32"),
        (str(checkpoints["int4"]), None, "bfloat16"),
    ]
    ours, jobs = [], []
    for model, adapter, dtype in cases:
        llm = LLM(model=model, dtype=dtype, adapters={"a": adapter} if adapter else {})
        prompts = [llm.template.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40), adapter="a" if adapter else None)
        ours.append([list(output.outputs[0].token_ids) for output in outputs])
        jobs.append({"model": model, "adapter": adapter, "dtype": dtype, "prompts": prompts, "max_tokens": 40})
        llm.shutdown()
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = str(Path(__file__).parent / "vllm_worker.py")
    done = subprocess.run([PYTHON, worker, "jobs.json", "out.json"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "out.json").read_text())
    assert ours[0] != ours[1], "the adapter changes the answers"
    for (model, adapter, dtype), mine, other in zip(cases, ours, theirs, strict=True):
        equal = sum(a == b for a, b in zip(mine, other, strict=True))
        # bfloat16 rounds differently in the two engines, so a close call may fall the other way
        assert equal == len(QUESTIONS) or (dtype == "bfloat16" and equal >= len(QUESTIONS) // 2), f"{model} with {adapter}: {mine} {other}"
