"""Runs inside vLLM's own environment (see test_vllm.py): greedy token ids for a list of jobs. usage: vllm_worker.py JOBS.json OUT.json

A job: {"model", "adapter" or null, "dtype", "prompts": [[ids]], "max_tokens"}. Jobs of one model share one engine.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    answers: list[list[list[int]]] = []
    engine, loaded = None, None
    for number, job in enumerate(jobs):
        if loaded != job["model"]:
            del engine
            lora = {"enable_lora": True, "max_lora_rank": 16} if any(j["adapter"] and j["model"] == job["model"] for j in jobs) else {}
            engine = LLM(job["model"], dtype=job["dtype"], max_model_len=512, enforce_eager=True, **lora)
            loaded = job["model"]
        request = LoRARequest(f"adapter{number}", number + 1, job["adapter"]) if job["adapter"] else None
        params = SamplingParams(temperature=0, max_tokens=job["max_tokens"])
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False, lora_request=request)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    with open(sys.argv[2], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
