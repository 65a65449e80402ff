"""Decode speed with n-gram speculation against without, on answers that repeat their prompt.

usage: bench_spec.py [--model MODEL] [--tokens 5] [--output 200] [--batch 1] [--dtype auto] [--rounds 3]

Without --model: tiny-chat is asked a question that its history has answered already. With --model DIR: a copy of the model of the
same shape is made whose greedy answer is known (attention and MLP are there and cost the same, but weigh next to nothing; the head
says "token t is followed by t + 1"). Its prompt holds the answer's text in shuffled pieces of 12 tokens, so that drafts are right
inside a piece and wrong at its end. Both ways must give the same tokens where the arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch

from swiftlite import LLM, SamplingParams
from swiftlite.hub import resolve_model

PIECE, FIRST = 12, 100


def make_copier(model_dir: Path, target: Path, length: int) -> None:
    """A model like that in `model_dir` that counts from FIRST to FIRST + length and begins again."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_dir, target, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(torch.randn(table.shape, generator=generator))
        head = torch.zeros_like(table)
        cycle = torch.arange(FIRST, FIRST + length)
        head[cycle.roll(-1)] = table[cycle]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(target)


def shuffled_pieces(length: int, rng: random.Random) -> list[int]:
    pieces = [list(range(start, min(start + PIECE, FIRST + length))) for start in range(FIRST, FIRST + length, PIECE)]
    rng.shuffle(pieces)
    return [token for piece in pieces for token in piece]


def asked_again(llm: LLM, count: int, rng: random.Random) -> list[list[int]]:
    """Chats of tiny-chat's rows in which the last question was asked and answered before."""
    from swiftlite import data

    lines = (Path(data.__file__).parent / "tiny_chat.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [turn for turn in (_first_turn(json.loads(line)) for line in lines) if turn and len(turn[1]["content"]) > 60]
    return [llm.template.encode_prompt([*turn, turn[0]]) for turn in rng.sample(turns, count)]


def _first_turn(row: dict) -> list[dict] | None:
    messages = [message for message in row["messages"] if message["role"] != "system"][:2] if "messages" in row else []
    return messages if [message["role"] for message in messages] == ["user", "assistant"] else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--output", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as work:
        model = options.model or "tiny-chat"
        if options.model:
            model = work
            make_copier(resolve_model(options.model), Path(work), 480)
        settings = {"dtype": options.dtype, "kv_cache_memory": 2 * 2**30, "enable_prefix_caching": False}
        plain, guessing = LLM(model, **settings), LLM(model, speculate_ngram=options.tokens, **settings)
        if options.model:
            prompts = [shuffled_pieces(480, rng) for _ in range(options.batch)]
        else:
            prompts = asked_again(plain, 12 * options.batch, rng)
        params = SamplingParams(temperature=0, max_tokens=options.output, ignore_eos=bool(options.model))
        params.stop_token_ids = list(plain.template.stop_ids) if not options.model else []
        best = [0.0, 0.0]
        answers: list[list[list[int]]] = [[], []]
        for _ in range(options.rounds + 1):
            for way, llm in enumerate((plain, guessing)):
                seconds, tokens, answers[way] = 0.0, 0, []
                for start in range(0, len(prompts), options.batch):
                    outputs = llm.generate(prompts[start : start + options.batch], params)
                    seconds += max(o.metrics["finished"] for o in outputs) - max(o.metrics["first_token"] for o in outputs)
                    tokens += sum(len(o.outputs[0].token_ids) - 1 for o in outputs)
                    answers[way] += [o.outputs[0].token_ids for o in outputs]
                best[way] = max(best[way], tokens / seconds)
        stats = guessing.engine.stats()
        same = sum(one == two for one, two in zip(*answers, strict=True))
        print(f"{options.model or 'tiny-chat'}, {plain.engine.dtype}, batch {options.batch}, {sum(map(len, answers[0]))} tokens a round")
        print(f"decode {best[0]:.0f} tokens/s without, {best[1]:.0f} with drafts of up to {options.tokens}: {best[1] / best[0]:.2f} x")
        print(f"drafted {stats['draft_tokens']:.0f}, accepted {stats['accepted_tokens']:.0f}; same answers: {same} of {len(prompts)}")
        plain.shutdown()
        guessing.shutdown()


if __name__ == "__main__":
    main()
