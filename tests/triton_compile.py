"""Compile the kernels for real GPUs, as their launches ask for them, on a machine that has none.

Run as a script: the launches of a model's layers go through Triton's compiler down to machine code, only the launch itself is left
out. Prints one JSON line a kernel: name, architecture, shared memory in bytes, bytes of registers spilled, tensor core instructions.
usage: python tests/triton_compile.py ARCHITECTURE   (90: Hopper, 80: Ampere)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from swiftlite.engine import attention_cuda, lora_cuda
from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.engine.lora_ops import GroupShape, Stack

CPU = torch.device("cpu")
LAYERS = {  # the attention of an 8B Llama, and large head dims, one with everything that a layer may have
    "gqa": AttentionLayer(0, "layer", 32, 8, 128, 128, 128**-0.5),
    "window": AttentionLayer(0, "layer", 16, 8, 256, 256, 256**-0.5, 4096, 50.0),
    "wide": AttentionLayer(0, "layer", 8, 4, 512, 512, 512**-0.5),
}


class Device:
    """Stands in for Triton's driver: names the architecture, has no GPU."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def report(name: str, architecture: int, compiled) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    tensor = ptx.count("wgmma.mma_async") + ptx.count("mma.sync")
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])
    row = {"name": name, "architecture": architecture, "shared": compiled.metadata.shared, "spilled": spilled, "tensor": tensor}
    print(json.dumps(row), flush=True)


def compile_attention(layer: AttentionLayer) -> None:
    cache = KVCache([layer], 64, 16, torch.bfloat16, CPU)
    decode = [SequenceSlice(0, 1, 900, [*range(57)])]
    chunk = [SequenceSlice(0, 128, 0, [*range(8)])] * 40
    for slices in (decode, chunk):
        rows = sum(piece.query_len for piece in slices)
        pages = attention_cuda.pages(slices, rows, CPU)
        pages.processors = 132
        dims = ((layer.heads, layer.head_dim), (layer.kv_heads, layer.head_dim), (layer.kv_heads, layer.value_dim))
        q, k, v = (torch.zeros(heads, rows, dim, dtype=torch.bfloat16).transpose(0, 1) for heads, dim in dims)
        pages.attend(q, k, v, torch.zeros(rows, dtype=torch.int64), cache, layer)


def compile_adapters() -> None:
    shape = GroupShape(4096, (4096, 1024, 1024), (16, 16, 16))
    stack = Stack((shape,), torch.bfloat16, CPU)
    tables = lora_cuda.AdapterTables([(shape.width, shape.outs)], CPU)
    for count in (1, 64):
        [job] = tables.plan([(stack, 0, count)])
        assert tables.aligned == [True]
        x, y = torch.zeros(count, 4096, dtype=torch.bfloat16), torch.zeros(count, 6144, dtype=torch.bfloat16)
        h = job.shrink(0, x)
        job.expand(0, 0, h, y[:, :4096])
        job.expand_all(0, h, y)


def main(architecture: int) -> None:
    triton.runtime.driver.set_active(Device(architecture))
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        report(self.__name__, architecture, run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    for layer in LAYERS.values():
        compile_attention(layer)
    compile_adapters()


if __name__ == "__main__":
    main(int(sys.argv[1]))
