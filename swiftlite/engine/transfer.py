"""Between host and device without waiting: numbers on their way there, results on their way back, tokens that stay.

A GPU works in the order in which it is told, while the host goes on; only `Readback.read` waits. On a CPU the same calls copy
nothing, and there is nothing to wait for. It does not know sequences or what is transferred.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers (nested lists, an array, a tensor on the host) on the device, without waiting for what runs there."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and tensor.numel():
        tensor = tensor.pin_memory()  # from other memory the copy would wait; torch keeps this one until the copy is done
    return tensor.to(device, non_blocking=True)


def put(values: Tensor, target: Tensor) -> None:
    """Copy a dense tensor on the host into one on the device, behind what that was told before, without waiting for it."""
    target.copy_(values.pin_memory() if target.device.type == "cuda" else values, non_blocking=True)  # kept by torch as in `to_device`


def put_tokens(ids: Tensor, places: list[tuple[int, int]], tokens: Tensor) -> None:
    """ids[row] = tokens[place] for each (row, place), on the device: ids [T] and tokens [S] int64.

    A token of -1 (its row was not finite) becomes 0: what is made of it is dropped once the host has seen it.
    """
    rows, which = to_device(list(zip(*places, strict=True)), torch.int64, ids.device).unbind(0)
    ids.index_copy_(0, rows, tokens.index_select(0, which).clamp_(min=0))


class Readback:
    """Tensors on their way to the host, behind everything that the device was told before."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors, self._done = tensors, None
        if tensors[0].device.type == "cuda":
            self._tensors = tuple(torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors)
            for host, tensor in zip(self._tensors, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def read(self) -> tuple[Tensor, ...]:
        """The tensors on the host, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors
