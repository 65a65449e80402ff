"""How near decoding comes to what memory gives: the bytes that one step must read, over the time that reading them takes at best.

usage: bench_memory.py MODEL [--cases "1,128,64;8,128,64;32,128,64;8,1024,32"] [--dtype auto] [--device auto] [--rounds 3]

A step reads every weight once (of an input table only the rows it looks up) and the keys and values of all its sequences. Memory's
own speed is that of summing a tensor of 1 GiB, in huge pages where the system gives them, taken before and after each case. Not for
mixtures of experts, whose steps leave weights unread.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from swiftlite import LLM
from swiftlite.commands.bench import batch_case
from swiftlite.models.shards import open_shards
from swiftlite.pages import zeros


def read_speed(place: torch.Tensor) -> float:
    """Bytes per second of reading `place` once."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        place.sum().item()
        best = min(best, time.perf_counter() - start)
    return place.nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", default="1,128,64;8,128,64;32,128,64;8,1024,32", help="batch size, tokens in, tokens out; ...")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    llm = LLM(args.model, dtype=args.dtype, device=args.device, enable_prefix_caching=False)
    engine = llm.engine
    sizes = {name: math.prod(info.shape) for name, info in open_shards(engine.model_dir).tensors.items()}
    table = next((name for name in sizes if name.endswith("embed_tokens.weight")), "")
    weights = sum(count for name, count in sizes.items() if name != table or "lm_head.weight" not in sizes) * engine.dtype.itemsize
    cache = engine.runner.bridge.layers
    token = sum(layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in cache) * engine.dtype.itemsize
    place = zeros(1 << 28, dtype=torch.float32) if engine.device.type == "cpu" else torch.zeros(1 << 28, device=engine.device)
    place.fill_(1.0)
    print(f"a step reads {weights / 1e9:.2f} GB of weights and {token / 1e3:.1f} kB a token of its sequences")
    for batch, prompt, output in (map(int, case.split(",")) for case in args.cases.split(";")):
        read = weights + batch * (prompt + output / 2) * token
        for _ in range(args.rounds):
            before = read_speed(place)
            case = batch_case(engine, [], batch, prompt, output, 1)
            speed = (before + read_speed(place)) / 2
            step = batch / case.decode_tokens_per_s
            print(
                f"batch {batch}, {prompt} in: {case.decode_tokens_per_s:.1f} tok/s, a step {1e3 * step:.1f} ms reads {read / 1e9:.2f} GB: "
                f"{read / step / 1e9:.1f} of {speed / 1e9:.1f} GB/s, {100 * read / step / speed:.0f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
