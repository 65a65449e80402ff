"""Where adapters enter a model: which linears share an input, and what stands in their place while a batch has adapter rows.

A *group* is linears that read one input (q/k/v, gate/up); each of them is a *part*. A *tap* replaces the `forward` of one module that
computes one part, or, where the engine fused a group into one product (models/packed.py), all of them. Taps are in place only while a
batch needs them, so a step without adapters runs the stock modules. Input embedding and output head have taps of their own, only
for batches whose adapters change those.

It knows stacks and rows, not names or versions. Letters: T rows of the batch, S rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from swiftlite.engine.lora_extras import Extras
from swiftlite.engine.lora_native import NativeJob
from swiftlite.engine.lora_ops import Job
from swiftlite.engine.panels import PanelWeight
from swiftlite.errors import AdapterError
from swiftlite.models.packed import FusedLinear, FusedPart, PackedLinear

# Linears that read the same input; each name is the last part of a module's name, below one parent.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MERGE = "merge it: swift export --ckpt_dir <adapter> --merge_lora true"


@dataclass
class Group:
    """Linears that share an input; their A product is made once, at the first of them that is called."""

    index: int
    parts: list[str]
    width: int
    outs: list[int]
    x: Tensor | None = None
    products: list[Tensor | None] = field(default_factory=list)  # of each job
    left: int = 0

    def forget(self) -> None:
        self.x, self.products = None, []


class Tap:
    """Stands in for a module's `forward`."""

    def __init__(self, module: nn.Module, apply: Callable[[Tensor, Tensor], None]) -> None:
        """`apply(x, y)` changes the stock result y in place."""
        self.module, self.apply = module, apply
        self.linear = apply if isinstance(apply, (_Whole, _Part)) else None
        self.stock: Callable[[Tensor], Tensor] = module.forward
        self.own: Callable[[Tensor], Tensor] | None = None  # a forward that the module had on the instance

    def arm(self) -> None:
        # Straight into the instance: nn.Module's own setattr takes ten times as long.
        self.stock, self.own = self.module.forward, self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = self

    def disarm(self) -> None:
        if self.own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.own

    def __call__(self, x: Tensor) -> Tensor:
        if self.linear is not None and (joined := self.linear.join(x)) is not None:
            return joined
        y = self.stock(x)
        self.apply(x, y)
        return y


class Layers:
    """All of a model that adapters can change, and the present batch's work on it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shapes: dict[str, tuple[int, int]] = {}  # of every linear and embedding
        self.groups: list[Group] = []
        self.linears: dict[str, tuple[nn.Linear, int, int]] = {}  # module name -> (module, group, part)
        self._taps: list[Tap] = []
        self.embedding_name, self.head_name = "", ""
        self._survey()
        self._embedding = Tap(model.get_input_embeddings(), self._apply_embedding)
        self._head = Tap(model.get_output_embeddings(), self._apply_head)
        self._armed: list[Tap] = []
        self.jobs: Sequence[Job] = []
        self.joined: NativeJob | None = None  # the only job, where the base's product and the adapters' can be one call
        self._rows = 0
        self.extras: list[tuple[Extras, int, int]] = []  # with first row and end
        self._logits: list[tuple[Extras, Tensor]] = []  # with the rows of the logits that are theirs

    def _survey(self) -> None:
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        found: dict[str, nn.Linear] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                self.shapes[name] = (module.out_features, module.in_features)
                # The head sees other rows than the layers do: only those whose logits are wanted.
                if module is head:
                    self.head_name = name
                else:
                    found[name] = module
            elif isinstance(module, (nn.Embedding, Conv1D)):
                self.shapes[name] = (module.weight.shape[0], module.weight.shape[1])
                if module is embedding:
                    self.embedding_name = name
        fused: dict[int, Group] = {}
        for name, module in found.items():
            if name in self.linears:
                continue
            whole = module.fused if isinstance(module, FusedPart) else None
            parts = [part for part, _ in whole.parts] if whole is not None else self._siblings(name, found)
            group = Group(len(self.groups), parts, module.in_features, [found[part].out_features for part in parts])
            self.groups.append(group)
            self.linears |= {part: (found[part], group.index, i) for i, part in enumerate(parts)}
            if whole is not None:
                fused[id(whole)] = group
                every = _Whole(self, group, whole)
                self._taps.append(Tap(whole.product, every))
            else:
                some = [_Part(self, group, i, found[part]) for i, part in enumerate(parts)]
                self._taps += [Tap(one.linear, one) for one in some]

    @staticmethod
    def _siblings(name: str, found: dict[str, nn.Linear]) -> list[str]:
        """The linears that read the same input as `name`, by their names, itself included."""
        parent, _, leaf = name.rpartition(".")
        family = next((f for f in SHARED_INPUT if leaf in f), (leaf,))
        siblings = [f"{parent}.{sibling}" if parent else sibling for sibling in family]
        width = found[name].in_features
        return [s for s in siblings if s in found and found[s].in_features == width and not isinstance(found[s], FusedPart)]

    # -- one step

    def set_batch(self, jobs: Sequence[Job], extras: list[tuple[Extras, int, int]], rows: int, logits_rows: Tensor | None) -> None:
        """Work for the next forward of `rows` rows; no jobs and no extras: the stock modules run."""
        if jobs is self.jobs and rows == self._rows and not (extras or self.extras):
            return  # the same requests as in the last step
        self.jobs, self.extras, self._rows = jobs, extras, rows
        self.joined = jobs[0] if len(jobs) == 1 and not extras and isinstance(jobs[0], NativeJob) else None
        if not (jobs or extras or self._armed):
            return  # the base alone, as before: nothing to look at
        for group in self.groups:
            group.forget()
        wanted = self._taps if jobs or any(one.changes_linears for one, *_ in extras) else []
        if any(one.embedding is not None for one, *_ in extras):
            wanted = [*wanted, self._embedding]
        self._logits = []
        for one, start, end in extras:
            if one.head is not None:
                if logits_rows is None:
                    mine = torch.arange(start, end, device=self.model.device)
                else:
                    mine = ((logits_rows >= start) & (logits_rows < end)).nonzero()[:, 0]
                self._logits.append((one, mine))
        if self._logits:
            wanted = [*wanted, self._head]
        if wanted is not self._armed:
            for tap in self._armed:
                tap.disarm()
            for tap in wanted:
                tap.arm()
            self._armed = wanted

    def check_rows(self, rows: int, group: Group) -> None:
        if rows != self._rows:
            what = f"{group.parts[0]} was called with {rows} rows, the batch has {self._rows}"
            raise AdapterError(what, "which row is whose cannot be told there, so no adapter can be applied", MERGE)

    def adjust(self, group: Group, first: int, end: int, y: Tensor) -> None:
        """What DoRA and biases do to the stock result y [T, outs of parts first..end] before the products are added."""
        for extras, start, stop in self.extras:
            column = 0
            for part in range(first, end):
                extras.adjust(group.index, part, y[start:stop, column : column + group.outs[part]])
                column += group.outs[part]

    def _apply_embedding(self, ids: Tensor, y: Tensor) -> None:
        flat, rows = ids.reshape(-1), y.view(-1, y.shape[-1])
        for extras, start, end in self.extras:
            if extras.embedding is not None:
                extras.embedding.embed(flat[start:end], rows[start:end])

    def _apply_head(self, x: Tensor, y: Tensor) -> None:
        inputs, logits = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for extras, mine in self._logits:
            if extras.head is not None and len(mine):
                logits[mine] = extras.head.project(inputs[mine], logits[mine])


class _Whole:
    """Adds adapters to the product of a fused group."""

    def __init__(self, layers: Layers, group: Group, fused: FusedLinear) -> None:
        assert [name for name, _ in fused.parts] == group.parts and fused.widths == group.outs
        self.layers, self.group, self.linear = layers, group, fused.product

    def join(self, x: Tensor) -> Tensor | None:
        job, group, weight = self.layers.joined, self.group, self.linear.packed
        if job is None or not isinstance(weight, PanelWeight) or not job.adapts(group.index):
            return None
        self.layers.check_rows(x.numel() // x.shape[-1], group)
        return job.multiply(weight, self.linear.bias, group.index, x)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        layers, group = self.layers, self.group
        rows, flat = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        layers.check_rows(rows.shape[0], group)
        if layers.extras:
            layers.adjust(group, 0, len(group.parts), flat)
        for job in layers.jobs:
            if job.adapts(group.index):
                job.add(group.index, 0, len(group.parts), rows, flat, None)


class _Part:
    """Adds adapters to one linear of a group; the A product of all its parts is kept for the others."""

    def __init__(self, layers: Layers, group: Group, part: int, linear: nn.Linear) -> None:
        self.layers, self.group, self.part, self.linear = layers, group, part, linear

    def join(self, x: Tensor) -> Tensor | None:
        job, group, linear = self.layers.joined, self.group, self.linear
        if job is None or len(group.parts) > 1 or not isinstance(linear, PackedLinear) or not isinstance(linear.packed, PanelWeight):
            return None
        if not job.adapts(group.index):
            return None
        self.layers.check_rows(x.numel() // x.shape[-1], group)
        return job.multiply(linear.packed, linear.bias, group.index, x)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        layers, group, part = self.layers, self.group, self.part
        rows, flat = x.flatten(0, -2), y.view(-1, y.shape[-1])
        if group.x is not x:
            layers.check_rows(rows.shape[0], group)
            group.x, group.left, group.products = x, len(group.parts), [None] * len(layers.jobs)
        if layers.extras:
            layers.adjust(group, part, part + 1, flat)
        for index, job in enumerate(layers.jobs):
            if job.adapts(group.index, part):
                group.products[index] = job.add(group.index, part, part + 1, rows, flat, group.products[index])
        group.left -= 1
        if not group.left:
            group.forget()
