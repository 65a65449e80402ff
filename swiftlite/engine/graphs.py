"""Decode steps in buffers of fixed shape, captured as CUDA graphs by batch size.

A step with one new token for every sequence is padded to the next size that there is a graph for. Its inputs are written into
pinned memory, copied in two transfers into tensors that never move, and the size's graph is replayed. Tokens that the last step
left on the device are put among the ids there. Padded rows store nothing (slot -1), attend to nothing (context -1) and their logits
are dropped. Batches with adapters have graphs of their own, whose adapter rows come from a table too; those are captured once the
adapters of the start are loaded, else at first use, and again when the adapter tables change their shape.

Invariants: nothing between the copies and the logits waits for the GPU; the buffers are only written when their last transfer is
done; all graphs share one memory pool, one stream of capture (memory is shared within a stream, and the libraries' workspaces are a
stream's) and one output, so a step's logits are valid until the next step.
Without capture the same padded forward runs as it is: that is what tests on a CPU compare. It does not sample or schedule.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.engine.attention_cuda import decode_pages
from swiftlite.engine.bridge import Bridge, ForwardBatch
from swiftlite.engine.kv import KVCache
from swiftlite.engine.lora import AdapterVersion, LoraManager
from swiftlite.engine.lora_cuda import DeviceJob
from swiftlite.engine.transfer import put_tokens

if TYPE_CHECKING:
    from swiftlite.engine.scheduler import Scheduled

LARGEST = 512  # sequences; a larger batch runs eagerly


def graph_sizes(most: int) -> list[int]:
    """Batch sizes with a graph, ascending, ending with the most sequences that run at once (or LARGEST)."""
    steps = ((1, 2, 4), range(8, 32, 8), range(32, 64, 16), range(64, 128, 32), range(128, LARGEST + 1, 64))
    most = min(most, LARGEST)
    return [size for part in steps for size in part if size < most] + [most]


@contextmanager
def _no_waiting() -> Iterator[None]:
    """RuntimeError where torch would wait for the device, in any thread of the process: before requests run only."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    epoch: int  # of the adapter tables at capture


class DecodeGraphs:
    """The decode steps of one model. `capture` False: the same steps, run eagerly."""

    def __init__(
        self, bridge: Bridge, cache: KVCache, lora: LoraManager, most: int, max_model_len: int, vocab: int, *, capture: bool
    ) -> None:
        """`most` sequences run at once; logits have `vocab` columns."""
        self.bridge, self.cache, self.lora, self.capture = bridge, cache, lora, capture
        self.sizes = graph_sizes(most)
        self.tables = lora.use_kernels()
        device, most, width = cache.device, self.sizes[-1], -(-max_model_len // cache.block_size)
        pinned = device.type == "cuda"
        self._host_long = torch.zeros(4, most, dtype=torch.int64, pin_memory=pinned)  # ids, positions, slots, rows of the logits
        self._host_short = torch.zeros(most * (1 + width), dtype=torch.int32, pin_memory=pinned)  # contexts, then tables [n, w] dense
        self._long, self._short = (torch.zeros_like(host, device=device) for host in (self._host_long, self._host_short))
        self._block_tables = torch.zeros(most, width, dtype=torch.int32, device=device)
        self._rows = torch.arange(most, dtype=torch.int32, device=device)
        self._logits = torch.empty(most, vocab, dtype=cache.dtype, device=device)
        self._copied = torch.cuda.Event() if pinned else None
        self._max_model_len = max_model_len
        self._batches = {size: self._batch(size) for size in self.sizes}
        self._jobs: dict[int, DeviceJob] = {}
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(device) if capture else None  # memory of a pool is only shared within a stream

    def _batch(self, size: int) -> ForwardBatch:
        ids, positions, slots, index = (row[:size] for row in self._long)
        pages = decode_pages(self._rows[:size], self._short[:size], self._block_tables[:size], self._max_model_len)
        return ForwardBatch(ids, positions, slots, [], index, pages=pages)

    def takes(self, scheduled: list[Scheduled]) -> bool:
        """Whether this step is one that `run` can do: one new token for each sequence, all with logits."""
        return len(scheduled) <= self.sizes[-1] and all(item.count == 1 and item.rows == 1 for item in scheduled)

    def run(self, scheduled: list[Scheduled], drawn: Tensor | None = None) -> Tensor:
        """One decode step: logits [S, V], a row per item in order, valid until the next step. `drawn` as in `Runner.execute`."""
        count = len(scheduled)
        size = next(size for size in self.sizes if size >= count)
        segments = self._fill(scheduled, size, drawn)
        adapted = any(version is not None for version, _ in segments)
        self.lora.set_batch(segments, self._job(size) if adapted else None)
        graph = self._graphs.get((size, adapted))
        if self.capture and (graph is None or (adapted and graph.epoch != self.tables.epoch)):
            graph = self._record(size, adapted)
        if graph is None:
            self._forward(size)
        else:
            graph.graph.replay()
        return self._logits[:count]

    def _fill(self, scheduled: list[Scheduled], size: int, drawn: Tensor | None) -> list[tuple[AdapterVersion | None, int]]:
        """Write and copy the step's inputs, rows grouped by adapter; returns the runs of rows by adapter, padding included."""
        if self._copied is not None:
            self._copied.synchronize()
        groups: dict[int, list[int]] = {}  # by identity of the adapter version
        for index, item in enumerate(scheduled):
            groups.setdefault(id(item.seq.adapter), []).append(index)
        count, block = len(scheduled), self.cache.block_size
        width = max(len(item.seq.block_table) for item in scheduled)
        most = self.sizes[-1]
        ids, positions, slots, rows = self._host_long.numpy()
        contexts, flat = self._host_short.numpy()[:most], self._host_short.numpy()[most : most + count * width]
        tables = flat.reshape(count, width)
        late: list[tuple[int, int]] = []  # rows whose token only the device knows, and its place in `drawn`
        row = 0
        for members in groups.values():
            for index in members:
                item = scheduled[index]
                at, table, tokens = item.start, item.seq.block_table, item.seq.token_ids
                if at < len(tokens):
                    ids[row] = tokens[at]
                else:
                    late.append((row, item.seq.late))
                positions[row], contexts[row], rows[index] = at, at, row
                slots[row] = table[at // block] * block + at % block
                tables[row, : len(table)] = table
                row += 1
        ids[count:], positions[count:], slots[count:], contexts[count:] = 0, 0, -1, -1
        rows[count:size] = range(count, size)
        self._long.copy_(self._host_long, non_blocking=True)
        used = most + count * width
        self._short[:used].copy_(self._host_short[:used], non_blocking=True)
        self._block_tables[:count, :width] = self._short[most:used].view(count, width)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.cache.device))
        if late:
            assert drawn is not None, "a token is on the device, but not given"
            put_tokens(self._long[0], late, drawn)
        segments: list[tuple[AdapterVersion | None, int]] = [
            (scheduled[members[0]].seq.adapter, len(members)) for members in groups.values()
        ]
        return [*segments, (None, size - count)] if size > count else segments

    def _job(self, size: int) -> DeviceJob:
        if size not in self._jobs:
            self._jobs[size] = self.tables.static_job(size)
        return self._jobs[size]

    def _forward(self, size: int) -> None:
        self._logits[:size].copy_(self.bridge.forward(self._batches[size], self.cache))

    # -- capture: the only part that no CPU can run ------------------------------------------------------------------

    def capture_all(self, adapters: Sequence[AdapterVersion] = ()) -> None:
        """Capture the graphs of batches without adapters, or those of batches with these and their like: not during a step.

        The largest first, so that the others fit into its memory. Without capture one step compiles the kernels.
        """
        started = time.monotonic()
        for version in adapters:
            assert version.weights is not None
            self.tables.row_of(version.weights.stack)  # what they adapt, and how wide they are
        self._host_long[2].fill_(-1)
        self._host_short.fill_(-1)  # only padding: nothing is stored, no key is read
        self._long.copy_(self._host_long)
        self._long[3] = torch.arange(self.sizes[-1], device=self._long.device)
        self._short.copy_(self._host_short)
        adapted, done = bool(adapters), 0
        for size in reversed(self.sizes):
            self.lora.set_batch([(None, size)], self._job(size) if adapted else None)
            if not self.capture:
                self._forward(size)
                break
            done += self._record(size, adapted) is not None
        if self.capture:
            kind = "decode sizes with adapters" if adapted else "decode sizes"
            print(f"CUDA graphs: {done} {kind} captured in {time.monotonic() - started:.1f} s")

    def _record(self, size: int, adapted: bool) -> _Graph | None:
        """Capture one size with what the buffers hold now. A model that cannot be captured runs eagerly from here on: None.

        The run before compiles kernels and fills the libraries' workspaces; it stores the same K and V that the replay stores. The first
        one may not wait for the device: what does cannot be captured, and a capture that fails leaves torch's allocators in its state.
        """
        stream, current = self._stream, torch.cuda.current_stream(self.cache.device)
        assert stream is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode():
                stream.wait_stream(current)
                with torch.cuda.stream(stream), nullcontext() if self._graphs else _no_waiting():
                    self._forward(size)
                current.wait_stream(stream)
                # thread_local: other threads may load adapters meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    self._forward(size)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
            print(f"CUDA graphs: off for this model, decode runs eagerly ({type(error).__name__}: {str(error).splitlines()[0]})")
            self.capture = False
            self._graphs.clear()
            return None
        self._graphs[size, adapted] = _Graph(graph, self.tables.epoch)
        return self._graphs[size, adapted]
