"""From the scheduler's choice to logits: loads the model, sizes the KV cache and turns scheduled sequences into one flat batch.

Rows are ordered so that each adapter's sequences are neighbours; logits come back in the scheduler's order whatever the row order.
This module does not know why something was scheduled and does not sample.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.bridge import NAME, Bridge, ForwardBatch
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.experts import pack_experts
from swiftlite.engine.int8 import choose_int8
from swiftlite.engine.kv import KVCache, available_memory
from swiftlite.engine.layers import fuse_layers
from swiftlite.engine.lora import LoraManager
from swiftlite.engine.panels import choose_pack
from swiftlite.engine.transfer import put_tokens, to_device
from swiftlite.errors import ModelError
from swiftlite.kernels.build import load_library
from swiftlite.kernels.steps import Kernels
from swiftlite.models.fused import fuse
from swiftlite.models.loading import load_model
from swiftlite.models.packed import can_pack, pack_linears, pack_tied_head, without_pages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swiftlite.engine.ahead import Ahead
    from swiftlite.engine.attention_cuda import DevicePages
    from swiftlite.engine.graphs import DecodeGraphs
    from swiftlite.engine.scheduler import Scheduled

WARM_ROWS = 64  # of a prefill that stands for all of them
CPU_SHARE = 0.25  # of the memory that is free after loading
ADAPTER_SHARE, ADAPTER_SHARE_CUDA = 0.1, 0.5  # on a GPU the cache has taken its part already


def _check_quantization(kind: str | None, device: torch.device, *, loaded: bool) -> None:
    if kind not in (None, "int8"):
        raise ModelError(f"quantization {kind!r} at load is not possible", "int8 is", "leave it out, or say int8")
    if kind and device.type != "cpu":
        why = "the int8 kernels are for CPUs; there are none for GPUs yet"
        raise ModelError(f"quantization {kind!r} is not possible on {device}", why, "leave it out, or add --device cpu")
    if kind and loaded:
        raise ModelError("a model that is loaded already cannot be quantized", "it may be in use elsewhere", "give its directory")


class Runner:
    """A loaded model with its KV cache. Raises ModelError on models that the engine cannot run or memory that cannot hold them."""

    def __init__(
        self, model_dir: str | Path, config: EngineConfig, dtype: torch.dtype, device: torch.device, *, plain: bool = False,
        model: PreTrainedModel | None = None, ahead: Ahead | None = None,
    ) -> None:  # fmt: skip
        """`plain` keeps the stock modules and torch's attention: the reference of every faster path. `model`: one that is loaded
        already; its weights stay where they are, as packed copies would go stale when they are trained. `ahead`: weights of the
        directory that are packed already."""
        self.config, self.dtype, self.device = config, dtype, device
        _check_quantization(config.quantization, device, loaded=model is not None)
        self.model = model or load_model(model_dir, dtype, device, NAME)
        packs = not plain and model is None and config.quantization is None and can_pack(dtype, device)
        ready = None if ahead is None else ahead.take
        if ready is not None and packs:
            pack_tied_head(self.model, choose_pack(load_library(), dtype, ready))  # so that the bridge's forward has no plain one to read
        with without_pages(self.model) if config.quantization or ready is not None else nullcontext():
            self.bridge = Bridge(self.model, device, config.max_model_len, kernels=not plain)
        if config.quantization:
            pack_tied_head(self.model, choose_int8(self.bridge.library))
            pack_linears(self.model, self.bridge.shared_inputs, choose_int8(self.bridge.library))
        elif packs:
            pack = choose_pack(self.bridge.library, dtype, ready)
            pack_linears(self.model, self.bridge.shared_inputs, pack)
            pack_tied_head(self.model, pack)
        # int8 is for linears: experts keep their dtype beside it
        self.packed_experts = pack_experts(self.model, self.bridge.library) if packs or config.quantization else 0  # blocks
        self.fused_layers = 0
        self.kernels: Kernels | None = None
        steps = None if self.bridge.library is None else load_library("steps")
        if steps is not None:
            fused = fuse(self.model, Kernels(steps))
            self.kernels, self.fused_layers = fused.kernels, fuse_layers(self.bridge, fused)
        self.max_model_len = self.bridge.max_model_len
        self.vocab_size: int = self.model.config.get_text_config().vocab_size
        self.num_blocks = self._size_cache()
        self.cache = self._cache()
        kept = config.adapter_host_memory
        if kept is None:
            kept = int(available_memory() * ADAPTER_SHARE) if device.type == "cuda" else 0
        memory, library = self._adapter_memory(), self.bridge.library
        self.lora = LoraManager(self.model, config.max_lora_rank, memory=memory, host_memory=kept, library=library)
        self._pages: Callable[..., DevicePages] | None = None
        self._decode: DecodeGraphs | None = None
        if device.type == "cuda" and not plain:
            self._start_kernels()

    def _start_kernels(self) -> None:
        """Triton's kernels where they work: they need a C compiler and CUDA's driver library too. Torch's attention otherwise."""
        if find_spec("triton") is None:  # it comes with torch's CUDA builds for Linux
            print("attention: plain torch (Triton is not installed, so there are no kernels: pip install triton)")
            return
        try:
            self.use_kernels(capture=not self.config.enforce_eager)
            self._warm_up()
        except (torch.AcceleratorError, torch.OutOfMemoryError, AssertionError):  # no other way would do better, or our own mistake
            raise
        except Exception as error:
            self._pages = self._decode = None
            self.lora.use_torch()
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"attention: plain torch, which is slower (Triton's kernels do not work here: {reason})")

    def _adapter_memory(self) -> int:
        """Bytes for adapters: as told, else a share of what model and cache left free."""
        if self.config.adapter_memory is not None:
            return self.config.adapter_memory
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0] * ADAPTER_SHARE_CUDA)
        return int(available_memory() * ADAPTER_SHARE)

    def use_kernels(self, capture: bool) -> None:
        """Run attention and adapters in Triton's kernels, decode steps in buffers of fixed shape, captured if `capture`.

        For a GPU; on a CPU this works in Triton's interpreter only. Nothing of Triton or CUDA is imported before this call.
        """
        from swiftlite.engine.attention_cuda import pages
        from swiftlite.engine.graphs import DecodeGraphs

        self._pages = pages
        self._decode = DecodeGraphs(
            self.bridge, self.cache, self.lora, self.config.max_num_seqs, self.max_model_len, self.vocab_size, capture=capture
        )

    def _warm_up(self) -> None:
        """Compile the kernels and capture the graphs of decode before the first request; nothing is stored."""
        assert self._pages is not None and self._decode is not None
        for rows, processors in itertools.product((1, min(WARM_ROWS, self.max_model_len)), (1, sys.maxsize)):
            batch = self._blank(rows)
            assert batch.pages is not None
            batch.pages.processors = processors  # of one, the context is read in one go; of any number, in splits where it is long enough
            self.bridge.forward(batch, self.cache)
        self._decode.capture_all()

    def warm_up_adapters(self) -> None:
        """The same for batches with adapters like those that are loaded: not during a step."""
        versions = self.lora.resident()
        if self._decode is None or not versions:
            return
        self._decode.capture_all(versions)
        batch = self._blank(min(WARM_ROWS, self.max_model_len))  # last: now all that any of them adapts is known
        self.lora.set_batch([(versions[0], len(batch.input_ids))])
        self.bridge.forward(batch, self.cache)

    def _blank(self, rows: int) -> ForwardBatch:
        """A sequence of the longest length, of whose end `rows` tokens are computed and not stored; what it reads is whatever is there."""
        assert self._pages is not None
        zeros = torch.zeros(rows, dtype=torch.int64, device=self.device)
        slices = [SequenceSlice(0, rows, self.max_model_len - rows, [0] * -(-self.max_model_len // self.config.block_size))]
        return ForwardBatch(zeros, zeros, zeros - 1, slices, zeros[:1], pages=self._pages(slices, rows, self.device))

    def _size_cache(self) -> int:
        """Blocks of the cache: as told, else what all sequences could use at most, within a share of the free memory."""
        config = self.config
        if config.num_blocks is not None:
            return config.num_blocks
        block_bytes = KVCache.bytes_per_block(self.bridge.layers, config.block_size, self.dtype)
        if config.kv_cache_memory is not None:
            blocks = config.kv_cache_memory // block_bytes
        else:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what loading, or a training around us, left with torch is free, but would count as taken
                free, total = torch.cuda.mem_get_info(self.device)
                budget = max(0, int(total * config.gpu_memory_utilization) - (total - free))
            else:
                budget = int(available_memory() * CPU_SHARE)
            per_sequence = -(-self.max_model_len // config.block_size)
            blocks = min(budget // block_bytes, per_sequence * config.max_num_seqs)
        if blocks < 2:
            raise ModelError(
                "There is no memory for the KV cache.", f"one block of {config.block_size} tokens takes {block_bytes} bytes",
                "free memory, or give kv_cache_memory",
            )  # fmt: skip
        return int(blocks)

    def _cache(self) -> KVCache:
        size = self.config.block_size
        try:
            return KVCache(self.bridge.layers, self.num_blocks, size, self.dtype, self.device)
        except (OSError, torch.OutOfMemoryError):  # the system's refusal, the GPU's
            taken = self.num_blocks * KVCache.bytes_per_block(self.bridge.layers, size, self.dtype)
            raise ModelError(
                "There is no memory for the KV cache.", f"{taken / 2**30:.1f} GiB ({self.num_blocks} blocks of {size} tokens) are refused",
                "give less kv_cache_memory, or leave it out",
            ) from None  # fmt: skip

    def build_batch(self, scheduled: list[Scheduled], drawn: Tensor | None = None) -> ForwardBatch:
        """Tensors of one step: rows grouped by adapter, logits rows in the order of `scheduled`; `drawn` as in `execute`."""
        groups: dict[int, list[int]] = {}  # by identity of the adapter version
        for index, item in enumerate(scheduled):
            groups.setdefault(id(item.seq.adapter), []).append(index)
        size = self.config.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        slices: list[SequenceSlice] = []
        adapters: list[tuple[object, int]] = []
        wanted: dict[int, range] = {}
        late: list[tuple[int, int]] = []  # rows whose token only the device knows, and its place in `drawn`
        for members in groups.values():
            first_row = len(ids)
            for index in members:
                item = scheduled[index]
                table, tokens, end = item.seq.block_table, item.seq.token_ids, item.start + item.count
                slices.append(SequenceSlice(len(ids), item.count, item.start, table))
                ids.extend(tokens[item.start : end])
                ids.extend(item.draft)
                positions.extend(range(item.start, end))
                if len(ids) < len(positions):
                    late.append((len(ids), item.seq.late))
                    ids.append(0)
                slots.extend(table[position // size] * size + position % size for position in range(item.start, end))
                wanted[index] = range(len(ids) - item.rows, len(ids))
            adapters.append((scheduled[members[0]].seq.adapter, len(ids) - first_row))
        rows = [row for index in range(len(scheduled)) for row in wanted[index]]
        pages = None if self._pages is None else self._pages(slices, len(ids), self.device)
        flat = [to_device(values, torch.int64, self.device) for values in (ids, positions, slots, rows)]
        if late:
            assert drawn is not None, "a token is on the device, but not given"
            put_tokens(flat[0], late, drawn)
        return ForwardBatch(flat[0], flat[1], flat[2], slices, flat[3], adapters, pages)

    def execute(self, scheduled: list[Scheduled], drawn: Tensor | None = None) -> Tensor:
        """Run one step. Returns logits [S, V]: for each item, in order, those of its last `rows` tokens.

        `drawn` [R] int64 are the tokens that the last step left on the device, where sequences have them (`Sequence.late`).
        """
        if self._decode is not None and self._decode.takes(scheduled):
            return self._decode.run(scheduled, drawn)
        batch = self.build_batch(scheduled, drawn)
        self.lora.set_batch(batch.adapters, logits_rows=batch.logits_index)
        return self.bridge.forward(batch, self.cache)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination): the copy of copy-on-write."""
        self.cache.copy_blocks(pairs)
