"""--fsdp: every process holds its share of each parameter, gradient and optimizer state (ZeRO, arXiv 1910.02054).

torch's `fully_shard` (FSDP2) does the work: a decoder layer's parameters are gathered just before it computes, forward and
backward, and dropped after; its gradients are summed straight into the shares. `full_shard` drops after the forward pass too
(ZeRO-3), `shard_grad_op` keeps what the forward pass gathered until the backward pass has used it (ZeRO-2: faster, more memory).
Not through accelerate: it calls this same function, but brings its own backward, clipping, casts and checkpoints around a
model's `forward`, and this loop calls the model's body and its head apart.

Invariants: the sharded root is `TargetLoss`, whose one forward holds every use of a parameter, the head's weight included.
All processes make the same number of passes (`Ranks.share`), since each pass gathers. Layers of a frozen bfloat16 base with
float32 adapters are gathered as they are. Float32 masters that compute in bfloat16 are gathered in bfloat16; embeddings, last
norm and head stay float32, as in one process. Sums, not means: the loop divides by the step's targets.

Does not know: flags, rows, files. Checkpoints hold whole tensors (`gather`), so they do not tell how a run was sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from swiftlite.errors import UsageError
from swiftlite.train.loss import TargetLoss

FULL, GRADIENTS = KINDS = ("full_shard", "shard_grad_op")


def shard(loss: TargetLoss, device: torch.device, kind: str) -> None:
    """Split the parameters of `loss` and its model over the processes, on `device`; made before the optimizer.

    Every process must hold the same whole model. UsageError for a model without decoder layers that can be told apart.
    """
    again = kind == FULL
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = [module for module in loss.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"--fsdp cannot split {type(loss.model).__name__}", "its decoder layers are of no known kind", "leave out --fsdp"
        )  # fmt: skip
    loss.sharded = True
    loss.onednn = loss.onednn and device.type == "cpu"  # it was loaded on the host
    policy = MixedPrecisionPolicy(param_dtype=loss.autocast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
    fully_shard(loss, mesh=mesh, reshard_after_forward=again, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in (loss, *layers):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot average


def held(loss: TargetLoss) -> int:
    """How many parameters lie in this process."""
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in loss.parameters())


def drop_gathered(loss: TargetLoss) -> None:
    """Back to the shares everywhere: a pass without a backward pass may have left gathered parameters in their place."""
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what the processes' shares make together; all of them must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the host where `keep`, else {}. One tensor at a time is whole on the device; one that goes by two names
    (tied weights) stays one. All processes must call."""
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            full = whole(tensor.detach())
            seen[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            found[name] = seen[id(tensor)]
    return found


@torch.no_grad()
def gather_state(state: Any, keep: bool) -> Any:
    """An optimizer's state_dict with whole tensors on the host; where not `keep`, without them. All processes must call."""
    if isinstance(state, dict):
        return {key: gather_state(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [gather_state(value, keep) for value in state]
    if isinstance(state, Tensor):
        full = whole(state.detach())
        return full.cpu() if keep else None
    return state


def share_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """`gather_state`'s result, cut as the optimizer's parameters are cut; each process cuts its own, none sends anything."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(value: Any, parameter: Tensor) -> Any:
        if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )  # fmt: skip
        return value

    cuts = {i: {key: cut(value, parameters[i]) for key, value in own.items()} for i, own in state["state"].items()}
    return {**state, "state": cuts}
