"""What every engine is asked, and how a case is measured: shared by the engines' drivers, each run in its engine's own environment.

A batch case runs twice, with one output token (prefill) and whole; decode is the difference, as in `swift bench`; it is taken from the
best times over all turns, because the difference of two runs is anything where the machine changes between them. A driver loads its
engine, then measures the cases that come on its standard input, a line each; what it answers goes to a file, because engines print.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

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


def measure(generate: Generate, batch: int, prompt: int, output: int, repeats: int = 2) -> dict[str, float]:
    """Seconds to the first token and to the end of `batch` requests at once, best of `repeats`; `prompt` 0: so many requests of
    mixed lengths, once, and how many tokens they have."""
    if not prompt:
        prompts, outputs = mixed(batch)
        return {"tokens": sum(outputs), "total_s": _timed(generate, prompts, outputs)}
    first = total = float("inf")
    for repeat in range(repeats):
        prompts = prompts_of(repeat, [prompt] * batch)
        first = min(first, _timed(generate, prompts, [1] * batch))
        total = min(total, _timed(generate, prompts, [output] * batch))
    return {"first_s": first, "total_s": total}


def _timed(generate: Generate, prompts: list[list[int]], outputs: list[int]) -> float:
    start = time.perf_counter()
    generate(prompts, outputs)
    return time.perf_counter() - start


def arguments() -> dict:
    """The JSON object that bench_vs_peers.py passes: model, adapters, started (time.time() of the launch), out (a file for answers)."""
    return json.loads(sys.argv[1])


def serve(generate: Generate, first: float, repeats: int = 2) -> None:
    """Say how long the start took, then answer cases [batch, prompt, output] until there are no more."""
    with open(arguments()["out"], "w") as out:
        print(json.dumps(first), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(measure(generate, *json.loads(line), repeats)), file=out, flush=True)
