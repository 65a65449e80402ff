"""The Triton kernels against torch's reference. Run by test_triton.py in a process of its own, on a GPU or in the interpreter.

By hand: TRITON_INTERPRET=1 pytest tests/kernel_cases.py; without the variable, on the GPU.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from test_runner import Seq, prompts_for
from torch import Tensor

from swiftlite.engine import attention_cuda, lora_cuda, lora_ops, triton_attention, triton_lora
from swiftlite.engine.attention_cpu import SequenceSlice, paged_attention
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.graphs import DecodeGraphs, graph_sizes
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.engine.lora_ops import GroupShape, Segment, Stack, reference
from swiftlite.engine.request import SamplingParams
from swiftlite.engine.runner import Runner
from swiftlite.engine.scheduler import Scheduled

CPU = torch.device("cpu")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}


@dataclass
class Case:
    """Random queries, caches full of NaN but for the sequences' own tokens, and what attention must give."""

    layer: AttentionLayer
    slices: list[SequenceSlice]
    q: Tensor  # [T, H, Dk], transposed as transformers hands it over
    k: Tensor
    v: Tensor
    slots: Tensor
    cache: KVCache  # the context is stored
    wanted: Tensor  # [T, H, Dv]
    stored: KVCache  # as it must be afterwards


def make_case(layer: AttentionLayer, size: int, sequences: list[tuple[int, int]], dtype: torch.dtype, spare: int = 2) -> Case:
    """`sequences` are (queries, context); `spare` rows of no sequence come last."""
    generator = torch.Generator().manual_seed(len(sequences) + layer.head_dim)
    needs = [-(-(count + context) // size) for count, context in sequences]
    blocks = torch.randperm(sum(needs) + 3, generator=generator).tolist()
    caches = [KVCache([layer], len(blocks), size, dtype, device) for device in (CPU, DEVICE)]
    for cache in caches:
        cache.keys[0].fill_(float("nan")), cache.values[0].fill_(float("nan"))
    slices, slots, row = [], [], 0
    for (count, context), need in zip(sequences, needs, strict=True):
        table = [blocks.pop() for _ in range(need)]
        slices.append(SequenceSlice(row, count, context, table))
        where = [table[at // size] * size + at % size for at in range(context + count)]
        k = torch.randn(context, layer.kv_heads, layer.head_dim, generator=generator)
        v = torch.randn(context, layer.kv_heads, layer.value_dim, generator=generator)
        for cache in caches:
            old = torch.tensor(where[:context], dtype=torch.int64, device=cache.device)
            cache.store(0, k.to(cache.device, dtype), v.to(cache.device, dtype), old)
        slots += where[context:]
        row += count
    total = row + spare
    shapes = ((layer.heads, layer.head_dim), (layer.kv_heads, layer.head_dim), (layer.kv_heads, layer.value_dim))
    q, k, v = (torch.randn(heads, total, dim, generator=generator).to(dtype).transpose(0, 1) for heads, dim in shapes)
    where = torch.tensor(slots + [-1] * spare)
    caches[0].store(0, k, v, where)
    wanted = paged_attention(q.float(), caches[0].keys[0].float(), caches[0].values[0].float(), slices, layer)
    return Case(layer, slices, q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), where.to(DEVICE), caches[1], wanted, caches[0])


def check(case: Case, out: Tensor) -> None:
    dtype = case.q.dtype
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().float(), case.wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for got, wanted in ((case.cache.keys, case.stored.keys), (case.cache.values, case.stored.values)):
        torch.testing.assert_close(got[0].cpu(), wanted[0], rtol=0, atol=0, equal_nan=True)


def layer_of(heads: int, kv_heads: int, dk: int, dv: int, window: int | None = None, softcap: float | None = None) -> AttentionLayer:
    return AttentionLayer(0, "layer", heads, kv_heads, dk, dv, dk**-0.5, window, softcap)


MIXED = [(1, 5), (7, 0), (1, 0), (5, 9), (1, 40)]  # decode, a first chunk, a first token, a later chunk, decode
CASES = {
    "gqa": (layer_of(4, 2, 16, 16), 4, MIXED, FP32),
    "mha, head dim 12": (layer_of(4, 4, 12, 12), 4, MIXED, FP32),
    "mqa, 7 heads share": (layer_of(7, 1, 80, 80), 16, [(1, 100), (30, 3)], FP32),
    "20 heads share": (layer_of(20, 1, 16, 16), 4, [(1, 30), (6, 3)], FP32),
    "Dk 24, Dv 12": (layer_of(4, 2, 24, 12), 4, MIXED, FP32),
    "window": (layer_of(4, 2, 16, 16, window=8), 4, [(1, 70), (40, 30), (1, 3)], FP32),
    "window of one": (layer_of(2, 1, 16, 16, window=1), 4, [(1, 9), (6, 2)], FP32),
    "soft cap": (layer_of(4, 2, 16, 16, softcap=2.0), 4, MIXED, FP32),
    "window and soft cap, block of 5": (layer_of(6, 2, 20, 20, window=16, softcap=5.0), 5, MIXED, FP32),
    "several tiles of queries": (layer_of(4, 1, 16, 16), 16, [(70, 20)], FP32),
    "bfloat16": (layer_of(8, 2, 64, 64), 16, [(1, 150), (40, 20)], BF16),
    "float16": (layer_of(8, 2, 32, 32, window=50), 16, [(1, 150), (40, 20)], FP16),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_reference(name: str) -> None:
    case = make_case(*CASES[name])
    pages = attention_cuda.pages(case.slices, len(case.q), DEVICE)
    pages.processors = 1  # no splits
    check(case, pages.attend(case.q, case.k, case.v, case.slots, case.cache, case.layer))


@pytest.mark.parametrize("layer", [layer_of(4, 2, 16, 8), layer_of(4, 2, 16, 16, window=300, softcap=5.0)], ids=["plain", "window"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_split_contexts_equal_whole_ones(layer: AttentionLayer, dtype: torch.dtype) -> None:
    """Some splits stay empty: the second sequence is short. The chunk is split too."""
    case = make_case(layer, 16, [(1, 700), (1, 3), (9, 600)], dtype)
    pages = attention_cuda.pages(case.slices, len(case.q), DEVICE)
    pages.processors = 64
    cut = triton_attention.shape_for(layer, case.q.element_size(), 1)
    assert triton_attention.choose_splits(4, 700 if layer.window is None else 301, cut.tile, 64) > 1
    check(case, pages.attend(case.q, case.k, case.v, case.slots, case.cache, layer))


def test_blocks_before_the_window_are_not_read() -> None:
    case = make_case(layer_of(4, 2, 16, 16, window=8), 4, [(1, 70), (6, 30)], FP32)
    broken = case.slices[0].block_table[0]  # NaN there must not matter any more
    case.cache.keys[0][broken], case.cache.values[0][broken] = float("nan"), float("nan")
    tables = [[broken] * ((piece.context_len - 7) // 4) for piece in case.slices]
    slices = [
        SequenceSlice(piece.query_start, piece.query_len, piece.context_len, [*lost, *piece.block_table[len(lost) :]])
        for piece, lost in zip(case.slices, tables, strict=True)
    ]
    out = attention_cuda.pages(slices, len(case.q), DEVICE).attend(case.q, case.k, case.v, case.slots, case.cache, case.layer)
    torch.testing.assert_close(out.cpu(), case.wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processors", [1, 64])
def test_padded_decode_rows_are_zeros_and_store_nothing(processors: int) -> None:
    case = make_case(layer_of(4, 2, 16, 16), 4, [(1, 200), (1, 0), (1, 9)], FP32, spare=5)
    rows = len(case.q)
    contexts = torch.tensor([piece.context_len for piece in case.slices] + [-1] * 5, dtype=torch.int32, device=DEVICE)
    tables = torch.full((rows, 60), 10_000, dtype=torch.int32)  # entries of no block are never followed
    for row, piece in enumerate(case.slices):
        tables[row, : len(piece.block_table)] = torch.tensor(piece.block_table)
    starts = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    pages = attention_cuda.decode_pages(starts, contexts, tables.to(DEVICE), 240)
    pages.processors = processors
    out = pages.attend(case.q, case.k, case.v, case.slots, case.cache, case.layer)
    assert torch.equal(out[3:], torch.zeros_like(out[3:]))
    check(case, out)


# -- adapters ------------------------------------------------------------------------------------------------------------

GROUPS = [(48, (48, 24, 24)), (64, (160,)), (300, (48, 200))]  # input width, output widths; some of no round number
RANKS = [((4, 4, 4), (0,), (20, 3)), ((16, 0, 5), (7,), (0, 0))]


def make_stacks(dtype: torch.dtype, device: torch.device) -> list[Stack]:
    generator = torch.Generator().manual_seed(5)
    stacks = []
    for ranks in RANKS:
        shapes = tuple(GroupShape(width, outs, rank) for (width, outs), rank in zip(GROUPS, ranks, strict=True))
        stack = Stack(shapes, dtype, device, slots=8)
        stack.rows.copy_((torch.randn(stack.rows.shape, generator=generator) * 0.2).to(dtype))
        stacks.append(stack)
    return stacks


@pytest.mark.parametrize("dtype,kept", [(FP32, False), (FP32, True), (BF16, False), (FP16, False)])
def test_adapters_equal_the_reference(dtype: torch.dtype, kept: bool) -> None:
    """Ranks and targets differ, some rows have no adapter; part by part and all parts of a fused linear at once."""
    ours, theirs = make_stacks(dtype, DEVICE), make_stacks(FP32, CPU)
    tables = lora_cuda.AdapterTables(GROUPS, DEVICE)
    runs = [(0, 2, 3), (None, 0, 2), (1, 5, 1), (0, 0, 20), (1, 1, 4)]
    rows = sum(count for *_, count in runs)
    job = tables.static_job(rows) if kept else None
    if job is not None:
        tables.plan([(ours[1], 3, rows)], job)  # what was there before must not matter
    [job] = tables.plan([(None if stack is None else ours[stack], slot, count) for stack, slot, count in runs], job)
    segments: list[Segment] = [(None if stack is None else theirs[stack], slot, count) for stack, slot, count in runs]
    generator = torch.Generator().manual_seed(1)
    for group, (width, outs) in enumerate(GROUPS):
        assert job.adapts(group)
        x = (torch.randn(rows, width, generator=generator) * 0.2).to(dtype)
        y = torch.randn(rows, sum(outs), generator=generator).to(dtype)
        wanted, single, fused = y.float(), y.clone().to(DEVICE), y.clone().to(DEVICE)
        h = job.shrink(group, x.to(DEVICE))
        job.expand_all(group, h, fused)
        for part, (want, got) in enumerate(zip(wanted.split(outs, 1), single.split(outs, 1), strict=True)):
            reference(segments, group, part, x.float(), want)
            job.expand(group, part, h, got)
        for got in (single, fused):
            torch.testing.assert_close(got.cpu().float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            assert torch.equal(got[3:5].cpu(), y[3:5])  # rows without adapter are not touched


def test_shrink_in_splits_equals_one() -> None:
    [stack, _] = make_stacks(FP32, DEVICE)
    tables = lora_cuda.AdapterTables(GROUPS, DEVICE)
    [job] = tables.plan([(stack, 1, 5)])
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    one, four = (triton_lora.shrink(x, tables.tables, 2, job.tasks, job.rows, 32, splits, False) for splits in (1, 4))
    assert four.shape == (4, 5, 32)
    torch.testing.assert_close(four.sum(0)[:, :23], one[0, :, :23], rtol=1e-5, atol=1e-5)


def test_tables_grow_and_give_rows_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_cuda, "FIRST_CAPACITY", 2)
    tables = lora_cuda.AdapterTables(GROUPS, DEVICE)
    assert tables.plan([(None, 0, 4)]) == []
    stacks = make_stacks(FP32, DEVICE)
    [job] = tables.plan([(stacks[0], 0, 1)])
    assert not job.adapts(1) and tables.columns == 128
    before = tables.epoch
    tables.plan([(stacks[0], 3, 1)])
    assert tables.epoch == before  # nothing new
    tables.plan([(stacks[1], 0, 1)])
    assert tables.epoch > before and job.adapts(1)  # a group that nobody adapted before
    more = make_stacks(FP32, DEVICE)
    tables.plan([(more[0], 0, 1)])  # the third stack of two places
    assert len(tables.tables.stride) == 4
    for stack in (*stacks, more[0]):
        row = tables.row_of(stack)
        for group, matrix in enumerate(stack.a):
            assert tables.tables.a[row, group].item() == (0 if matrix is None else matrix.data_ptr())
            assert tables.tables.total[row, group].item() == sum(stack.groups[group].ranks)
    freed = tables.row_of(more[0])
    del more, stack, matrix
    gc.collect()
    assert tables.row_of(Stack(stacks[0].groups, FP32, DEVICE)) != freed or freed not in tables._free


# -- the model: decode in fixed buffers -----------------------------------------------------------------------------------


def test_graph_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(256) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert graph_sizes(4000)[-1] == 512


def make_runners(path: Path, **fields) -> tuple[Runner, Runner]:
    """The plain path on the CPU, and the kernels (on a GPU: with captured graphs)."""
    config = EngineConfig(num_blocks=80, block_size=4, max_num_seqs=6, max_model_len=64, **fields)
    kernels = Runner(path, config, FP32, DEVICE)
    if DEVICE.type == "cpu":
        kernels.use_kernels(capture=False)
    return Runner(path, config, FP32, CPU, plain=True), kernels


def decode_both(runners: tuple[Runner, Runner], prompts: list[list[int]], names: list[str | None], steps: int) -> list[int]:
    """Prefill and decode on both, the same tokens; logits must agree at every step. Returns the sizes of the decode steps."""
    batches = []
    for runner in runners:
        blocks = torch.randperm(runner.num_blocks, generator=torch.Generator().manual_seed(7)).tolist()
        adapters = [runner.lora.acquire(name) if name else None for name in names]
        needs = [-(-(len(prompt) + steps) // 4) for prompt in prompts]
        batches.append([Seq(list(p), [blocks.pop() for _ in range(n)], a) for p, n, a in zip(prompts, needs, adapters, strict=True)])
    graphs = runners[1]._decode
    assert isinstance(graphs, DecodeGraphs)
    sizes = []
    for step in range(steps):
        results = []
        for runner, seqs in zip(runners, batches, strict=True):
            live = seqs[: len(seqs) - step // 3]  # sequences end, so the batch shrinks
            items = [Scheduled(seq, seq.num_computed, len(seq.token_ids) - seq.num_computed, 1) for seq in live]
            if runner is runners[1] and step:
                assert graphs.takes(items)
                sizes.append(len(items))
            results.append(runner.execute(items).cpu().clone())
            if runner is runners[1] and step:  # padding stores nothing and attends to nothing
                assert (graphs._long[2, len(items) :] == -1).all() and (graphs._short[len(items) : graphs.sizes[-1]] == -1).all()
        torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
        tokens = results[0].argmax(-1).tolist()
        for seqs in batches:
            for seq, token in zip(seqs, tokens, strict=False):
                seq.num_computed = len(seq.token_ids)
                seq.token_ids.append(token)
    for runner, seqs in zip(runners, batches, strict=True):
        for seq in seqs:
            if seq.adapter is not None:
                runner.lora.release(seq.adapter)
    return sizes


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_decode_in_padded_buffers_equals_the_plain_path(family: str, make_model) -> None:
    runners = make_runners(make_model(family, num_hidden_layers=2))
    prompts = prompts_for(runners[0].vocab_size, [21, 5, 1, 18, 7])
    assert decode_both(runners, prompts, [None] * 5, steps=8) == [5, 5, 4, 4, 4, 3, 3]  # of sizes 1, 2, 4, 6
    for runner in runners:
        runner.lora.check()
    graphs = runners[1]._decode
    assert graphs is not None and sorted(graphs._graphs) == ([] if DEVICE.type == "cpu" else [(size, False) for size in (1, 2, 4, 6)])


@pytest.mark.parametrize("slots", [1, 8], ids=["as on a GPU", "as on a CPU"])
def test_decode_with_adapters_equals_the_plain_path(make_model, make_adapter, monkeypatch, slots: int) -> None:
    """Base and adapters of different ranks and targets in one padded batch, in changing mixtures; then the base alone again.

    Then other weights under a name that a captured step has run with (sglang #29157, #26930), and more adapters than the tables hold.
    """
    monkeypatch.setattr(lora_ops, "STACK_SLOTS", slots)
    monkeypatch.setattr(lora_cuda, "FIRST_CAPACITY", 4)
    base = make_model("qwen2", num_hidden_layers=2)
    runners = make_runners(base)
    paths = {"a": make_adapter(base, 1), "b": make_adapter(base, 2, rank=6, target_modules=["q_proj", "v_proj", "down_proj"])}
    for runner, (name, path) in itertools.product(runners, paths.items()):
        runner.lora.add(name, path)
    prompts = prompts_for(runners[0].vocab_size, [9, 3, 6])
    for names in (["a", None, "b"], ["b", "a", "a"], [None, None, None], [None, "b", None]):
        decode_both(runners, prompts, names, steps=2)
    runners[1].lora.add("c", make_adapter(base, 3, rank=20))  # wider than any before: captured steps are made again
    runners[0].lora.add("c", make_adapter(base, 3, rank=20))
    decode_both(runners, prompts, ["c", "a", None], steps=2)
    for seed, name in enumerate(("a", "b", "a", "d"), 4):
        path = make_adapter(base, seed)
        for runner in runners:
            runner.lora.add(name, path)
        decode_both(runners, prompts, [name, "c", name], steps=2)
    for runner in runners:
        runner.lora.check()
    graphs = runners[1]._decode
    assert graphs is not None and len(graphs.tables._free) + 4 >= len(graphs.tables.tables.stride)  # rows of the replaced came back
    for name, runner in itertools.product(("a", "b", "c", "d"), runners):
        runner.lora.remove(name)
    for runner in runners:
        runner.lora.check()
        assert runner.lora.store.stacks == {}


def test_steps_that_overlap_give_the_same_answers(make_model, make_adapter) -> None:
    """Tokens go from step to step on the device: through padded decode steps, mixed steps and adapters in changing rows; some stop."""
    base = make_model("llama", num_hidden_layers=1)
    adapters = {"a": str(make_adapter(base, 1))}
    prompts, names = prompts_for(300, [9, 3, 11, 1, 6]), [None, "a", "a", None, None]
    wishes = [{"temperature": 0}, {"seed": 3}, {"seed": 4, "top_k": 20, "top_p": 0.9}, {"temperature": 0, "n": 2}, {"temperature": 0}]
    params = [SamplingParams(max_tokens=6, ignore_eos=True, **wish) for wish in wishes]
    config = EngineConfig(num_blocks=24, block_size=4, max_num_seqs=3, max_model_len=32, max_num_batched_tokens=16, max_lora_rank=8)
    results = []
    for overlap in (False, True):
        with Engine(base, replace(config, overlap=overlap), dtype="float32", device=DEVICE, adapters=adapters) as engine:
            if DEVICE.type == "cpu":
                engine.runner.use_kernels(capture=False)
            graphs, late = engine.runner._decode, []
            assert graphs is not None and engine._loop._steps.overlap == overlap
            run = graphs.run

            def watch(scheduled, drawn=None, run=run, late=late):
                late += [item.seq.late >= 0 for item in scheduled]
                return run(scheduled, drawn)

            graphs.run = watch  # type: ignore[method-assign]
            results.append([answer.token_ids for output in engine.generate(prompts, params, names) for answer in output.outputs])
            engine.check()
            assert len(late) > 15 and any(late) == overlap
        params[0].stop_token_ids = results[0][0][2:3]
    wanted = results[0]
    wanted[0] = wanted[0][: wanted[0].index(wanted[0][2]) + 1]
    assert results[1] == wanted


class FakeCuda:
    """Stands in for what captures: remembers streams and modes; a graph's replay is its forward once more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[object] = []  # of each capture
        self.waiting: list[int] = []  # whether a forward may wait for the device
        self.mode, self.fails = 0, False
        self.graph: Any = None
        forward = DecodeGraphs._forward

        def forwards(graphs: DecodeGraphs, size: int) -> None:
            self.waiting.append(self.mode)
            if self.fails:
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.graph is not None:
                self.graph.replay = lambda: forward(graphs, size)
            forward(graphs, size)

        @contextmanager
        def graph(made: Any, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
            self.streams.append(stream)
            self.graph = made
            yield
            self.graph = None

        monkeypatch.setattr(DecodeGraphs, "_forward", forwards)
        names = ("Stream", "CUDAGraph", "current_stream", "stream", "set_stream")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", 2 if mode == "error" else mode))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with stand-ins for what captures")
def test_graphs_are_captured_before_requests(make_model, make_adapter, monkeypatch) -> None:
    """All in one stream, so that they share memory; with adapters too, whose ranks and targets may differ from the first one's."""
    fake = FakeCuda(monkeypatch)
    base = make_model("qwen2", num_hidden_layers=1)
    runners = make_runners(base)
    kernels = runners[1]
    kernels.use_kernels(capture=True)
    kernels._warm_up()
    graphs = kernels._decode
    assert graphs is not None and graphs.capture
    assert fake.waiting == [2, *[0] * 7] and fake.mode == 0  # the very first forward alone, and it was set back
    kernels.warm_up_adapters()
    assert len(fake.streams) == 4, "there are no adapters"
    for name, rank in (("a", 16), ("b", 32)):
        path = make_adapter(base, rank, rank=rank)
        for runner in runners:
            runner.lora.add(name, path)
        if name == "a":
            kernels.warm_up_adapters()
    assert len(fake.streams) == 8 and len({id(stream) for stream in fake.streams}) == 1
    epoch = graphs.tables.epoch
    decode_both(runners, prompts_for(runners[0].vocab_size, [9, 3, 6]), ["a", None, "b"], steps=6)
    assert len(fake.streams) == 8 and graphs.tables.epoch == epoch


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with stand-ins for what captures")
def test_what_waits_for_the_device_is_not_captured(make_model, monkeypatch, capsys) -> None:
    fake = FakeCuda(monkeypatch)
    _, runner = make_runners(make_model("llama", num_hidden_layers=1))
    runner.use_kernels(capture=True)
    fake.fails = True
    graphs = runner._decode
    assert graphs is not None and graphs._record(6, False) is None
    assert fake.streams == [] and fake.mode == 0 and not graphs.capture
    assert "CUDA graphs: off" in capsys.readouterr().out


def test_what_is_no_decode_step_is_not_taken(make_model) -> None:
    _, runner = make_runners(make_model("llama"))
    graphs = runner._decode
    assert graphs is not None
    one = Scheduled(Seq([3, 4], [1]), 1, 1, 1)
    assert graphs.takes([one] * 6) and not graphs.takes([one] * 7)
    assert not graphs.takes([one, Scheduled(Seq([3, 4, 5], [1]), 1, 2, 1)])  # a chunk
    assert not graphs.takes([Scheduled(Seq([3, 4], [1]), 0, 1, 0)])  # a chunk of one, without logits
