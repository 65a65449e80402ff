"""What `swift bench --adapters` does not measure about adapters: loading under load, thousands of them, and memory given back.

usage: bench_lora.py MODEL [--adapters DIR ...] [--many DIR] [--json FILE] [--only mixed,load,streams,base,many,memory]

  mixed    a batch whose requests each have another adapter, against the same batch on the base, in turn on one engine
  load     file to first token of an adapter that is new, against a request to the base, on an idle engine
  streams  20 adapters loaded and unloaded in a row while 16 streams run: the largest gap between two tokens against a usual step
  base     steps of the base alone: an engine with adapters in memory against one without any
  many     2000 registered adapters, requests by a power law, against the same requests over 5 of them
  memory   resident memory before adapters, with them, and after they are unloaded

MODEL-lora0 ... (scripts/peers/make_model.py MODEL 8) are used when --adapters is not given. `many` writes its adapters (rank 8 on
q and v, 2.3 MB each for the benchmark model, nearly all of it holes in the files) into --many once. Run on a quiet machine; ratios
of one run count. TORCH_DTYPE sets the arithmetic (default: chosen as everywhere).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.request import SamplingParams

COUNT, FEW, RANK = 2000, 5, 8
DTYPE = os.environ.get("TORCH_DTYPE", "auto")


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def prompt(length: int, generator: random.Random) -> list[int]:
    return [generator.randrange(10, 8000) for _ in range(length)]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(model: str, **config: Any) -> Engine:
    return Engine(model, EngineConfig(**{"enable_prefix_caching": False, "max_model_len": 2048, **config}), dtype=DTYPE)


def load(model: str, adapters: list[str], repeats: int = 3) -> dict[str, float]:
    """Milliseconds: a base request's first token; and from the call that loads to the first token of the new adapter."""
    generator = random.Random(0)
    base, fresh, loads = [], [], []
    with start(model) as engine:
        engine.generate(prompt(32, generator), greedy(2))
        for path in adapters * repeats:
            begun = time.perf_counter()
            engine.generate(prompt(32, generator), greedy(1))
            base.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            engine.add_adapter("new", path)
            loads.append(time.perf_counter() - begun)
            engine.generate(prompt(32, generator), greedy(1), adapter="new")
            fresh.append(time.perf_counter() - begun)
            engine.remove_adapter("new")
        engine.check()

    def median(values: list[float]) -> float:
        return 1e3 * sorted(values)[len(values) // 2]

    return {"base_ms": median(base), "load_ms": median(loads), "new_ms": median(fresh), "beyond_base_ms": median(fresh) - median(base)}


def streams(model: str, adapters: list[str], count: int = 16, changes: int = 20) -> dict[str, float]:
    """Gaps between a stream's tokens, in ms: quiet, with requests to the base coming in, and with adapters coming and going.

    And the time to the first token of such a request: to the base, and from the call that loads its new adapter.
    """
    generator = random.Random(0)
    gaps: dict[str, list[float]] = {"quiet": [], "base": [], "busy": []}
    firsts: dict[str, list[float]] = {"base": [], "busy": []}
    failed = 0
    now = "warm-up"

    async def follow(stream: Any) -> bool:
        last = 0.0
        async for output in stream:
            arrived = time.perf_counter()
            if last and now in gaps and not output.finished:
                gaps[now].append(arrived - last)
            last = arrived
        return output.error is not None

    async def run(engine: Engine) -> None:
        nonlocal now, failed
        names = [None, "s0", "s1", "s2"]
        running = [
            asyncio.create_task(follow(engine.submit(prompt(64, generator), greedy(600), adapter=names[i % 4]))) for i in range(count)
        ]
        await asyncio.sleep(2)
        now = "quiet"
        await asyncio.sleep(4)
        for now in firsts:
            for index in range(changes):
                begun = time.perf_counter()
                if now == "busy":
                    await asyncio.to_thread(engine.add_adapter, "new", adapters[index % len(adapters)])
                adapter = "new" if now == "busy" else None
                result = await engine.submit(prompt(16, generator), greedy(1), adapter=adapter).aresult()
                firsts[now].append(time.perf_counter() - begun)
                failed += result.error is not None
                if now == "busy":
                    await asyncio.to_thread(engine.remove_adapter, "new")
                await asyncio.sleep(generator.random() * 0.1)  # else every request would come right after a step
        now = "over"
        for name in ("s0", "s1", "s2"):
            engine.remove_adapter(name)
        failed += sum([await task for task in running])

    with start(model) as engine:
        for index in range(3):
            engine.add_adapter(f"s{index}", adapters[index])
        asyncio.run(run(engine))
        engine.check()
    quiet, with_base, busy = (sorted(1e3 * gap for gap in gaps[which]) for which in gaps)
    first, new = (1e3 * sorted(firsts[which])[changes // 2] for which in firsts)
    step = quiet[len(quiet) // 2]
    return {"step_ms": step, "quiet_worst_ms": quiet[-1], "base_worst_ms": with_base[-1], "busy_median_ms": busy[len(busy) // 2],
            "busy_p99_ms": busy[len(busy) * 99 // 100], "busy_worst_ms": busy[-1], "worst_in_steps": busy[-1] / step,
            "base_first_ms": first, "new_first_ms": new, "beyond_base_ms": new - first, "failed": failed}  # fmt: skip


def base(model: str, adapters: list[str], repeats: int = 5) -> dict[str, float]:
    """Tokens a second of base requests at batch 8: adapters in memory against none, in turn on one engine."""
    generator = random.Random(0)
    best = {"without": 0.0, "with": 0.0}
    with start(model) as engine:
        for _ in range(repeats):
            for which in best:
                if which == "with":
                    for index, path in enumerate(adapters):
                        engine.add_adapter(f"a{index}", path)
                    engine.generate(prompt(8, generator), greedy(2), adapter="a0")
                prompts = [prompt(64, generator) for _ in range(8)]
                begun = time.perf_counter()
                engine.generate(prompts, greedy(64))
                best[which] = max(best[which], 8 * 64 / (time.perf_counter() - begun))
                for name in [info.name for info in engine.adapters()]:
                    engine.remove_adapter(name)
    return {"without": best["without"], "with": best["with"], "ratio": best["with"] / best["without"]}


def mixed(model: str, adapters: list[str], rounds: int = 4) -> dict[str, float]:
    """Speed of requests over all adapters as a share of the base's: prefill of 128-token prompts, decode at batch 1, 8 and 32."""
    generator = random.Random(0)
    best: dict[tuple[str, bool], float] = {}
    with start(model, max_num_seqs=32) as engine:
        for index, path in enumerate(adapters):
            engine.add_adapter(f"m{index}", path)

        def seconds(batch: int, tokens: int, adapted: bool) -> float:
            prompts = [prompt(128, generator) for _ in range(batch)]
            names = [f"m{i % len(adapters)}" if adapted else None for i in range(batch)]
            begun = time.perf_counter()
            engine.generate(prompts, greedy(tokens), names)
            return time.perf_counter() - begun

        for _ in range(rounds):
            for batch in (1, 8, 32):
                for adapted in (False, True):
                    first = seconds(batch, 1, adapted)
                    rest = seconds(batch, 33, adapted) - first
                    cases = {f"decode_{batch}": rest} | ({"prefill": first} if batch == 8 else {})
                    for name, value in cases.items():
                        best[name, adapted] = min(value, best.get((name, adapted), value))
    return {name: best[name, False] / best[name, True] for name, adapted in best if adapted}


def make_many(model: str, folder: Path, count: int) -> None:
    """`count` adapters, each written whole or not at all. The first layer's A and B are random, the rest are zeros in a file's hole:
    they are read, checked and multiplied like any other, and take no disk."""
    from safetensors.torch import save
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    outs = {"q_proj": config.num_attention_heads * config.head_dim, "v_proj": config.num_key_value_heads * config.head_dim}
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(outs), "base_model_name_or_path": None}
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, out in outs.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, config.hidden_size)), ("lora_B", (out, RANK))):
                tensors[f"{key}.{part}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    drawn = sum(tensor.numel() for tensor in list(tensors.values())[:4])
    for number in range(count):
        path = folder / f"m{number}"
        if path.is_dir():
            continue
        work = folder / f".m{number}"
        work.mkdir(parents=True, exist_ok=True)
        values = torch.randn(drawn, generator=torch.Generator().manual_seed(number)) * 0.02
        with open(work / "adapter_model.safetensors", "wb") as file:
            file.write(content[:start] + values.bfloat16().view(torch.uint8).numpy().tobytes())
            file.truncate(len(content))
        (work / "adapter_config.json").write_text(json.dumps(settings))
        work.rename(path)


def many(model: str, folder: Path, count: int = COUNT, requests: int = 256, memory: int = 1 << 27) -> dict[str, float]:
    """Output tokens a second of mixed requests over `count` adapters by a power law, and over 5 of them."""
    make_many(model, folder, count)
    result: dict[str, float] = {"registered": count}
    with start(model, adapter_memory=memory, max_num_seqs=32) as engine:
        begun, before = time.perf_counter(), resident()
        for number in range(count):
            engine.register_adapter(f"m{number}", folder / f"m{number}")
        result["register_ms_each"] = 1e3 * (time.perf_counter() - begun) / count
        rates: dict[int, list[float]] = {FEW: [], count: []}
        for turn in range(2):
            for size in rates:
                generator = random.Random(turn)
                weights = [1 / (rank + 1) for rank in range(size)]
                names = [f"m{n}" for n in generator.choices(range(size), weights, k=requests)]
                prompts = [prompt(128, generator) for _ in range(requests)]
                begun = time.perf_counter()
                outputs = engine.generate(prompts, greedy(32), adapter=names)
                rates[size].append(requests * 32 / (time.perf_counter() - begun))
                assert not any(output.error for output in outputs)
                result[f"distinct_of_{size}"] = len(set(names))
        used = sum(info.nbytes for info in engine.adapters() if info.tier == "device")
        assert used <= memory, f"{used} bytes of adapters, {memory} allowed"
        engine.check()
        few, all_ = max(rates[FEW]), max(rates[count])
        result |= {"few": few, "many": all_, "ratio": all_ / few, "adapter_mb": used / 1e6, "limit_mb": memory / 1e6}
        result["grown_mb"] = (resident() - before) / 1e6
    return result


def memory(model: str, adapters: list[str]) -> dict[str, float]:
    """Megabytes of the process; the second round shows that nothing piles up."""
    result = {}
    with start(model) as engine:
        engine.generate([[5] * 64] * 8, greedy(8))
        for turn in range(3):
            result[f"before_{turn}"] = resident() / 1e6
            for index, path in enumerate(adapters):
                engine.add_adapter(f"a{index}", path)
            engine.generate([[5] * 64] * 8, greedy(8), adapter=[f"a{i % len(adapters)}" for i in range(8)])
            result[f"loaded_{turn}"] = resident() / 1e6
            for index in range(len(adapters)):
                engine.remove_adapter(f"a{index}")
            result[f"after_{turn}"] = resident() / 1e6
        engine.check()
    result["returned"] = (result["loaded_1"] - result["after_1"]) / max(result["loaded_1"] - result["before_1"], 1e-9)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapters", nargs="*")
    parser.add_argument("--many", type=Path)
    parser.add_argument("--count", type=int, default=COUNT, help="adapters of the case `many`")
    parser.add_argument("--requests", type=int, default=256, help="requests of the case `many`")
    parser.add_argument("--only", default="mixed,load,streams,base,many,memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    adapters = options.adapters or [str(path) for path in sorted(Path(options.model).parent.glob(Path(options.model).name + "-lora*"))]
    cases = {"mixed": mixed, "load": load, "streams": streams, "base": base, "memory": memory}
    report: dict[str, Any] = {"model": options.model, "threads": torch.get_num_threads()}
    for name in options.only.split(","):
        if name == "many":
            if options.many is None:
                print("many: left out (give --many DIR)")
                continue
            found = many(options.model, options.many, options.count, options.requests)
        else:
            found = cases[name](options.model, adapters)
        report[name] = found
        print(
            f"{name}: " + ", ".join(f"{key} {value:.3g}" if value < 2 else f"{key} {value:.1f}" for key, value in found.items()),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
