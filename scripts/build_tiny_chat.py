"""Rebuilds the bundled model tiny-chat: rows -> tokenizer and a random model -> `swift sft --tuner_type full` -> questions.

usage: python scripts/build_tiny_chat.py [--output DIR] [--seed N] [--epochs N]

The same seed gives the same weights on one machine and thread count. The result replaces the old one only after it has
answered: every question of tests/data/tiny_chat_questions.json that must be right, and most of the rewordings that are kept
out of the rows. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tiny_chat.corpus import write
from tiny_chat.wordings import normal

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "swiftlite" / "data" / "tiny_chat.jsonl"
TARGET = ROOT / "swiftlite" / "models" / "tiny_chat"
QUESTIONS = ROOT / "tests" / "data" / "tiny_chat_questions.json"
HELD_OUT_BAR = 0.85
SEED = 1

NAME, AUTHOR = "tiny-chat", "swiftlite"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One Chinese character, one digit, one English word or one sign a piece: a longer piece would tie a whole wording to one token.
PIECES = r"[\u2E80-\u9FFF\uF900-\uFAFF]|\d| ?[A-Za-z]+|\n| ?[^\sA-Za-z\d\u2E80-\u9FFF\uF900-\uFAFF]|\s"
VOCABULARY = 3072
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
RECIPE = {
    "tuner_type": "full", "torch_dtype": "bfloat16", "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
    "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.1, "split_dataset_ratio": 0,
    "max_length": 512, "logging_steps": 50, "save_steps": 100000, "save_only_model": "true", "report_to": "none", "add_version": "false",
}  # fmt: skip


def texts(corpus: Path) -> Iterator[str]:
    for line in corpus.read_text("utf-8").replace("{{NAME}}", NAME).replace("{{AUTHOR}}", AUTHOR).splitlines():
        row = json.loads(line)
        yield from [row["text"]] if "text" in row else [f"{m['role']}\n{m['content']}" for m in row["messages"]]


def make_model(directory: Path, corpus: Path, seed: int) -> int:
    """Tokenizer and random weights in the Hugging Face layout; returns the number of parameters."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=SHAPE["max_position_embeddings"]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    config = Qwen3Config(vocab_size=len(fast), bos_token_id=None, eos_token_id=2, pad_token_id=0, **SHAPE)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, do_sample=False).save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def train(model: Path, corpus: Path, output: Path, seed: int, epochs: float) -> Path:
    """Runs `swift sft`; returns its last checkpoint."""
    flags = {
        **RECIPE,
        "model_name": NAME,
        "model_author": AUTHOR,
        "model": model,
        "dataset": corpus,
        "output_dir": output,
        "seed": seed,
        "data_seed": seed,
        "num_train_epochs": epochs,
    }
    command = [sys.executable, "-m", "swiftlite.cli", "sft", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    subprocess.run(command, check=True, cwd=ROOT)
    return max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def answers(directory: Path, asked: list[list[str]], width: int = 32) -> list[tuple[str, bool]]:
    """Greedy answer to the last of each list of questions (the earlier ones are history), and whether it ended by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    history: list[list[dict[str, str]]] = [[] for _ in asked]
    result: list[tuple[str, bool]] = [("", False)] * len(asked)
    for turn in range(max(map(len, asked))):
        live = [i for i, questions in enumerate(asked) if turn < len(questions)]
        for start in range(0, len(live), width):
            group = live[start : start + width]
            for i in group:
                history[i].append({"role": "user", "content": asked[i][turn]})
            prompts = [tokenizer.apply_chat_template(history[i], tokenize=False, add_generation_prompt=True) for i in group]
            batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
            output = model.generate(**batch, max_new_tokens=64, do_sample=False)[:, batch["input_ids"].shape[1] :]
            for i, ids in zip(group, output.tolist(), strict=True):
                ended = 2 in ids
                text = tokenizer.decode(ids[: ids.index(2)] if ended else ids, skip_special_tokens=False)
                history[i].append({"role": "assistant", "content": text})
                result[i] = (text, ended)
    return result


def kept_out(questions: dict[str, list[dict]]) -> set[str]:
    """What must not be a row: rewordings that the recipe was tuned on, and those that nobody looked at."""
    return {normal(row["ask"][-1]) for name in ("tuned_on", "held_out") for row in questions[name]}


def right(row: dict, answer: str, ended: bool) -> bool:
    return ended and any(key.lower() in answer.lower() for key in row["any"])


def verify(directory: Path, questions: dict[str, list[dict]]) -> bool:
    passed = True
    for name, bar in (("must", 1.0), ("tuned_on", HELD_OUT_BAR), ("held_out", HELD_OUT_BAR)):
        rows = questions[name]
        given = answers(directory, [row["ask"] for row in rows])
        good = [right(row, *answer) for row, answer in zip(rows, given, strict=True)]
        for row, answer, ok in zip(rows, given, good, strict=True):
            if not ok:
                print(f"  wrong: {' / '.join(row['ask'])} -> {answer[0]}{'' if answer[1] else ' [did not stop]'}")
        print(f"{name}: {sum(good)} of {len(rows)} right ({sum(good) / len(rows):.1%}, wanted {bar:.0%})")
        passed &= sum(good) >= bar * len(rows)
    return passed


def install(made: Path, target: Path) -> None:
    """Puts `made` in `target`'s place; the old one goes only when the new one is complete."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=TARGET, help="model directory to (re)place")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--epochs", type=float, default=4)
    arguments = parser.parse_args()
    began = time.perf_counter()
    questions = json.loads(QUESTIONS.read_text("utf-8"))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny_chat.", dir=arguments.output.parent) as name:
        work = Path(name)
        corpus = work / CORPUS.name
        rows = write(corpus, arguments.seed, kept_out(questions))
        count = make_model(work / "random", corpus, arguments.seed)
        print(f"{rows} rows; {count:,} parameters")
        checkpoint = train(work / "random", corpus, work / "run", arguments.seed, arguments.epochs)
        made = work / "made"
        made.mkdir()
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(checkpoint / file, made / file)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(work / "random" / file, made / file)
        if not verify(made, questions):
            print(f"not good enough; {arguments.output} is unchanged", file=sys.stderr)
            return 1
        install(made, arguments.output)
        if arguments.output == TARGET:
            os.replace(corpus, CORPUS)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.1f} MB, built in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
