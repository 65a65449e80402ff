"""This engine, asked as its peers are."""

import time

from cases import arguments, serve

from swiftlite import LLM, SamplingParams
from swiftlite.llm import LoRARequest


def main() -> None:
    job = arguments()
    adapters = job["adapters"]
    llm = LLM(job["model"], dtype="bfloat16", max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False, enable_lora=bool(adapters))
    requests = [LoRARequest(f"lora{i}", i + 1, path) for i, path in enumerate(adapters)]

    def generate(prompts: list[list[int]], outputs: list[int]) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in outputs]
        chosen = [requests[i % len(requests)] for i in range(len(prompts))] if requests else None
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, lora_request=chosen)

    generate([[5, 6, 7]], [1])
    first = time.time() - job["started"]
    for _ in requests:  # every adapter is loaded before it is timed
        generate([[5, 6, 7]] * len(requests), [1] * len(requests))
    serve(generate, first)


if __name__ == "__main__":
    main()
