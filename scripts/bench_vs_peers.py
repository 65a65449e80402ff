"""Measures this engine and its peers in turn on one machine and writes BENCHMARKS.md's serving tables.

usage: bench_vs_peers.py WORK_DIR [--envs DIR] [--peers vllm llamacpp transformers] [--rounds N] [--adapters N] [--quick] [--write]

WORK_DIR gets the benchmark model; --envs holds the peers' environments (scripts/peers/setup.sh). All engines are loaded, and all but one
are stopped (SIGSTOP): they take turns case by case, so that a slow minute of the machine hits them all. A case's figure is the best
over the rounds. Ratios are against the best peer of that case. transformers takes its turn (batch 1, and the mixed requests one at a
time) in the first round only: it takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# The last decodes long: its decoding time is the difference of two times of ten seconds, which vary by more than 32 steps take.
BATCHES = [(1, 128, 64), (8, 128, 64), (32, 128, 64), (1, 1024, 16), (8, 1024, 128)]
QUICK = [(1, 128, 32), (8, 128, 32)]
Case = tuple[int, int, int]  # requests at once, prompt tokens (0: mixed lengths), output tokens


class Engine:
    """A driver process with its engine loaded, stopped but for its turns."""

    def __init__(self, name: str, python: Path, model: Path, adapters: list[str], work: Path) -> None:
        env = dict(os.environ)
        if name == "vllm":
            preload = glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob(str(python.parent.parent / "lib/libiomp5.so"))
            env |= {"VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_LOGGING_LEVEL": "ERROR", "LD_PRELOAD": ":".join(preload)}
            env["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{len(os.sched_getaffinity(0)) - 1}"  # else one core is kept for its API server
        self.name, self.answers = name, work / f"{name}.answers"
        self.answers.unlink(missing_ok=True)
        job = {"model": str(model), "adapters": adapters, "out": str(self.answers), "started": time.time()}
        command = [python, str(HERE / "peers" / f"{name}_driver.py"), json.dumps(job)]
        self.log = open(work / f"{name}.log", "w+")  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, text=True, env=env, start_new_session=True
        )
        self.read = 0  # answers
        self.rows: dict[Case, dict[str, float]] = {}
        try:
            self.start: float = self._answer()
        except BaseException:
            self._signal(signal.SIGKILL)
            raise
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _answer(self) -> Any:
        while True:
            if self.process.poll() is not None:
                self.log.seek(0)
                sys.exit(f"{self.name} failed:\n{self.log.read()[-2000:]}")
            lines = self.answers.read_text().split("\n")[:-1] if self.answers.exists() else []
            if len(lines) > self.read:
                self.read += 1
                return json.loads(lines[self.read - 1])
            time.sleep(0.05)

    def measure(self, case: Case) -> None:
        """Its turn at a case; the best times are kept."""
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the wait for its answer says so
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
        row, kept = self._answer(), self.rows.setdefault(case, {})
        self._signal(signal.SIGSTOP)
        for name, value in row.items():
            kept[name] = min(value, kept.get(name, value))

    def rates(self, case: Case) -> dict[str, float]:
        """Tokens per second by kind; {} for a case that it did not have."""
        (batch, prompt, output), row = case, self.rows.get(case)
        if row is None:
            return {}
        if not prompt:
            return {"output": row["tokens"] / row["total_s"]}
        return {"prefill": batch * prompt / row["first_s"], "decode": batch * (output - 1) / max(row["total_s"] - row["first_s"], 1e-9)}

    def end(self) -> float:
        """End it; its peak memory in GiB, with that of its children (vLLM's engine is one). 0 where it has died."""
        memory = peak_kib(self.process.pid) / 2**20 if self.process.poll() is None else 0.0
        self._signal(signal.SIGKILL)
        self.process.wait()
        return memory


def peak_kib(pid: int | str) -> int:
    """Peak memory of a process and its children, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0
    children = {child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()}
    return own + sum(map(peak_kib, children))


def table(engines: list[Engine], cases: list[Case], memory: list[float]) -> str:
    lines = [
        "| case | " + " | ".join(engine.name for engine in engines) + " | ratio to the best peer |",
        "|---|" + "---|" * (len(engines) + 1),
    ]
    for case in cases:
        batch, prompt, output = case
        title = f"batch {batch}, {prompt} in, {output} out" if prompt else f"{batch} mixed requests (32-1024 in, 16-256 out)"
        for kind in ("prefill", "decode") if prompt else ("output",):
            values = [engine.rates(case).get(kind) for engine in engines]
            own, peers = values[0], [value for value in values[1:] if value]
            ratio = f"{own / max(peers):.2f}x" if own and peers else "-"
            shown = " | ".join("-" if value is None else f"{value:.1f}" for value in values)
            lines.append(f"| {title}: {kind} tok/s | {shown} | {ratio} |")
    for label, figures in (("start to first token, s", [engine.start for engine in engines]), ("peak memory, GiB", memory)):
        shown = " | ".join(f"{value:.1f}" for value in figures)
        lines.append(f"| {label} | {shown} | {figures[0] / (min(figures[1:] or figures) or float('nan')):.2f}x |")
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
    cases = QUICK if args.quick else [*BATCHES, *([(args.mixed, 0, 0)] if args.mixed else [])]
    engines: list[Engine] = []
    try:
        for name in ("swiftlite", *args.peers):
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            python = Path(sys.executable) if name == "swiftlite" else envs / name / "bin/python"
            if name == "transformers" and not python.exists():
                python = Path(sys.executable)
            engines.append(Engine(name, python, model, adapters, args.work.absolute()))
        for number in range(args.rounds):
            for case in cases:
                for engine in engines if number % 2 == 0 else engines[::-1]:
                    if engine.name == "transformers" and (number or (case[0] > 1 and case[1])):
                        continue
                    print(f"round {number + 1}, {case}: {engine.name} ...", file=sys.stderr, flush=True)
                    engine.measure(case)
    finally:
        memory = [engine.end() for engine in engines]
    title = f"## Serving on a CPU{f', {args.adapters} adapters mixed' if args.adapters else ''}: {cpu_name()}"
    command = " ".join(["python scripts/bench_vs_peers.py WORK_DIR", *sys.argv[2:]]).replace(f" --envs {args.envs}", " --envs ENVS")
    text = "\n".join([
        title, "",
        f"{datetime.date.today()}, {cpu_name()}, {len(os.sched_getaffinity(0))} cores, bfloat16, Qwen3-0.6B's shape with random weights; "
        f"python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("swiftlite", "torch", "transformers"))
        + f". Best of {args.rounds} rounds, engines in turn, case by case.",
        f"Command: `{command}`", "", table(engines, cases, memory), "",
    ])  # fmt: skip
    print(text)
    if args.write:
        put_section(title, text)


if __name__ == "__main__":
    main()
