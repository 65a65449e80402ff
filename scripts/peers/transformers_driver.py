"""transformers.generate, one request at a time (its own static padding would waste more on mixed lengths)."""

import time

import torch
from cases import arguments, serve
from transformers import AutoModelForCausalLM


def main() -> None:
    job = arguments()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], outputs: list[int]) -> None:
        for ids, n in zip(prompts, outputs, strict=True):
            inputs = torch.tensor([ids])
            mask = torch.ones_like(inputs)
            model.generate(inputs, attention_mask=mask, do_sample=False, min_new_tokens=n, max_new_tokens=n, pad_token_id=0)

    generate([[5, 6, 7]], [1])
    first = time.time() - job["started"]
    serve(generate, first, repeats=1)


main()
