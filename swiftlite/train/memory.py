"""How much memory there is, how much a run used, how much a forward pass would keep for its backward; and keeping what is freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

GB = 1e9


def keep_freed() -> None:
    """Let the C library keep freed memory for the next allocation instead of giving it back to the system.

    Every step allocates the same activations again; fresh pages are zeroed one fault at a time (5 % of a step on two cores).
    glibc only (mallopt(3)); elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return  # another C library
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc takes
    mallopt(m_trim_threshold, (1 << 31) - 1)
    mallopt(m_top_pad, 64 << 20)


def peak(device: torch.device) -> float:
    """GB at the peak: the CUDA allocator's on a GPU, else this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    try:  # VmHWM is this program's own; ru_maxrss is inherited across exec from a large parent
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GB
    except OSError:
        pass  # not Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def free(device: torch.device) -> int:
    """Bytes that may still be allocated: the GPU's free memory, or the machine's within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else min(available, int(limit) - int(used))
    except (OSError, ValueError):
        return available  # no cgroup v2


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` keeps for its backward, parameters not counted; its graph is dropped again."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward()
    return total
