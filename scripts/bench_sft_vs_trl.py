"""Trains the benchmark model with this package and with TRL in turn and writes BENCHMARKS.md's training table.

usage: bench_sft_vs_trl.py WORK_DIR [--envs DIR] [--rounds N] [--steps N] [--write]
LoRA r=16 on all linears, bfloat16, batches of 4 rows of mixed length (mean 158 tokens), or the same packed; no gradient checkpointing.
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

BATCH = 4


def ours(model: Path, rows: Path, packing: bool, steps: int, work: Path) -> dict:
    out = work / f"sft-{'packed' if packing else 'plain'}"
    command = [
        sys.executable, "-m", "swiftlite.cli", "sft", "--model", model, "--dataset", rows, "--torch_dtype", "bfloat16", "--lora_rank", "16",
        "--lora_alpha", "32", "--target_modules", "all-linear", "--per_device_train_batch_size", BATCH, "--packing", packing,
        "--gradient_accumulation_steps", "1", "--max_steps", steps, "--max_length", "512", "--learning_rate", "1e-4",
        "--logging_steps", "1", "--save_steps", "100000", "--split_dataset_ratio", "0", "--gradient_checkpointing", "false",
        "--save_only_model", "true", "--report_to", "none", "--add_version", "false", "--output_dir", out,
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    log = [row for row in log if "tokens_per_s" in row][-steps:]
    speeds = [row["tokens_per_s"] for row in log[1:]]  # the first step warms up
    return {
        "tokens_per_s": len(speeds) / sum(1 / s for s in speeds),
        "memory_gb": max(r["memory_gb"] for r in log),
        "losses": [r["loss"] for r in log],
    }


def trl(python: Path, model: Path, rows: Path, packing: bool, steps: int, work: Path) -> dict:
    out = work / "trl.json"
    job = {"model": str(model), "rows": str(rows), "packing": packing, "batch": BATCH, "steps": steps, "out": str(out)}
    done = subprocess.run([python, str(HERE / "peers/trl_driver.py"), json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-2000:]}")
    return json.loads(out.read_text())


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
    lines = ["| rows | swiftlite tok/s | TRL tok/s | ratio | swiftlite GiB | TRL GiB | ratio |", "|---|---|---|---|---|---|---|"]
    for packing in (False, True):
        mine, theirs = [], []
        for number in range(args.rounds):
            print(f"round {number + 1}, packing {packing} ...", file=sys.stderr, flush=True)
            mine.append(ours(model, rows, packing, args.steps, work))
            theirs.append(trl(python, model, rows, packing, args.steps, work))
        a, b = (max(r["tokens_per_s"] for r in runs) for runs in (mine, theirs))
        m, n = (min(r["memory_gb"] for r in runs) for runs in (mine, theirs))
        lines.append(f"| {'packed' if packing else 'plain'} | {a:.0f} | {b:.0f} | {a / b:.2f}x | {m:.1f} | {n:.1f} | {m / n:.2f}x |")
        print(f"losses: ours {mine[0]['losses']}, TRL {theirs[0]['losses']}", file=sys.stderr)
    title = "## Training on a CPU"
    text = "\n".join([
        title, "",
        f"{datetime.date.today()}, {cpu_name()}, {len(os.sched_getaffinity(0))} cores, bfloat16, LoRA r=16 on all linears, "
        f"Qwen3-0.6B's shape, 4 rows a step (mean 158 tokens), no gradient checkpointing. "
        f"Best of {args.rounds} rounds of {args.steps} steps, in turn.",
        "Command: `python scripts/bench_sft_vs_trl.py WORK_DIR`", "", *lines, "",
    ])  # fmt: skip
    print(text)
    if args.write:
        put_section(title, text)


if __name__ == "__main__":
    main()
