"""Count the kernels that Triton compiles for a served model, on a machine that has no GPU: at the start, and while requests run.

Run as a script, so that the driver that it puts in belongs to nobody else. Launches go as far as Triton's look at their arguments
(which kernel do these ask for?); nothing is compiled or run, so what the model computes is rubbish. Prints one JSON line: how many
kernels the start asked for, how many the adapters at the start, and what the steps after it asked for besides.
usage: python tests/triton_variants.py MODEL ADAPTER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
import triton
from test_runner import Seq
from triton.runtime.jit import JITFunction
from triton_compile import CPU, Device

from swiftlite.engine import attention_cuda, lora_cuda, lora_ops
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.runner import Runner
from swiftlite.engine.scheduler import Scheduled

SIZE, LONGEST = 16, 2048


def watch() -> list[str]:
    """The list that every new kernel's name comes into."""
    asked: list[str] = []
    run = JITFunction.run

    def pretend(self, key, signature, device, constexprs, options, attrs, warmup):
        asked.append(f"{self.__name__} {constexprs.values()} {attrs}")
        self.device_caches[device][0][key] = "compiled"
        return "compiled"

    JITFunction._do_compile = pretend
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    triton.runtime.driver.set_active(Device(90))
    return asked


def step(runner: Runner, pieces: list[tuple[int, int]], names: list[str | None]) -> None:
    """One step of sequences of (context, new tokens)."""
    items = []
    for (context, count), name in zip(pieces, names, strict=True):
        adapter = None if name is None else runner.lora.acquire(name)
        seq = Seq([5] * (context + count), [0] * -(-(context + count) // SIZE), adapter)
        items.append(Scheduled(seq, context, count, 1))
    runner.execute(items)
    for item in items:
        if item.seq.adapter is not None:
            runner.lora.release(item.seq.adapter)


def main(model: Path, adapter: Path) -> None:
    attention_cuda.processors_of = lora_cuda.processors_of = lambda device: 132
    lora_ops.STACK_SLOTS = 1  # as on a GPU
    asked = watch()
    config = EngineConfig(num_blocks=LONGEST // SIZE, block_size=SIZE, max_num_seqs=8, max_model_len=LONGEST)
    runner = Runner(model, config, torch.bfloat16, CPU)
    runner.use_kernels(capture=False)
    runner._warm_up()
    start = len(asked)
    runner.lora.add("a", adapter)
    runner.warm_up_adapters()
    adapted = len(asked) - start
    before = len(asked)
    rng = random.Random(0)
    for number in range(60):
        count = rng.choice([1, 1, 2, 3, 5, 8])
        decode = number % 3 == 0
        pieces = [(rng.choice([0, 15, 16, 200, 1000, 1900]), 1 if decode else rng.choice([1, 1, 3, 4, 17, 64, 140])) for _ in range(count)]
        step(runner, pieces, [rng.choice([None, "a"]) if number % 2 else None for _ in pieces])
    print(json.dumps({"start": start, "adapters": adapted, "later": asked[before:]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
