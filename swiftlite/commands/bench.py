"""`swift bench`: prefill, decode and serving speed of the engine, one `[BENCHMARK]` line a case in TensorRT-LLM's manner.

A batch case runs twice: with one output token (prefill) and whole; decode is the difference, so that both are comparable with
other engines measured the same way. Where noise has the shorter run take longer, decode is what the whole one took from its last
first token on. Prompts are random tokens and the prefix cache is off: nothing is reused.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftlite.errors import ModelError, UsageError
from swiftlite.options.parse import Options

if TYPE_CHECKING:
    from swiftlite.engine.engine import Engine
    from swiftlite.engine.request import RequestOutput, SamplingParams

PROMPT_RANGE, OUTPUT_RANGE = (32, 1024), (16, 256)  # tokens of a mixed request
SHORTEST = PROMPT_RANGE[0] + OUTPUT_RANGE[0] + 1


@dataclass
class Case:
    """One measured case. Lengths in tokens (means for mixed requests), times in ms, `ttft_ms` is the mean time to first token."""

    batch_size: int
    input_length: int
    output_length: int
    adapters: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    output_tokens_per_s: float
    latency_ms: float
    p95_ms: float
    p99_ms: float
    ttft_ms: float
    kv_waste: float  # share of the slots of used KV blocks that held no token, mean over the steps


def parse_cases(batch_size: str, input_output_len: str) -> list[tuple[int, int, int]]:
    """(batch size, prompt tokens, output tokens) of every case. Raises UsageError."""
    try:
        batches = [int(b) for b in batch_size.split(",")]
        lengths = [tuple(int(n) for n in pair.split(",")) for pair in input_output_len.split(";") if pair.strip()]
        cases = [(batch, prompt, output) for prompt, output in lengths for batch in batches]
    except ValueError:
        raise UsageError(
            f"cannot read --batch_size {batch_size!r} or --input_output_len {input_output_len!r}",
            fix='write e.g. --batch_size 1,8 --input_output_len "128,64;1024,16"',
        ) from None
    if not cases or any(n < 1 for case in cases for n in case):
        raise UsageError("batch sizes and lengths must be at least 1")
    return cases


def main(options: Options) -> int:
    """Measure every case, print a line each and a table, write the JSON."""
    if options.model is None and options.model_type is None:
        raise UsageError("swift bench needs a model", fix="add -m DIRECTORY, e.g. -m tiny-chat")
    cases = parse_cases(options.batch_size, options.input_output_len)
    if options.num_prompts < 0 or not 0 <= options.request_rate < float("inf"):
        raise UsageError("--num_prompts and --request_rate must be at least 0", fix="0 requests a second: all at once")
    if options.json:
        _check_report(Path(options.json))
    from swiftlite.commands.serving import load_engine
    from swiftlite.engine.config import EngineConfig

    # all of --num_prompts may wait at once: the limit is for servers
    limits = {"max_waiting": max(EngineConfig.max_waiting, options.num_prompts)}
    engine, names = load_engine(options, enable_prefix_caching=False, **limits)
    try:
        longest = max(prompt + output for _, prompt, output in cases)
        if not options.num_prompts and longest > engine.max_model_len:
            why = f"prompt and answer share {engine.max_model_len} tokens"
            raise UsageError(f"a case of {longest} tokens does not fit", why, "shorten it, or raise --max_model_len")
        if options.num_prompts and engine.max_model_len < SHORTEST:
            why = f"prompt and answer share {engine.max_model_len} tokens, the shortest of the mixed requests has {SHORTEST}"
            raise UsageError("--num_prompts does not fit", why, "raise --max_model_len, or measure cases of --input_output_len")
        started = _seconds_since_start(engine)
        print(f"start to first token: {started:.1f} s")
        if options.num_prompts:
            measured = [serve_case(engine, names, options.num_prompts, options.request_rate)]
            _print_line(options, measured[0])
        else:
            measured = []
            for batch, prompt, output in cases:
                measured.append(batch_case(engine, names, batch, prompt, output))
                _print_line(options, measured[-1])
        _print_table(measured)
        if options.json:
            report = {**_machine(engine, options), "start_to_first_token_s": started, "peak_memory_gb": _peak_memory_gb()}
            report["cases"] = [asdict(case) for case in measured]
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    finally:
        engine.shutdown()
    return 0


def batch_case(engine: Engine, names: list[str], batch: int, prompt: int, output: int, repeats: int = 2) -> Case:
    """`batch` equal requests at once, adapters taken in turn; the best of `repeats` runs counts, percentiles are over all."""
    generator = random.Random(0)
    vocabulary = len(engine.tokenizer)
    adapters = [names[i % len(names)] if names else None for i in range(batch)]
    first = total = rest = float("inf")
    latencies: list[float] = []
    waits: list[float] = []
    before = engine.stats()
    for _ in range(repeats):
        prompts = [[generator.randrange(min(10, vocabulary - 1), vocabulary) for _ in range(prompt)] for _ in range(batch)]
        first = min(first, _timed(engine, prompts, 1, adapters)[0])
        seconds, outputs = _timed(engine, prompts, output, adapters)
        total = min(total, seconds)
        rest = min(rest, max(o.metrics["finished"] for o in outputs) - max(o.metrics["first_token"] for o in outputs))
        latencies += [o.metrics["finished"] - o.metrics["arrival"] for o in outputs]
        waits += [o.metrics["first_token"] - o.metrics["arrival"] for o in outputs]
    decode = batch * (output - 1) / max(total - first if total > first else rest, 1e-9) if output > 1 else 0.0
    return Case(
        batch, prompt, output, min(len(names), batch), batch * prompt / first, decode, batch * output / total,
        1e3 * total, 1e3 * _percentile(latencies, 95), 1e3 * _percentile(latencies, 99), 1e3 * sum(waits) / len(waits),
        _kv_waste(before, engine.stats()),
    )  # fmt: skip


def serve_case(engine: Engine, names: list[str], count: int, rate: float) -> Case:
    """`count` requests of mixed lengths, arriving as a Poisson process of `rate` a second (0: all at once)."""
    generator = random.Random(0)
    vocabulary = len(engine.tokenizer)
    longest = engine.max_model_len
    streams, waited = [], 0.0
    prompt_tokens = output_tokens = 0
    before = engine.stats()
    start = time.monotonic()
    for i in range(count):
        prompt = min(generator.randint(*PROMPT_RANGE), longest - OUTPUT_RANGE[0] - 1)
        output = min(generator.randint(*OUTPUT_RANGE), longest - prompt)
        prompt_tokens, output_tokens = prompt_tokens + prompt, output_tokens + output
        ids = [generator.randrange(min(10, vocabulary - 1), vocabulary) for _ in range(prompt)]
        if rate > 0:
            waited += generator.expovariate(rate)
            time.sleep(max(0.0, start + waited - time.monotonic()))
        streams.append(engine.submit(ids, _greedy(output), adapter=names[i % len(names)] if names else None))
    outputs = [stream.result() for stream in streams]
    total = time.monotonic() - start
    _check_outputs(outputs)
    latencies = [o.metrics["finished"] - o.metrics["arrival"] for o in outputs]
    waits = [o.metrics["first_token"] - o.metrics["arrival"] for o in outputs]
    return Case(
        count, prompt_tokens // count, output_tokens // count, len(names), prompt_tokens / total, output_tokens / total,
        output_tokens / total, 1e3 * sum(latencies) / count, 1e3 * _percentile(latencies, 95), 1e3 * _percentile(latencies, 99),
        1e3 * sum(waits) / count, _kv_waste(before, engine.stats()),
    )  # fmt: skip


def _check_report(path: Path) -> None:
    """UsageError where the report could not be written: found now, and not when all is measured."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: its folder does not exist")
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder", fix="name a file in it")
    new = not path.exists()
    try:
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written", str(error.strerror), "name another file") from None


def _greedy(tokens: int) -> SamplingParams:
    from swiftlite.engine.request import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def _timed(engine: Engine, prompts: list[list[int]], tokens: int, adapters: list[str | None]) -> tuple[float, list[RequestOutput]]:
    start = time.perf_counter()
    outputs = engine.generate(prompts, _greedy(tokens), adapter=adapters)
    seconds = time.perf_counter() - start
    _check_outputs(outputs)
    return seconds, outputs


def _check_outputs(outputs: list[RequestOutput]) -> None:
    """ModelError when a request failed: its speed would be that of tokens that nobody computed."""
    for output in outputs:
        if output.error:
            raise ModelError("a request of the benchmark failed", output.error)


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _kv_waste(before: dict[str, float], after: dict[str, float]) -> float:
    return (after["empty_slots"] - before["empty_slots"]) / max(1, after["allocated_slots"] - before["allocated_slots"])


def _seconds_since_start(engine: Engine) -> float:
    """Seconds from the process's start to the end of a first one-token request."""
    engine.generate([[1, 2, 3]], _greedy(1))
    stat = Path("/proc/self/stat")
    if stat.is_file():  # psutil knows the boot's time by whole seconds only
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    import psutil

    return time.time() - psutil.Process().create_time()


def _peak_memory_gb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _machine(engine: Engine, options: Options) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    return {
        "model": options.model or options.model_type,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "quantization": engine.config.quantization,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("swiftlite", "torch", "transformers")}},
    }


def _print_line(options: Options, case: Case) -> None:
    total = case.output_tokens_per_s
    print(
        f"[BENCHMARK] model_name {options.model or options.model_type} batch_size {case.batch_size} input_length {case.input_length} "
        f"output_length {case.output_length} adapters {case.adapters} peak_mem(gb) {_peak_memory_gb():.2f} tokens_per_sec {total:.2f} "
        f"percentile95(ms) {case.p95_ms:.2f} percentile99(ms) {case.p99_ms:.2f} latency(ms) {case.latency_ms:.2f} "
        f"ttft(ms) {case.ttft_ms:.2f} prefill_tokens_per_second {case.prefill_tokens_per_s:.2f} "
        f"generation_tokens_per_second {case.decode_tokens_per_s:.2f} kv_waste(%) {100 * case.kv_waste:.2f}",
        flush=True,
    )


def _print_table(cases: list[Case]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, padding=0)  # fits 80 columns, which is also what a pipe has
    for name in ("batch", "in", "out", "adapters", "prefill tok/s", "decode tok/s", "output tok/s", "latency ms", "p99 ms", "ttft ms"):
        table.add_column(name, justify="right")
    for c in cases:
        rates = (c.prefill_tokens_per_s, c.decode_tokens_per_s, c.output_tokens_per_s, c.latency_ms, c.p99_ms, c.ttft_ms)
        table.add_row(*map(str, (c.batch_size, c.input_length, c.output_length, c.adapters)), *(f"{x:.1f}" for x in rates))
    Console(width=None).print(table)
