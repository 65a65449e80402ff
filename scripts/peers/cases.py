"""What every engine is asked, and how a case is measured: shared by the peers' drivers, each run in its peer's own environment.

A batch case runs twice, with one output token (prefill) and whole; decode is the difference. The same as `swift bench`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

VOCABULARY = 8000  # token ids are drawn from the tokenizer's real part

# generate(prompts, output length of each) runs all at once to the end
Generate = Callable[[list[list[int]], list[int]], None]


def prompts_of(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(10, VOCABULARY) for _ in range(length)] for length in lengths]


def mixed(count: int) -> tuple[list[list[int]], list[int]]:
    """Requests of mixed lengths: prompts of 32 to 1024 tokens, answers of 16 to 256."""
    generator = random.Random(0)
    lengths = [(generator.randint(32, 1024), generator.randint(16, 256)) for _ in range(count)]
    return prompts_of(1, [prompt for prompt, _ in lengths]), [output for _, output in lengths]


def measure(generate: Generate, cases: list[list[int]], mixed_requests: int, repeats: int = 2) -> list[dict[str, float]]:
    """One row per (batch, prompt, output) case, best of `repeats`, and one for the mixed requests."""
    rows = []
    for batch, prompt, output in cases:
        first = total = float("inf")
        for repeat in range(repeats):
            prompts = prompts_of(repeat, [prompt] * batch)
            first = min(first, _timed(generate, prompts, [1] * batch))
            total = min(total, _timed(generate, prompts, [output] * batch))
        decode = batch * (output - 1) / max(total - first, 1e-9)
        rows.append({"batch_size": batch, "input_length": prompt, "output_length": output, "prefill_tokens_per_s": batch * prompt / first,
                     "decode_tokens_per_s": decode, "output_tokens_per_s": batch * output / total})  # fmt: skip
    if mixed_requests:
        prompts, outputs = mixed(mixed_requests)
        seconds = _timed(generate, prompts, outputs)
        rows.append({"batch_size": mixed_requests, "input_length": 0, "output_length": 0, "output_tokens_per_s": sum(outputs) / seconds})
    return rows


def _timed(generate: Generate, prompts: list[list[int]], outputs: list[int]) -> float:
    start = time.perf_counter()
    generate(prompts, outputs)
    return time.perf_counter() - start


def arguments() -> dict:
    """The JSON object that bench_vs_peers.py passes: model, adapters, cases, mixed, started (time.time() of the launch), out."""
    return json.loads(sys.argv[1])


def peak_kib(pid: str) -> int:
    """Peak memory of a process and its children (vLLM's engine is one), in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0
    children = {child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()}
    return own + sum(map(peak_kib, children))


def report(out: str, first: float, rows: list[dict[str, float]]) -> None:
    memory = peak_kib("self") / 2**20
    with open(out, "w") as file:
        json.dump({"start_to_first_token_s": first, "peak_memory_gb": memory, "cases": rows}, file)
