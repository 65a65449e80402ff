"""Adapters of a running engine: loaded, looked up, counted and taken out again while requests run.

A *version* is content: an adapter's weights, immutable, known by their digest. A *name* points at a version. So a reload
under the same name makes a new version and flips the name; two names for the same weights share one version; a request pins
the version that it started with. A version is freed when no name and no request holds it.

The model's linears are taken over only while a batch has rows with adapters: a server that serves the base alone, or a step
that does, runs the stock modules. Directories are read and checked by the thread that asks; the step loop only ever sees
whole versions.

Which call from where: `add`, `remove`, `acquire`, `infos` from any thread; `set_batch` from the step loop only; `release`
from any thread. It does not know what a sequence is.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from swiftlite.adapters.directory import Adapter, read
from swiftlite.engine.lora_ops import GroupShape, Job, Segment, Stack, plan
from swiftlite.errors import AdapterError, RequestError

if TYPE_CHECKING:
    from swiftlite.engine.lora_cuda import AdapterTables, DeviceJob

# Linears that read the same input; each name is the last part of a module's name, below one parent.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MERGE = "merge it: swift export --ckpt_dir <adapter> --merge_lora true"


@dataclass(eq=False)
class AdapterVersion:
    """One adapter's weights in the engine. `name` is the name it was first loaded under; `digest` seeds the prefix cache."""

    name: str
    path: str
    digest: str
    rank: int
    stack: Stack
    slot: int
    nbytes: int
    names: int = 0  # names that point here
    requests: int = 0  # requests that hold it


@dataclass(frozen=True)
class AdapterInfo:
    """What the server may tell about an adapter. `state` is ready, or draining: removed, and waiting for its last request."""

    name: str
    path: str
    digest: str
    rank: int
    nbytes: int
    requests: int
    state: str


@dataclass
class _Group:
    """Linears that share an input; their A product is made once, at the first of them that is called."""

    index: int
    parts: list[str]
    width: int
    outs: list[int]
    x: Tensor | None = None
    products: list[Tensor | None] = field(default_factory=list)
    left: int = 0


class _Tap:
    """Stands in for one linear's `forward` while the batch has adapter rows: the linear's result plus the adapters'."""

    def __init__(self, manager: LoraManager, module: nn.Module, name: str, group: _Group, part: int) -> None:
        self.manager, self.module, self.name, self.group, self.part = manager, module, name, group, part
        self.stock: Callable[[Tensor], Tensor] | None = None
        self.replaced = False  # the module had a forward of its own on the instance

    def arm(self) -> None:
        self.replaced = "forward" in self.module.__dict__
        self.stock = self.module.forward
        self.module.forward = self  # type: ignore[assignment]

    def disarm(self) -> None:
        if self.replaced:
            self.module.forward = self.stock  # type: ignore[assignment]
        else:
            del self.module.forward
        self.stock = None

    def __call__(self, x: Tensor) -> Tensor:
        assert self.stock is not None
        y = self.stock(x)
        self.manager.apply(self, x, y)
        return y


class LoraManager:
    """All adapters of one model. Raises AdapterError on what cannot be loaded, RequestError on an unknown name."""

    def __init__(self, model: PreTrainedModel, max_rank: int = 512) -> None:
        self.max_rank = max_rank
        self._shapes, self._groups, self._taps = _survey(self, model)
        self._served = {part for group in self._groups for part in group.parts}
        self.device, self.dtype = model.device, model.dtype
        self._lock = threading.RLock()  # the registry and the counts
        self._loading = threading.Lock()  # one load at a time: of two loads of one name, the later call wins
        self._names: dict[str, AdapterVersion] = {}
        self._versions: dict[str, AdapterVersion] = {}  # by digest
        self._stacks: dict[tuple[GroupShape, ...], list[Stack]] = {}
        self._armed = False
        self._jobs: list[Job] | list[DeviceJob] = []
        self._tables: AdapterTables | None = None  # only with the Triton kernels
        self._rows = 0

    # -- life of an adapter ------------------------------------------------------------------------------------------

    def add(self, name: str, path: str | Path) -> AdapterVersion:
        """Read, check and register the adapter in `path` as `name`; at return new requests can use it.

        A name that is taken flips to the new weights (running requests keep the old); equal weights are loaded once.
        Nothing changes when it fails.
        """
        with self._loading:
            adapter = read(path, self._shapes, max_rank=self.max_rank)
            self._check_servable(adapter)
            with self._lock:
                version = self._versions.get(adapter.digest)
                if version is not None:
                    version.names += 1  # held while the name moves
            if version is None:
                version = self._store(name, adapter)
                version.names = 1
            with self._lock:
                self._versions[adapter.digest] = version
                old, self._names[name] = self._names.get(name), version
                if old is not None:
                    self._drop_name(old)
            return version

    def remove(self, name: str) -> None:
        """New requests no longer find `name`; its memory goes when its last request ends. RequestError when unknown."""
        with self._lock:
            self._drop_name(self._lookup(name))
            del self._names[name]

    def acquire(self, name: str) -> AdapterVersion:
        """The version that `name` means now, held for one request until `release`."""
        with self._lock:
            version = self._lookup(name)
            version.requests += 1
            return version

    def release(self, version: AdapterVersion) -> None:
        with self._lock:
            assert version.requests > 0, f"{version.name} released more often than acquired"
            version.requests -= 1
            self._free_unheld(version)

    def names(self) -> list[str]:
        with self._lock:
            return list(self._names)

    def infos(self) -> list[AdapterInfo]:
        """Served adapters by name, then the draining ones."""
        with self._lock:
            ready = [(name, version, "ready") for name, version in self._names.items()]
            draining = [(v.name, v, "draining") for v in self._versions.values() if not v.names]
            return [AdapterInfo(n, v.path, v.digest, v.rank, v.nbytes, v.requests, state) for n, v, state in ready + draining]

    def check(self, held: Iterable[AdapterVersion] = ()) -> None:
        """AssertionError when a count is wrong or memory leaked; `held` are the versions of running requests (none: idle)."""
        with self._lock:
            names = Counter(id(version) for version in self._names.values())
            requests = Counter(id(version) for version in held)
            for version in self._versions.values():
                assert version.names == names[id(version)], f"{version.name}: {version.names} names counted, {names[id(version)]} found"
                assert version.requests == requests[id(version)], (
                    f"adapter {version.name}: {version.requests} references, {requests[id(version)]} requests run"
                )
            used = sum(stack.used for stacks in self._stacks.values() for stack in stacks)
            assert used == len(self._versions), f"{used} adapter slots in use, {len(self._versions)} adapters"

    def _lookup(self, name: str) -> AdapterVersion:
        if name not in self._names:
            raise RequestError(f"unknown adapter {name!r}", fix="served: " + (", ".join(self._names) or "none"), param="model")
        return self._names[name]

    def _drop_name(self, version: AdapterVersion) -> None:
        version.names -= 1
        self._free_unheld(version)

    def _free_unheld(self, version: AdapterVersion) -> None:
        if version.names or version.requests:
            return
        del self._versions[version.digest]
        self._free_slot(version.stack, version.slot)

    def _free_slot(self, stack: Stack, slot: int) -> None:
        stack.clear(slot)
        if not stack.used:
            self._stacks[stack.groups].remove(stack)
            if not self._stacks[stack.groups]:
                del self._stacks[stack.groups]

    def _check_servable(self, adapter: Adapter) -> None:
        if adapter.saved:
            names = ", ".join(sorted(adapter.saved)[:3])
            raise AdapterError(f"{adapter.path} replaces whole tensors ({names})", "those cannot be served beside the base yet", MERGE)
        kinds = {"DoRA": adapter.config.use_dora, "LoRA bias": adapter.config.lora_bias}
        for kind, used in kinds.items():
            if used:
                raise AdapterError(f"{adapter.path} uses {kind}", "that cannot be served beside the base yet", MERGE)
        for module in adapter.modules:
            if module not in self._served:
                raise AdapterError(f"{adapter.path} adapts {module}", "that module cannot be adapted while serving yet", MERGE)

    @torch.inference_mode()
    def _store(self, name: str, adapter: Adapter) -> AdapterVersion:
        """Copy the weights into a free slot. Nobody reads the slot before its version is registered."""
        modules = adapter.modules
        shapes = tuple(
            GroupShape(g.width, tuple(g.outs), tuple(modules[p].rank if p in modules else 0 for p in g.parts)) for g in self._groups
        )
        with self._lock:
            stacks = self._stacks.setdefault(shapes, [])
            stack = next((s for s in stacks if s.free), None)
            if stack is None:
                stack = Stack(shapes, self.dtype, self.device)
                stacks.append(stack)
            slot = stack.free.pop(0)
        try:
            for group in self._groups:
                for part, module in enumerate(group.parts):
                    if module in modules:
                        weights = modules[module]  # the scale goes into B in fp32: one rounding to the model's dtype
                        stack.write(slot, group.index, part, weights.a, weights.b.float() * weights.scale)
        except BaseException:
            with self._lock:
                self._free_slot(stack, slot)
            raise
        return AdapterVersion(name, str(adapter.path), adapter.digest, adapter.max_rank, stack, slot, stack.slot_bytes)

    # -- one step ----------------------------------------------------------------------------------------------------

    def use_kernels(self) -> AdapterTables:
        """Apply adapters with the Triton kernels from now on (on a GPU; elsewhere only in Triton's interpreter)."""
        from swiftlite.engine.lora_cuda import AdapterTables

        self._tables = AdapterTables([(group.width, tuple(group.outs)) for group in self._groups], self.device)
        return self._tables

    def set_batch(self, segments: list[tuple[AdapterVersion | None, int]], kept: DeviceJob | None = None) -> None:
        """What the next forward's rows are: consecutive runs of rows, each with its adapter or None.

        `kept`, made by the kernels' `static_job`, is refilled: a captured step that was recorded with it now does these rows.
        """
        rows: list[Segment] = [(v.stack, v.slot, n) if v is not None else (None, 0, n) for v, n in segments]
        self._jobs = plan(rows, self.device) if self._tables is None else self._tables.plan(rows, kept)
        self._rows = sum(count for _, count in segments)
        for group in self._groups:
            group.x, group.products = None, []
        if bool(self._jobs) != self._armed:
            self._armed = not self._armed
            for tap in self._taps:
                tap.arm() if self._armed else tap.disarm()

    def apply(self, tap: _Tap, x: Tensor, y: Tensor) -> None:
        """Add the adapters' products for x [..., in] to a linear's fresh result y [..., out]."""
        group = tap.group
        if group.x is not x:
            rows = x.flatten(0, -2)  # [T, in]
            if rows.shape[0] != self._rows:
                what = f"{tap.name} was called with {rows.shape[0]} rows, the batch has {self._rows}"
                raise AdapterError(what, "which row is whose cannot be told there, so no adapter can be applied", MERGE)
            group.x, group.left = x, len(group.parts)
            group.products = [job.shrink(group.index, rows) if job.adapts(group.index) else None for job in self._jobs]
        flat = y.view(-1, y.shape[-1])  # [T, out]
        for job, h in zip(self._jobs, group.products, strict=True):
            if h is not None and job.adapts(group.index, tap.part):
                job.expand(group.index, tap.part, h, flat)
        group.left -= 1
        if not group.left:
            group.x, group.products = None, []


def _survey(manager: LoraManager, model: PreTrainedModel) -> tuple[dict[str, tuple[int, int]], list[_Group], list[_Tap]]:
    """(shape of every linear and embedding, groups of linears, one tap per linear). The output head is not served."""
    shapes: dict[str, tuple[int, int]] = {}
    linears: dict[str, nn.Linear] = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
            # The head sees other rows than the layers do: only those whose logits are wanted.
            if module is not head:
                linears[name] = module
        elif isinstance(module, (nn.Embedding, Conv1D)):
            shapes[name] = (module.weight.shape[0], module.weight.shape[1])
    groups: list[_Group] = []
    placed: dict[str, tuple[_Group, int]] = {}
    for name, module in linears.items():
        if name in placed:
            continue
        parent, _, leaf = name.rpartition(".")
        family = next((f for f in SHARED_INPUT if leaf in f), (leaf,))
        parts = [p for p in (f"{parent}.{sibling}" if parent else sibling for sibling in family) if p in linears]
        parts = [p for p in parts if linears[p].in_features == module.in_features]
        group = _Group(len(groups), parts, module.in_features, [linears[p].out_features for p in parts])
        groups.append(group)
        placed |= {part: (group, i) for i, part in enumerate(parts)}
    taps = [_Tap(manager, module, name, *placed[name]) for name, module in linears.items()]
    return shapes, groups, taps
