"""Several processes that train one model: who this one is, and the few things they tell each other.

Every process holds all rows and the whole model (with --fsdp a share of it: shard.py), and computes its share of a step's
forward passes; gradients are summed once a step. The process that is alone needs no process group, so torch.distributed is
not touched there. The environment is torchrun's (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT),
set by `launch` or by torchrun itself.

Does not know: models, rows, the loop.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from swiftlite.errors import TrainError, UsageError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
PATIENCE = timedelta(hours=2)  # how long others wait while one encodes rows or writes a checkpoint
BUCKET = 16 << 20  # numbers summed in one message

LOST = 75  # exit code of a process that another one has left


class Lost(TrainError):
    """Another process is gone, and with it what it was to send."""

    exit_code = LOST


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them, `local_world` on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @staticmethod
    def here() -> Ranks:
        """From the environment. All but the first process go quiet. UsageError for values that are no numbers."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return Ranks()
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
        try:
            ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in names.items()))
        except ValueError as error:
            raise UsageError("RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers", str(error)) from None
        if not ranks.first:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        return ranks

    @property
    def first(self) -> bool:
        """The process that writes and prints."""
        return self.rank == 0

    def device(self, flag: str) -> str:
        """--device for this process: each has a GPU of its own."""
        if self.local_world == 1 or flag == "cpu":
            return flag
        import torch

        if flag == "auto" and not torch.cuda.is_available():
            return flag
        if torch.cuda.device_count() < self.local_world:
            raise UsageError(
                f"{self.local_world} processes, but {torch.cuda.device_count()} GPUs are visible",
                fix="lower NPROC_PER_NODE, or use --device cpu",
            )
        return f"cuda:{self.local_rank}"

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Within: the others can be reached."""
        if self.world == 1:
            yield
            return
        import torch
        import torch.distributed as dist

        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.local_world))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.world, timeout=PATIENCE)
        try:
            yield
        except RuntimeError as error:  # gloo has no class of its own for this
            if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
                raise
            raise Lost(
                f"process {self.rank} cannot reach the others",
                f"one of them has ended, or the network between machines failed ({(str(error).splitlines() or [''])[0][:300]})",
                "look for what that one said; --resume_from_checkpoint goes on from the last checkpoint",
            ) from error  # fmt: skip
        finally:  # not a barrier: after an error the others may never come
            dist.destroy_process_group()

    def agree(self, value: Value) -> Value:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, passes: Sequence[Value], even: bool) -> list[tuple[Value, bool]]:
        """This process's passes, each with whether it counts. `even`: all processes get as many, some of which do not count."""
        own = [(one, True) for one in passes[self.rank :: self.world]]
        idle = even and len(own) < -(-len(passes) // self.world)
        return [*own, (passes[0], False)] if idle else own

    def gather(self, value: Value) -> list[Value]:
        """Everyone's value, by rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same bits in each; they must be alike everywhere."""
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        bucket: list[torch.Tensor] = []
        for number, tensor in enumerate(tensors):
            bucket.append(tensor)
            following = tensors[number + 1] if number + 1 < len(tensors) else None
            if following is not None and following.dtype == tensor.dtype and sum(t.numel() for t in bucket) + following.numel() <= BUCKET:
                continue
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))
            bucket = []
