"""Measures this engine and its peers in turn on one machine and writes BENCHMARKS.md's serving tables.

usage: bench_vs_peers.py WORK_DIR [--envs DIR] [--peers vllm llamacpp transformers] [--rounds N] [--adapters N] [--quick] [--write]

WORK_DIR gets the benchmark model; --envs holds the peers' environments (scripts/peers/setup.sh). Engines run one after another,
round by round, so that a slow minute of the machine hits them all; a case's figure is the best over the rounds. Ratios are against
the best peer of that case.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BATCHES = [[1, 128, 64], [8, 128, 64], [32, 128, 64], [1, 1024, 16], [8, 1024, 32]]
QUICK = [[1, 128, 32], [8, 128, 32]]
Rows = dict[tuple[int, int, int], dict[str, float]]


def run_ours(model: Path, cases: list[list[int]], mixed: int, adapters: list[str], out: Path) -> dict:
    flags = ["--adapters", *adapters] if adapters else []
    rows: list[dict] = []
    report: dict = {}
    by_length: dict[tuple[int, int], list[int]] = {}
    for batch, prompt, output in cases:
        by_length.setdefault((prompt, output), []).append(batch)
    jobs = [[f"--batch_size={','.join(map(str, b))}", f"--input_output_len={p},{o}"] for (p, o), b in by_length.items()]
    for job in [*jobs, *([[f"--num_prompts={mixed}"]] if mixed else [])]:
        command = [sys.executable, "-m", "swiftlite.cli", "bench", "-m", str(model), "--torch_dtype", "bfloat16", "--json", str(out)]
        subprocess.run([*command, *job, *flags], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
        if "--num_prompts" in job[0]:
            found["cases"][0] |= {"input_length": 0, "output_length": 0}
        rows += found["cases"]
        report = report or found
    return {**report, "cases": rows}


def run_peer(peer: str, python: Path, model: Path, cases: list[list[int]], mixed: int, adapters: list[str], out: Path) -> dict:
    env = dict(os.environ)
    if peer == "vllm":
        preload = glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob(str(python.parent.parent / "lib/libiomp5.so"))
        env |= {"VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_LOGGING_LEVEL": "ERROR", "LD_PRELOAD": ":".join(preload)}
        env["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{len(os.sched_getaffinity(0)) - 1}"  # else one core is kept for its API server
    job = {"model": str(model), "adapters": adapters, "cases": cases, "mixed": mixed, "out": str(out), "started": time.time()}
    done = subprocess.run([python, str(HERE / "peers" / f"{peer}_driver.py"), json.dumps(job)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stderr[-2000:]}")
    return json.loads(out.read_text())


def best(rounds: list[dict]) -> Rows:
    """Per case, the best of every figure over the rounds."""
    found: Rows = {}
    for report in rounds:
        for row in report["cases"]:
            key = (row["batch_size"], row["input_length"], row["output_length"])
            kept = found.setdefault(key, {})
            for name, value in row.items():
                if name.endswith("_per_s"):
                    kept[name] = max(value, kept.get(name, 0.0))
    return found


def table(results: dict[str, list[dict]]) -> str:
    engines = list(results)
    rows = {engine: best(rounds) for engine, rounds in results.items()}
    lines = ["| case | " + " | ".join(engines) + " | ratio to the best peer |", "|---|" + "---|" * (len(engines) + 1)]
    for key in rows["swiftlite"]:
        batch, prompt, output = key
        kinds = [("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")] if prompt else [("output", "output_tokens_per_s")]
        case = f"batch {batch}, {prompt} in, {output} out" if prompt else f"{batch} mixed requests (32-1024 in, 16-256 out)"
        for kind, name in kinds:
            values = [rows[engine].get(key, {}).get(name) for engine in engines]
            peers = [value for value in values[1:] if value]
            ratio = f"{values[0] / max(peers):.2f}x" if peers else "-"
            shown = " | ".join("-" if value is None else f"{value:.1f}" for value in values)
            lines.append(f"| {case}: {kind} tok/s | {shown} | {ratio} |")
    for label, name in (("start to first token, s", "start_to_first_token_s"), ("peak memory, GiB", "peak_memory_gb")):
        values = [min(report[name] for report in results[engine]) for engine in engines]
        lines.append(
            f"| {label} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {values[0] / min(values[1:] or values):.2f}x |"
        )
    return "\n".join(lines)


def put_section(title: str, text: str) -> None:
    """Replace the section of BENCHMARKS.md that begins with `title` (it names the processor), or add it at the end."""
    path = HERE.parent / "BENCHMARKS.md"
    old = path.read_text() if path.exists() else "# Benchmarks\n"
    before, found, after = old.partition(title + "\n")
    rest = after.partition("\n## ")
    if found:
        path.write_text(before + text + ("\n## " + rest[2] if rest[1] else ""))
    else:
        path.write_text(old.rstrip() + "\n\n" + text)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--envs", type=Path, help="folder of the peers' environments (default: WORK_DIR/peers)")
    parser.add_argument("--peers", nargs="*", default=["vllm"], choices=["vllm", "llamacpp", "transformers"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=0, help="serve so many LoRA adapters, mixed in every batch")
    parser.add_argument("--mixed", type=int, default=32, help="requests of the mixed case (0: leave it out)")
    parser.add_argument("--quick", action="store_true", help="two small cases only")
    parser.add_argument("--write", action="store_true", help="replace the section of this run in BENCHMARKS.md")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, envs = args.work.absolute() / "model", (args.envs or args.work / "peers").absolute()
    if not (model / "config.json").exists() or (args.adapters and not Path(f"{model}-lora{args.adapters - 1}").exists()):
        subprocess.run([sys.executable, str(HERE / "peers/make_model.py"), str(model), str(max(args.adapters, 0))], check=True)
    adapters = [f"{model}-lora{i}" for i in range(args.adapters)]
    cases, mixed = (QUICK, 0) if args.quick else (BATCHES, args.mixed)
    results: dict[str, list[dict]] = {"swiftlite": [], **{peer: [] for peer in args.peers}}
    for number in range(args.rounds):
        for engine, reports in results.items():
            print(f"round {number + 1}: {engine} ...", file=sys.stderr, flush=True)
            out = args.work.absolute() / f"{engine}.json"
            if engine == "swiftlite":
                reports.append(run_ours(model, cases, mixed, adapters, out))
            else:
                batch_cases = [c for c in cases if engine != "transformers" or c[0] == 1]
                reports.append(run_peer(engine, envs / engine / "bin/python", model, batch_cases, mixed, adapters, out))
    versions = results["swiftlite"][0]["versions"]
    title = f"## Serving on a CPU{f', {args.adapters} adapters mixed' if args.adapters else ''}: {cpu_name()}"
    command = " ".join(["python scripts/bench_vs_peers.py WORK_DIR", *sys.argv[2:]]).replace(f" --envs {args.envs}", " --envs ENVS")
    text = "\n".join([
        title, "",
        f"{datetime.date.today()}, {cpu_name()}, {len(os.sched_getaffinity(0))} cores, bfloat16, Qwen3-0.6B's shape with random weights; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()) + f". Best of {args.rounds} rounds, engines in turn.",
        f"Command: `{command}`", "", table(results), "",
    ])  # fmt: skip
    print(text)
    if args.write:
        put_section(title, text)


if __name__ == "__main__":
    main()
