"""Beam search inside the engine against the two ways without it: blocks of separate sequences, time of re-submitting beams.

usage: bench_beam.py [MODEL] [--width 4] [--prompt 200] [--output 64] [--requests 1] [--dtype auto] [--rounds 3]

Re-submission is what a client can do with the public API: every token, each beam's tokens are sent as a new prompt that asks for one
token and its best alternatives, and the client keeps the best beams. The prefix cache is on, so only each beam's last block is
computed again. Both ways must find the same answers. Rounds take turns; the best time of each counts.
"""

from __future__ import annotations

import argparse
import random
import time

from swiftlite import LLM, SamplingParams


def resubmit(llm: LLM, prompts: list[list[int]], width: int, output: int) -> list[list[tuple[list[int], float]]]:
    """Beam search of fixed length outside the engine; all beams of all prompts are sent together. Best first: (tokens, score)."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=2 * width, ignore_eos=True)
    searches: list[list[tuple[list[int], float]]] = [[([], 0.0)] for _ in prompts]
    for _ in range(output):
        sent = [(number, tokens, total) for number, beams in enumerate(searches) for tokens, total in beams]
        outputs = llm.generate([prompts[number] + tokens for number, tokens, _ in sent], params)
        found: list[list[tuple[list[int], float]]] = [[] for _ in prompts]
        for (number, tokens, total), answer in zip(sent, outputs, strict=True):
            best = answer.outputs[0].logprobs[0].top
            found[number] += [([*tokens, token], total + value) for token, value in best.items()]
        searches = [sorted(beams, key=lambda beam: -beam[1])[:width] for beams in found]
    return searches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-chat")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    width, output = options.width, options.output

    llm = LLM(options.model, dtype=options.dtype, max_logprobs=max(20, 2 * width), kv_cache_memory=2 * 2**30)
    size = llm.engine.config.block_size
    used: list[int] = []  # blocks held in each step
    execute = llm.engine.runner.execute

    def counted(scheduled):
        stats = llm.engine.stats()
        used.append(int(stats["total_blocks"] - stats["free_blocks"]))
        return execute(scheduled)

    generator = random.Random(0)
    params = SamplingParams(use_beam_search=True, n=width, max_tokens=output, ignore_eos=True)
    inside = outside = float("inf")
    for number in range(options.rounds + 1):  # the first one warms up
        vocabulary = len(llm.engine.tokenizer)
        prompts = [[generator.randrange(10, vocabulary) for _ in range(options.prompt)] for _ in range(options.requests)]
        used.clear()
        llm.engine.runner.execute = counted  # type: ignore[method-assign]
        start = time.perf_counter()
        llm.generate(prompts, params)
        first = time.perf_counter() - start
        llm.engine.runner.execute = execute  # type: ignore[method-assign]
        held = used[-(output - 1) :]
        prompts = [[generator.randrange(10, vocabulary) for _ in range(options.prompt)] for _ in range(options.requests)]
        start = time.perf_counter()
        searches = resubmit(llm, prompts, width, output)
        second = time.perf_counter() - start
        if number:
            inside, outside = min(inside, first), min(outside, second)
        else:  # other prompts each time, so that no way finds the other's prefixes; once the same ones, to compare the answers
            same = llm.generate(prompts, params)
            agree = sum(
                answer.token_ids == tokens
                for search, one in zip(searches, same, strict=True)
                for (tokens, _), answer in zip(search, one.outputs, strict=True)
            )
    separate = [options.requests * width * -(-(options.prompt + step) // size) for step in range(1, output)]
    tokens = options.requests * width * output
    saved_peak, saved = 1 - max(held) / separate[-1], 1 - sum(held) / sum(separate)
    print(f"model {options.model}, {llm.engine.dtype}, {options.requests} request(s), {width} beams, {options.prompt} in, {output} out")
    print(f"answers that agree: {agree} of {options.requests * width}")
    print(f"blocks at the peak: {max(held)} shared, {separate[-1]} separate: {saved_peak:.1%} saved")
    print(f"blocks on average: {sum(held) / len(held):.1f} shared, {sum(separate) / len(separate):.1f} separate: {saved:.1%} saved")
    print(f"in the engine {inside:.2f} s, {tokens / inside:.0f} beam tokens/s")
    print(f"re-submitted {outside:.2f} s, {tokens / outside:.0f} beam tokens/s: {outside / inside:.1f} x the time")
    llm.engine.check()
    llm.shutdown()


if __name__ == "__main__":
    main()
