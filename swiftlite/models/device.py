"""Which device and which arithmetic, chosen once per command and said with the reason.

Cores are those the process may use: its affinity mask, cut by the container's CPU quota; OMP_NUM_THREADS wins.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from swiftlite.errors import ModelError, UsageError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(flag: str = "auto") -> torch.device:
    """`auto` takes the first CUDA device where there is one. Prints the choice. Raises ModelError for a device that is absent."""
    if flag == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(flag)
        except RuntimeError:
            raise ModelError(f"unknown device {flag!r}", fix="use auto, cpu, cuda or cuda:N") from None
        if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
            found = f"{torch.cuda.device_count()} CUDA devices are visible"
            raise ModelError(f"device {flag} is not there", found, "use --device cpu, or check CUDA_VISIBLE_DEVICES and the torch build")
    if device.type == "cuda":
        print(f"device: {device} ({torch.cuda.get_device_name(device)})")
    else:
        threads = use_cores()
        print(f"device: cpu, {threads} threads ({'OMP_NUM_THREADS' if 'OMP_NUM_THREADS' in os.environ else 'cores this process may use'})")
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU the calling thread's own: each thread begins with the first one, where Triton would launch and events and pinned
    memory would be made. At the start of every thread that works for an engine."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def available_cores() -> int:
    """Cores this process may use: affinity mask and cgroup v2 quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has no affinity
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2: the affinity mask is all there is to know
    return cores


def use_cores() -> int:
    """Set torch's threads to what the process may use, unless OMP_NUM_THREADS says; returns the number."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())
    return torch.get_num_threads()


def choose_dtype(flag: str | torch.dtype, device: torch.device, checkpoint: str | None = None) -> torch.dtype:
    """A dtype or its name; `auto`: bfloat16 where a short probe finds it no slower than float32, else float32.

    `checkpoint` is the dtype that the model's config.json names: on a CPU a float32 checkpoint stays float32. Prints the choice.
    Raises UsageError for another name.
    """
    if flag != "auto":
        name = str(flag).removeprefix("torch.")
        if name not in TORCH_DTYPES:
            raise UsageError(f"unknown dtype {name!r}", fix=f"use auto, {', '.join(TORCH_DTYPES)}")
        return TORCH_DTYPES[name]
    if checkpoint == "float32" and device.type == "cpu":
        print("dtype: float32 (the checkpoint's own)")
        return torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        print(f"dtype: {str(dtype)[6:]} ({'native on this GPU' if dtype is torch.bfloat16 else 'this GPU has no bfloat16'})")
        return dtype
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    dtype = torch.bfloat16 if ratio >= 0.9 else torch.float32
    print(f"dtype: {str(dtype)[6:]} (a matrix product in bfloat16 runs at {ratio:.1f}x float32's speed here)")
    return dtype


def base_dtype(model: torch.nn.Module) -> torch.dtype:
    """Of a model's frozen weights, or of all where none is: copies that are trained beside an adapter are float32 whatever the base."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return next((parameter.dtype for parameter in floating if not parameter.requires_grad), floating[0].dtype)


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Best of three [64, 1024] x [1024, 1024] products."""
    x, w = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best
