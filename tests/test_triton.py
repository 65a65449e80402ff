"""The GPU's kernels where there is no GPU: run in Triton's interpreter, and compiled for real architectures.

Each in a process of its own, because Triton decides at its first import whether kernels are interpreted. With a GPU, the same
cases run on it, and decode runs in captured graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it has wheels for Linux only)")


def run(*arguments: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env={**env, "PYTHONPATH": str(HERE.parent), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_a_cpu_process_imports_neither_triton_nor_cuda_code() -> None:
    """Not even where Triton is installed: our modules for the GPU stay out (transformers itself may import Triton)."""
    code = "import sys, swiftlite.engine.engine; print([m for m in sys.modules if m.startswith('swiftlite.engine.')])"
    modules = run("-c", code)
    assert "swiftlite.engine.runner" in modules
    for name in ("attention_cuda", "triton_attention", "triton_lora", "lora_cuda", "graphs"):
        assert f"swiftlite.engine.{name}'" not in modules


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    assert "passed" in run("-m", "pytest", "-p", "no:cacheprovider", "-x", str(HERE / "kernel_cases.py"), TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; the same cases run in the interpreter")
def test_kernels_and_graphs_on_the_gpu() -> None:
    assert "passed" in run("-m", "pytest", "-p", "no:cacheprovider", str(HERE / "kernel_cases.py"))


@needs_triton
@pytest.mark.parametrize("architecture", [90, 80])
def test_kernels_compile_for_gpus(architecture: int, tmp_path: Path) -> None:
    """Down to machine code: what the interpreter cannot see (types, shapes for the tensor cores, shared memory, registers)."""
    lines = run(str(HERE / "triton_compile.py"), str(architecture), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert {row["name"] for row in rows} == {"_attend", "_reduce", "_store", "_shrink", "_expand"}
    for row in rows:
        assert row["shared"] <= (99 if architecture == 80 else 227) * 1024, row  # of the smallest GPUs since 2020; of Hopper's
        assert row["spilled"] <= 64, row
        assert (row["tensor"] > 0) == (row["name"] in ("_attend", "_shrink", "_expand")), row


@needs_triton
def test_requests_compile_nothing(make_model, make_adapter, tmp_path: Path) -> None:
    """The start asks for every kernel that steps of any mixture ask for later, with adapters and without."""
    model = make_model("qwen2", num_hidden_layers=2, hidden_size=64, head_dim=16, max_position_embeddings=4096)
    adapter = make_adapter(model, 1, 16)
    lines = run(str(HERE / "triton_variants.py"), str(model), str(adapter), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    counted = json.loads(lines[-1])
    assert counted["later"] == []
    assert counted["start"] == 7  # attention: few or many rows, split or not; the reduction of both splits; the store
    assert counted["adapters"] > 0
