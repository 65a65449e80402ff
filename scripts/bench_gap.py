"""The longest gap between two tokens of a running stream while a long prompt arrives, against the step that the budget allows.

usage: bench_gap.py MODEL [--prompt 4096] [--budgets 256 512 1024 2048] [--dtype auto] [--rounds 2]

For each token budget: the long prompt alone gives the budgeted step (its time over its number of steps) and the prefill speed; then
it arrives while a stream runs, and the reader's clock gives the gaps. The least of the rounds counts for each: a busy machine makes
steps and gaps longer, never shorter.
"""

from __future__ import annotations

import argparse
import itertools
import random
import threading
import time

from swiftlite import LLM, SamplingParams
from swiftlite.engine.engine import Engine


def measure(engine: Engine, long: list[int], short: list[int]) -> tuple[float, float, float]:
    """(seconds of a mean step of the long prompt alone, longest gap of a stream while it arrives, usual gap)."""
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    steps = -engine.stats()["steps"]
    start = time.perf_counter()
    engine.generate([long], one)
    alone = time.perf_counter() - start
    steps += engine.stats()["steps"]

    times: list[float] = []
    stream = engine.submit(short, SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True))

    def read() -> None:
        seen = 0
        for snapshot in stream:
            count = len(snapshot.outputs[0].token_ids)
            if count > seen:
                times.append(time.perf_counter())
                seen = count

    reader = threading.Thread(target=read)
    reader.start()
    while len(times) < 10:
        time.sleep(0.01)
    arrived = time.perf_counter()
    engine.generate([long[::-1]], one)
    ended = time.perf_counter()
    stream.abort()
    reader.join()
    gaps = [(before, after - before) for before, after in itertools.pairwise(times[1:])]
    during = [gap for before, gap in gaps if before + gap > arrived and before < ended]
    usual = sorted(gap for before, gap in gaps if before + gap <= arrived)
    return alone / steps, max(during), usual[len(usual) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    llm = LLM(options.model, dtype=options.dtype, enable_prefix_caching=False, kv_cache_memory=2 * 2**30)
    rng = random.Random(0)
    vocabulary = len(llm.engine.tokenizer)
    long, short = ([rng.randrange(10, vocabulary) for _ in range(length)] for length in (options.prompt, 64))
    llm.generate([long], SamplingParams(temperature=0, max_tokens=1))
    print(f"model {options.model}, {llm.engine.dtype}, a prompt of {options.prompt} tokens arrives")
    for budget in options.budgets:
        scheduler = llm.engine._loop.scheduler  # the model stays loaded
        scheduler.budget = scheduler._alone = budget  # a prompt alone may have larger steps
        rounds = [measure(llm.engine, long, short) for _ in range(options.rounds)]
        step, gap, usual = (min(values) for values in zip(*rounds, strict=True))
        speed = options.prompt / (-(-options.prompt // budget) * step)
        print(
            f"budget {budget:5}: step {1e3 * step:6.0f} ms, longest gap {1e3 * gap:6.0f} ms ({gap / step:.2f} x), usual gap "
            f"{1e3 * usual:4.0f} ms; prefill alone {speed:.0f} tokens/s"
        )
    llm.shutdown()


if __name__ == "__main__":
    main()
