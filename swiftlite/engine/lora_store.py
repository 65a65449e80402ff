"""Adapters' weights on the device: what may be served, how it is packed, how much memory all of it may take.

One adapter's weights are a slot of a stack (lora_ops.py) at their true ranks plus what is not a product (lora_extras.py). They are
packed once, by the thread that asks, and nobody reads a slot before its weights are handed out. It does not know names or
requests; `lora.py` decides who stays and who goes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swiftlite.adapters.directory import Adapter, LoraWeights, check_finite, not_finite
from swiftlite.engine.aside import give_way
from swiftlite.engine.lora_extras import Extras, TokenTable, Unpacker, bias_of, dora_gain, embedding_scale, weight_of
from swiftlite.engine.lora_native import NativeLora
from swiftlite.engine.lora_ops import GroupShape, Stack
from swiftlite.engine.lora_taps import MERGE, Layers
from swiftlite.engine.transfer import put
from swiftlite.errors import AdapterError
from swiftlite.kernels.steps import DTYPES

CPU = torch.device("cpu")


@dataclass(eq=False)
class Weights:
    """One adapter's content on the device."""

    digest: str
    stack: Stack
    slot: int
    extras: Extras
    nbytes: int
    seated: int = 0  # requests that run with it
    used: int = 0  # when it last got a request, as a count
    since: int = 0  # when it came
    closing: bool = False  # takes no more requests: its room is needed


class WeightStore:
    """Packs adapters for one model. `tables_in_use`: the Triton kernels run, which know plain products only."""

    def __init__(self, layers: Layers, native: NativeLora | None) -> None:
        self.layers, self.native = layers, native
        self.device, self.dtype = layers.model.device, layers.model.dtype
        self.tables_in_use = False
        self.whole = self.device.type == "cuda"  # an adapter goes to the device in one copy
        self.stacks: dict[tuple[GroupShape, ...], list[Stack]] = {}
        self._lock = threading.Lock()

    def check(self, adapter: Adapter) -> None:
        """AdapterError, by name and with the way out, when the engine cannot serve it exactly. A header is enough."""
        path, layers, config = adapter.path, self.layers, adapter.config
        ends = (layers.embedding_name, layers.head_name)
        for module, weights in adapter.modules.items():
            if module in layers.linears:
                if weights.magnitude is not None and weights.bias is not None:
                    raise AdapterError(f"{path} has DoRA and LoRA bias in {module}", "the two cannot be served together", MERGE)
            elif module not in ends:
                raise AdapterError(f"{path} adapts {module}", "that module cannot be adapted while serving yet", MERGE)
            elif weights.magnitude is not None or weights.bias is not None:
                kind = "DoRA" if weights.magnitude is not None else "LoRA bias"
                raise AdapterError(f"{path} uses {kind} in {module}", "there it cannot be served beside the base yet", MERGE)
        for name in adapter.saved:
            module, _, parameter = name.rpartition(".")
            if not ((parameter == "weight" and module in ends) or (parameter == "bias" and module in layers.linears)):
                names = ", ".join(sorted(adapter.saved)[:3])
                raise AdapterError(f"{path} replaces whole tensors ({names})", f"{name} cannot be served beside the base", MERGE)
        for module in adapter.tokens:
            if module not in ends:
                raise AdapterError(f"{path} has trained tokens in {module}", "that is not the input embedding or the head", MERGE)
        if config.fan_in_fan_out and any(module in layers.linears for module in adapter.modules):
            raise AdapterError(f"{path} has fan_in_fan_out", "the base's linears are not stored that way", MERGE)
        special = bool(adapter.saved or adapter.tokens) or any(
            w.magnitude is not None or w.bias is not None or name in ends for name, w in adapter.modules.items()
        )
        if special and self.tables_in_use:
            kinds = "DoRA, biases, own embeddings or heads and trained tokens"
            raise AdapterError(f"{path} is more than a plain LoRA", f"{kinds} are not served by the GPU kernels yet", MERGE)

    def shape_of(self, adapter: Adapter) -> tuple[GroupShape, ...]:
        """Which ranks the adapter has where."""
        ranks = {module: weights.rank for module, weights in adapter.modules.items()}
        return tuple(GroupShape(g.width, tuple(g.outs), tuple(ranks.get(part, 0) for part in g.parts)) for g in self.layers.groups)

    def nbytes_of(self, adapter: Adapter) -> int:
        """How much device memory its products and tables will take; a header is enough."""
        layers = self.layers
        slot = sum(sum(s.ranks) * s.width + sum(r * o for r, o in zip(s.ranks, s.outs, strict=True)) for s in self.shape_of(adapter))
        own = [w.a.numel() + w.b.numel() for name, w in adapter.modules.items() if name not in layers.linears]
        vectors = 0  # numbers of gains and shifts, which are float32
        for name, weights in adapter.modules.items():
            if name in layers.linears:
                module = layers.linears[name][0]
                if weights.magnitude is not None:  # a gain, and a shift where the base has a bias
                    vectors += module.out_features * (1 + (bias_of(module) is not None))
                vectors += module.out_features * (weights.bias is not None)
        for name, tensor in adapter.saved.items():
            if name.endswith(".bias"):
                vectors += tensor.numel()
            else:
                own.append(tensor.numel())
        tables = [found for name in (layers.embedding_name, layers.head_name) if (found := self._tokens_of(adapter, name)) is not None]
        own += [rows.numel() for _, rows in tables]
        return (slot + sum(own)) * self.dtype.itemsize + vectors * 4 + sum(len(tokens) for tokens, _ in tables) * 8

    @torch.inference_mode()
    def store(self, adapter: Adapter) -> Weights:
        """Pack a read adapter, not looked through for NaN yet. AdapterError when it has some; nothing is kept then."""
        self.check(adapter)
        extras = self._extras(adapter)
        shape = self.shape_of(adapter)
        with self._lock:
            stacks = self.stacks.setdefault(shape, [])
            stack = next((s for s in stacks if s.free), None)
            if stack is None:
                stack = Stack(shape, self.dtype, self.device)
                stacks.append(stack)
            slot = stack.free.pop(0)
        weights = Weights("", stack, slot, extras, stack.slot_bytes + extras.nbytes)
        try:
            self._pack(adapter, weights)
            weights.digest = adapter.digest
        except BaseException:
            self.free(weights)
            raise
        return weights

    def free(self, weights: Weights) -> None:
        """Give a slot back; no step may use it any more."""
        with self._lock:
            stack = weights.stack
            stack.clear(weights.slot)
            if not stack.used:
                self.stacks[stack.groups].remove(stack)
                if not self.stacks[stack.groups]:
                    del self.stacks[stack.groups]

    @property
    def used_slots(self) -> int:
        return sum(stack.used for stacks in self.stacks.values() for stack in stacks)

    def _pack(self, adapter: Adapter, weights: Weights) -> None:
        """A as it is and scale * B transposed (with DoRA's gains), both rounded once, into the slot."""
        layers, stack, slot = self.layers, weights.stack, weights.slot
        placed = [(layers.linears[name][1:], w) for name, w in adapter.modules.items() if name in layers.linears]
        rest = [t for w in adapter.modules.values() for t in (w.magnitude, w.bias) if t is not None]
        if self.native is None or any(t.dtype not in DTYPES for _, w in placed for t in (w.a, w.b)):
            check_finite(adapter)
            filled, at = (Stack(stack.groups, self.dtype, CPU, slots=1), 0) if self.whole else (stack, slot)
            for place, w in placed:
                b = w.b.float() * w.scale
                gain = weights.extras.gains.get(place)
                filled.write(at, *place, w.a, b if gain is None else b * gain.to(b.device)[:, None])
            if filled is not stack:  # in the steps' stream, so behind those that ran with what was there before
                put(filled.rows[0], stack.rows[slot])
            return
        moves: list[tuple[Tensor, Tensor, float, Tensor | None]] = []
        turned: list[bool] = []
        for place, w in placed:
            a, b = stack.place(slot, *place)
            moves += [(a, w.a, 1.0, None), (b, w.b, w.scale, weights.extras.gains.get(place))]
            turned += [False, True]
        if self.native.pack(moves, turned) is not None or not all(bool(torch.isfinite(t).all()) for t in rest):
            raise not_finite(adapter)
        if adapter.saved or adapter.tokens or len(placed) < len(adapter.modules):
            check_finite(adapter)

    def _extras(self, adapter: Adapter) -> Extras:
        layers, extras = self.layers, Extras()
        unpacker = Unpacker()
        if any(weights.magnitude is not None for weights in adapter.modules.values()):
            give_way()  # it takes a second: running answers go first
        for name, (module, group, part) in layers.linears.items():
            weights = adapter.modules.get(name)
            if weights is None:
                continue
            if weights.magnitude is not None:
                gain = extras.gains[group, part] = dora_gain(name, module, weights, unpacker)
                bias = bias_of(module)
                if bias is not None:
                    extras.shifts[group, part] = (1 - gain) * bias.float()
            if weights.bias is not None:
                extras.shifts[group, part] = weights.scale * weights.bias.to(self.device).float()
        for name, tensor in adapter.saved.items():
            module_name, _, parameter = name.rpartition(".")
            if parameter == "bias":
                self._trained_bias(adapter, extras, module_name, tensor)
        self._check_bases(adapter)
        extras.embedding, extras.head = self._embedding_of(adapter), self._head_of(adapter)
        return extras

    def _trained_bias(self, adapter: Adapter, extras: Extras, name: str, bias: Tensor) -> None:
        module, group, part = self.layers.linears[name]
        old = bias_of(module)
        if old is None or old.shape != bias.shape:
            raise AdapterError(f"{adapter.path} has a bias for {name}", "the base has none there", MERGE)
        if (group, part) in extras.gains or (group, part) in extras.shifts:
            raise AdapterError(f"{adapter.path} trains the bias of {name}", "with DoRA or LoRA bias that cannot be served yet", MERGE)
        extras.shifts[group, part] = bias.to(self.device).float() - old.float()

    def _check_bases(self, adapter: Adapter) -> None:
        """PEFT saves the base's weights along with an adapted embedding; they must be those of this base."""
        ends = {self.layers.embedding_name: self.layers.model.get_input_embeddings(),
                self.layers.head_name: self.layers.model.get_output_embeddings()}  # fmt: skip
        for name, tensor in adapter.bases.items():
            module = ends.get(name.rpartition(".")[0])
            own = None
            if module is not None:
                own = module.weight if isinstance(module, nn.Embedding) else weight_of(name, module, Unpacker())
            if own is None or not torch.equal(tensor.to(own), own):
                raise AdapterError(
                    f"{adapter.path} was trained on another {name}", "its file brings the base's weight along, and it differs", MERGE
                )

    def _embedding_of(self, adapter: Adapter) -> TokenTable | None:
        name, module = self.layers.embedding_name, self.layers.model.get_input_embeddings()
        lora: LoraWeights | None = adapter.modules.get(name)
        tokens, saved = self._tokens_of(adapter, name), adapter.saved.get(name + ".weight")
        if lora is None and tokens is None and saved is None:
            return None
        table = TokenTable(scale=embedding_scale(name, module))
        if lora is not None:
            table.a, table.b = self._own(lora.a.T), self._own(lora.b.float().T * lora.scale)
        self._fill(table, tokens, saved)
        return table

    def _head_of(self, adapter: Adapter) -> TokenTable | None:
        name, module = self.layers.head_name, self.layers.model.get_output_embeddings()
        lora = adapter.modules.get(name)
        tokens, saved = self._tokens_of(adapter, name), adapter.saved.get(name + ".weight")
        if lora is None and tokens is None and saved is None:
            return None
        table = TokenTable(bias=module.bias)
        if lora is not None:
            table.a, table.b = self._own(lora.a), self._own(lora.b.float() * lora.scale)
        self._fill(table, tokens, saved)
        return table

    def _tokens_of(self, adapter: Adapter, name: str) -> tuple[tuple[int, ...], Tensor] | None:
        """The trained tokens of the embedding or the head."""
        found, tied = adapter.tokens.get(name), self.layers.model.config.get_text_config().tie_word_embeddings
        if found is None and tied and name == self.layers.head_name:  # PEFT lets a tied head follow the embedding's
            found = adapter.tokens.get(self.layers.embedding_name)
        return found

    def _fill(self, table: TokenTable, tokens: tuple[tuple[int, ...], Tensor] | None, saved: Tensor | None) -> None:
        if saved is not None:
            table.table = self._own(saved)
        if tokens is not None:
            order = torch.tensor(tokens[0]).argsort()
            table.tokens = torch.tensor(tokens[0])[order].to(self.device)
            table.rows = self._own(tokens[1][order])

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy in the model's dtype: the file's buffer is let go."""
        return torch.empty(tensor.shape, dtype=self.dtype, device=self.device).copy_(tensor)
