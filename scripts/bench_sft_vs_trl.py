"""Trains the benchmark model with this package and with TRL in turn and writes BENCHMARKS.md's training table.

usage: bench_sft_vs_trl.py WORK_DIR [--envs DIR] [--rounds N] [--steps N] [--write]

Both train on the same tokens in every step: our encoded rows (answers are learnt, prompts are not) in our order, 4 rows of mixed
length a step (plain) or as many whole rows as 4 of mean length have tokens, packed into one pass (packed). TRL gets them encoded, so
its tokenizing and its packer are not measured. LoRA r=16 on all linears, bfloat16, AdamW at a constant rate without weight decay; no
gradient checkpointing. The losses of each step stand side by side: the first is the untouched model's and must agree up to rounding;
after it the adapters' random beginnings differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from bench_vs_peers import HERE, cpu_name, put_section

BATCH, RATE, GB_IN_GIB = 4, 1e-4, 1e9 / 2**30


def flags(model: Path, rows: Path, packing: bool, steps: int) -> list[str]:
    given = [
        "--model", model, "--dataset", rows, "--torch_dtype", "bfloat16", "--lora_rank", "16", "--lora_alpha", "32",
        "--target_modules", "all-linear", "--per_device_train_batch_size", BATCH, "--packing", packing, "--dataset_shuffle", "false",
        "--gradient_accumulation_steps", "1", "--max_steps", steps, "--max_length", "512", "--learning_rate", RATE,
        "--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--weight_decay", "0", "--adam_beta2", "0.999", "--logging_steps", "1",
        "--save_steps", "100000", "--split_dataset_ratio", "0", "--gradient_checkpointing", "false", "--save_only_model", "true",
        "--report_to", "none", "--add_version", "false",
    ]  # fmt: skip
    return [str(part) for part in given]


def export(model: Path, rows: Path, packing: bool, steps: int, out: Path) -> list[tuple[int, int]]:
    """Write what our run trains on as TRL takes it, encoded and in order; (tokens, targets) of each step."""
    from swiftlite.chat.template import Template
    from swiftlite.models.loading import load_tokenizer
    from swiftlite.options.parse import parse
    from swiftlite.train import material

    options = parse("sft", flags(model, rows, packing, steps))
    found = material.prepare(options, Template.load(model, load_tokenizer(model)), options.max_length, 1)
    counts = []
    with open(out, "w", encoding="utf-8") as file:
        for number in range(steps):
            (rows_of_pass,) = found.plan.step(number)
            samples = [found.samples[i] for i in rows_of_pass]
            # a row's first token has nothing to be told from, least of all the end of the row packed before it
            labels = [[-100, *(int(i) if m else -100 for i, m in zip(s.ids[1:], s.mask[1:], strict=True))] for s in samples]
            lines = [{"input_ids": s.ids.tolist(), "labels": own} for s, own in zip(samples, labels, strict=True)]
            if packing:
                ids, own = ([token for line in lines for token in line[key]] for key in ("input_ids", "labels"))
                lines = [{"input_ids": ids, "labels": own, "seq_lengths": [len(s.ids) for s in samples]}]
            file.writelines(json.dumps(line) + "\n" for line in lines)
            counts.append((sum(len(s.ids) for s in samples), sum(int(s.mask[1:].sum()) for s in samples)))
    return counts


def ours(model: Path, rows: Path, packing: bool, counts: list[tuple[int, int]], work: Path) -> dict:
    out = work / f"sft-{'packed' if packing else 'plain'}"
    command = [sys.executable, "-m", "swiftlite.cli", "sft", *flags(model, rows, packing, len(counts)), "--output_dir", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    done, log = log[-1], [row for row in log if "tokens_per_s" in row]
    seconds = sum(tokens / row["tokens_per_s"] for (tokens, _), row in zip(counts[1:], log[1:], strict=True))  # the first step warms up
    return {
        "tokens_per_s": sum(tokens for tokens, _ in counts[1:]) / seconds if seconds else None,
        "memory_gib": max(row["memory_gb"] for row in log) * GB_IN_GIB,
        "tokens": done["tokens"],
        "losses": [row["loss"] for row in log],
    }


def trl(python: Path, model: Path, encoded: Path, packing: bool, steps: int, work: Path) -> dict:
    out = work / "trl.json"
    job = {"model": str(model), "rows": str(encoded), "packing": packing, "batch": BATCH, "steps": steps, "rate": RATE, "out": str(out)}
    done = subprocess.run([python, str(HERE / "peers/trl_driver.py"), json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-2000:]}")
    return json.loads(out.read_text())


def loss_table(kind: str, counts: list[tuple[int, int]], mine: list[float], theirs: list[float]) -> list[str]:
    lines = [f"| {kind}: step | tokens | targets | swiftlite loss | TRL loss | difference |", "|---|---|---|---|---|---|"]
    for number, ((tokens, targets), a, b) in enumerate(zip(counts, mine, theirs, strict=True), 1):
        lines.append(f"| {number} | {tokens} | {targets} | {a:.4f} | {b:.4f} | {a - b:+.4f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--envs", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--write", action="store_true", help="replace the section in BENCHMARKS.md")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    model, rows, python = work / "model", work / "rows.jsonl", (args.envs or work / "peers").absolute() / "trl/bin/python"
    if not (model / "config.json").exists():
        subprocess.run([sys.executable, str(HERE / "peers/make_model.py"), str(model)], check=True)
    if not rows.exists():
        subprocess.run([sys.executable, str(HERE / "peers/make_rows.py"), str(rows)], check=True)
    speeds = ["| rows | tokens a step | swiftlite tok/s | TRL tok/s | ratio | swiftlite GiB | TRL GiB | ratio |", "|" + "---|" * 8]
    losses: list[str] = []
    for packing in (False, True):
        kind, encoded = "packed" if packing else "plain", work / "trl-rows.jsonl"
        counts = export(model, rows, packing, args.steps, encoded)
        mine, theirs = [], []
        for number in range(args.rounds):
            print(f"round {number + 1}, {kind} ...", file=sys.stderr, flush=True)
            mine.append(ours(model, rows, packing, counts, work))
            theirs.append(trl(python, model, encoded, packing, args.steps, work))
        trained = {report["tokens"] for report in (*mine, *theirs)}
        if trained != {sum(tokens for tokens, _ in counts)}:
            sys.exit(f"not the same tokens: {counts} were planned, {trained} were trained on")
        a, b = (max(report["tokens_per_s"] or 0 for report in runs) for runs in (mine, theirs))
        m, n = (min(report["memory_gib"] for report in runs) for runs in (mine, theirs))
        each = f"{min(tokens for tokens, _ in counts)}-{max(tokens for tokens, _ in counts)}"
        ratio = f"{a / b:.2f}x" if b else "-"  # one step alone is only a warm-up
        speeds.append(f"| {kind} | {each} | {a:.0f} | {b:.0f} | {ratio} | {m:.1f} | {n:.1f} | {m / n:.2f}x |")
        losses += [*loss_table(kind, counts, mine[0]["losses"], theirs[0]["losses"]), ""]
    title = f"## Training on a CPU: {cpu_name()}"
    text = "\n".join([
        title, "",
        f"{datetime.date.today()}, {cpu_name()}, {len(os.sched_getaffinity(0))} cores, bfloat16, LoRA r=16 on all linears, "
        f"Qwen3-0.6B's shape, 4 rows a step, or packed into one pass as many tokens as 4 rows of mean length have; no gradient "
        f"checkpointing. Best of {args.rounds} rounds of {args.steps} steps, in turn; peak memory of the whole process.",
        "Command: `python scripts/bench_sft_vs_trl.py WORK_DIR`", "", *speeds, "",
        "Both trained on the same tokens and the same targets (answers only) in the same order, at the same constant rate:", "",
        *losses,
    ])  # fmt: skip
    print(text)
    if args.write:
        put_section(title, text)


if __name__ == "__main__":
    main()
