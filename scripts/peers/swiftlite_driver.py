"""This engine, asked as its peers are."""

import time

from cases import arguments, serve

from swiftlite import LLM, SamplingParams


def main() -> None:
    job = arguments()
    adapters = {f"lora{i}": path for i, path in enumerate(job["adapters"])}
    llm = LLM(job["model"], dtype="bfloat16", adapters=adapters, max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False)
    names = list(adapters)

    def generate(prompts: list[list[int]], outputs: list[int]) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in outputs]
        llm.generate(prompts, params, [names[i % len(names)] for i in range(len(prompts))] if names else None)

    generate([[5, 6, 7]], [1])
    first = time.time() - job["started"]
    if names:  # every adapter is loaded before it is timed
        generate([[5, 6, 7]] * len(names), [1] * len(names))
    serve(generate, first)


if __name__ == "__main__":
    main()
