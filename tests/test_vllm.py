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
    sft = [
        "sft",
        "--model",
        str(TINY_CHAT),
        "--dataset",
        "self-cognition#64",
        "--model_name",
        "小黄",
        "Xiao Huang",
        "--model_author",
        "魔搭",
    ]
    assert main([*sft, "--max_steps", "8", "--learning_rate", "1e-3", "--add_version", "false", "--output_dir", str(root / "run")]) == 0
    adapter = next(iter((root / "run").rglob("checkpoint-8")))
    assert main(["export", "--ckpt_dir", str(adapter), "--to_peft_format", "true"]) == 0
    assert main(["export", "--ckpt_dir", str(adapter), "--merge_lora", "true"]) == 0
    assert (
        main(["export", "--model", str(TINY_CHAT), "--quant_bits", "8", "--quant_method", "rtn", "--export_dir", str(root / "int8")]) == 0
    )
    return {"adapter": Path(f"{adapter}-peft"), "merged": Path(f"{adapter}-merged"), "int8": root / "int8"}


def test_vllm_gives_the_same_greedy_tokens(checkpoints, tmp_path):
    base = str(TINY_CHAT)
    cases = [(base, None), (base, str(checkpoints["adapter"])), (str(checkpoints["merged"]), None), (str(checkpoints["int4"]), None)]
    ours, jobs = [], []
    for model, adapter in cases:
        llm = LLM(model=model, dtype="float32", adapters={"a": adapter} if adapter else {})
        prompts = [llm.template.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40), adapter="a" if adapter else None)
        ours.append([output.outputs[0].token_ids for output in outputs])
        jobs.append({"model": model, "adapter": adapter, "prompts": prompts, "max_tokens": 40})
        llm.shutdown()
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = str(Path(__file__).parent / "vllm_worker.py")
    done = subprocess.run([PYTHON, worker, "jobs.json", "out.json"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "out.json").read_text())
    assert ours[0] != ours[1], "the adapter changes the answers"
    for (model, adapter), mine, other in zip(cases, ours, theirs, strict=True):
        assert [list(ids) for ids in mine] == other, f"{model} with {adapter}"
