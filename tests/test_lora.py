"""Adapters in the engine: mixed batches against PEFT run alone, the life of versions, and the batched GEMMs against their reference."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.adapters.directory import read
from swiftlite.engine import lora_ops, lora_store, transfer
from swiftlite.engine.lora import LoraManager
from swiftlite.engine.lora_native import NativeLora
from swiftlite.errors import AdapterError, RequestError
from swiftlite.kernels.build import load_library
from swiftlite.models import segments

TOKENS = [[5, 9, 30, 42, 7, 11, 80], [31, 4, 4, 17], [12, 13, 14, 20, 15], [9, 8, 7, 6, 5, 4, 3, 25, 26]]


def load(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=segments.register()).eval()


@torch.inference_mode()
def logits(model, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Per sequence [T, V], all sequences end to end in one row, as the engine runs them."""
    lengths = tuple(len(s) for s in sequences)
    positions = torch.tensor([[i for n in lengths for i in range(n)]])
    ids = torch.tensor([[token for s in sequences for token in s]])
    return list(model(input_ids=ids, position_ids=positions, use_cache=False, swift_segments=lengths).logits[0].split(lengths))


def alone(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    """What PEFT says."""
    from peft import PeftModel

    model = load(base) if adapter is None else PeftModel.from_pretrained(load(base), adapter).eval()
    return logits(model, [tokens])[0]


def mixed(manager: LoraManager, model, names: list[str | None]) -> list[torch.Tensor]:
    """All of TOKENS in one batch, each sequence with its adapter; everything is released again."""
    versions = [manager.acquire(name) if name else None for name in names]
    manager.set_batch([(version, len(tokens)) for version, tokens in zip(versions, TOKENS, strict=True)])
    result = logits(model, TOKENS)
    for version in versions:
        if version is not None:
            manager.release(version)
    manager.set_batch([])
    return result


@pytest.mark.parametrize("alone_rows", [1, 128], ids=["alone", "together"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "phi3"])
def test_base_and_three_adapters_in_one_batch_equal_peft_alone(make_model, make_adapter, monkeypatch, family: str, alone_rows: int) -> None:
    monkeypatch.setattr(lora_ops, "ALONE_ROWS", alone_rows)
    base = make_model(family)
    some = ["o_proj", "down_proj"] if family == "phi3" else ["q_proj", "v_proj", "up_proj"]
    adapters = {
        "all": make_adapter(base, 1),
        "other": make_adapter(base, 2),
        "some": make_adapter(base, 3, rank=3, target_modules=some, use_rslora=True, rank_pattern={some[0]: 2}, alpha_pattern={some[1]: 5}),
    }
    model = load(base)
    manager = LoraManager(model)
    for name, path in adapters.items():
        manager.add(name, path)
    for names in (["all", None, "other", "some"], ["other", "all", "some", None], [None, "some", "all", "other"]):
        for tokens, name, got in zip(TOKENS, names, mixed(manager, model, names), strict=True):
            expected = alone(base, adapters[name] if name else None, tokens)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone(base, adapters["all"], TOKENS[0]), alone(base, None, TOKENS[0]), atol=0.1)  # adapters do something
    manager.check()


def test_rows_without_adapter_run_the_stock_modules(make_model, make_adapter) -> None:
    base = make_model("qwen2")
    model = load(base)
    before = logits(model, TOKENS)
    manager = LoraManager(model)
    manager.add("a", make_adapter(base, 1))
    version = manager.acquire("a")
    manager.set_batch([(version, sum(map(len, TOKENS)))])
    assert any("forward" in module.__dict__ for module in model.modules())
    assert not torch.equal(logits(model, TOKENS)[0], before[0])
    manager.set_batch([(None, sum(map(len, TOKENS)))])
    assert not any("forward" in module.__dict__ for module in model.modules())
    for got, expected in zip(logits(model, TOKENS), before, strict=True):
        assert torch.equal(got, expected)
    manager.release(version)


def test_batch_of_other_length_is_an_error_and_not_another_answer(make_model, make_adapter) -> None:
    base = make_model("qwen2")
    model = load(base)
    manager = LoraManager(model)
    version = manager.add("a", make_adapter(base, 1))
    manager.set_batch([(version, 3)])
    with pytest.raises(AdapterError, match="was called with 7 rows, the batch has 3"):
        logits(model, TOKENS[:1])


def test_reload_under_one_name_leaves_running_requests_alone(make_model, make_adapter) -> None:
    base = make_model("qwen2")
    first, second = make_adapter(base, 1), make_adapter(base, 2)
    model = load(base)
    manager = LoraManager(model)
    old = manager.add("a", first)
    running = manager.acquire("a")
    new = manager.add("a", second)
    assert running is old and new is not old and new.digest != old.digest
    assert manager.acquire("a") is new
    manager.set_batch([(running, len(TOKENS[0])), (new, len(TOKENS[1]))])
    got = logits(model, TOKENS[:2])
    torch.testing.assert_close(got[0], alone(base, first, TOKENS[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], alone(base, second, TOKENS[1]), rtol=1e-4, atol=1e-4)
    assert [(info.name, info.state, info.requests) for info in manager.infos()] == [("a", "ready", 1), ("a", "draining", 1)]
    manager.check(held=[running, new])
    manager.release(running)
    assert [info.state for info in manager.infos()] == ["ready"]
    manager.release(new)
    manager.check()


def test_remove_drains_then_frees(make_model, make_adapter) -> None:
    base = make_model("qwen2")
    model = load(base)
    manager = LoraManager(model)
    path = make_adapter(base, 1)
    manager.add("a", path)
    expected = alone(base, path, TOKENS[0])
    running = manager.acquire("a")
    manager.remove("a")
    with pytest.raises(RequestError, match="unknown adapter 'a'"):
        manager.acquire("a")
    with pytest.raises(RequestError, match="unknown adapter"):
        manager.remove("a")
    manager.set_batch([(running, len(TOKENS[0]))])
    torch.testing.assert_close(logits(model, TOKENS[:1])[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="1 references, 0 requests"):
        manager.check()
    manager.set_batch([])
    manager.release(running)
    assert manager.infos() == [] and manager.store.stacks == {}
    manager.check()


def test_equal_weights_are_one_version_and_other_weights_another(make_model, make_adapter, tmp_path) -> None:
    base = make_model("qwen2")
    path = make_adapter(base, 1)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    manager = LoraManager(load(base))
    first = manager.add("a", path)
    assert manager.add("a", path) is first  # again, the same
    assert manager.add("b", copy) is first  # two names for the same weights
    manager.remove("a")
    assert manager.acquire("b") is first
    manager.release(first)
    tensors = load_file(copy / "adapter_model.safetensors")
    key = sorted(tensors)[0]
    tensors[key][0, 0] += 1e-3
    save_file(tensors, copy / "adapter_model.safetensors")
    assert manager.add("b", copy).digest != first.digest  # same path, other weights
    manager.check()


def test_two_loads_of_one_name_at_once_leave_one_version(make_model, make_adapter) -> None:
    base = make_model("qwen2")
    paths = [make_adapter(base, seed) for seed in range(4)]
    manager = LoraManager(load(base))
    threads = [threading.Thread(target=manager.add, args=("a", path)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [info.name for info in manager.infos()] == ["a"]
    manager.check()


def test_failed_loads_change_nothing(make_model, make_adapter, tmp_path) -> None:
    base = make_model("qwen2")
    manager = LoraManager(load(base), max_rank=8)
    version = manager.add("a", make_adapter(base, 1))
    with pytest.raises(AdapterError, match="no such directory"):
        manager.add("a", tmp_path / "vanished")
    with pytest.raises(AdapterError, match=r"has rank 16\n.*at most 8"):
        manager.add("a", make_adapter(base, 2, rank=16))
    with pytest.raises(AdapterError, match=r"(?s)replaces whole tensors \(model.layers.0.*merge it: swift export"):
        manager.add("a", make_adapter(base, 2, modules_to_save=["norm"]))
    with pytest.raises(AdapterError, match=r"(?s)uses DoRA in model.embed_tokens.*merge it"):
        manager.add("a", make_adapter(base, 2, rank=8, use_dora=True, target_modules=["embed_tokens", "q_proj"]))
    other = make_model("qwen2", intermediate_size=96)
    with pytest.raises(AdapterError, match=r"(?s)mlp.*\[96, 48\] in the adapter and \[64, 48\] in the base|\[48, 96\]"):
        manager.add("a", make_adapter(other, 2))
    assert manager.acquire("a") is version
    manager.check(held=[version])


def test_vanished_directory_keeps_serving(make_model, make_adapter, tmp_path) -> None:
    base = make_model("qwen2")
    path = tmp_path / "adapter"
    shutil.copytree(make_adapter(base, 1), path)
    model = load(base)
    manager = LoraManager(model)
    manager.add("a", path)
    expected = alone(base, path, TOKENS[0])
    shutil.rmtree(path)
    torch.testing.assert_close(mixed(manager, model, ["a", None, None, None])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}], ids=["all", "dora", "some"])
def test_an_adapter_goes_to_a_gpu_in_one_copy(make_model, make_adapter, monkeypatch, kind: dict) -> None:
    """The same bytes as part by part, each of which would wait for the steps that run."""
    base = make_model("llama")
    model, path = load(base).to(torch.bfloat16), make_adapter(base, 1, **kind)
    copies: list[torch.Tensor] = []
    monkeypatch.setattr(lora_store, "put", lambda values, target: (copies.append(target), transfer.put(values, target)))
    rows = []
    for whole in (False, True):
        store = LoraManager(model).store
        store.whole = whole
        weights = store.store(read(path, LoraManager(model).layers.shapes, max_rank=64))
        rows.append(weights.stack.rows[weights.slot])
        assert len(copies) == whole
    assert torch.equal(rows[0], rows[1]) and rows[0].count_nonzero() > 1000
    assert copies[0].data_ptr() == rows[1].data_ptr()


def test_many_adapters_come_and_go_without_leaving_memory(make_model, make_adapter) -> None:
    base = make_model("qwen2")
    paths = [make_adapter(base, seed) for seed in range(lora_ops.STACK_SLOTS + 3)]
    model = load(base)
    manager = LoraManager(model)
    for i, path in enumerate(paths):
        manager.add(f"a{i}", path)
    assert [stack.used for stacks in manager.store.stacks.values() for stack in stacks] == [lora_ops.STACK_SLOTS, 3]
    got = mixed(manager, model, ["a1", "a9", "a6", "a10"])
    for tokens, index, result in zip(TOKENS, (1, 9, 6, 10), got, strict=True):
        torch.testing.assert_close(result, alone(base, paths[index], tokens), rtol=1e-4, atol=1e-4)
    for i in range(len(paths)):
        manager.remove(f"a{i}")
    assert manager.store.stacks == {}
    manager.check()


def test_removed_slot_gives_its_pages_back() -> None:
    shape = lora_ops.GroupShape(1024, (4096,), (64,))
    stack = lora_ops.Stack((shape,) * 8, torch.float32, torch.device("cpu"))  # 8 slots of 10 MiB

    def resident() -> int:
        return int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    empty = resident()
    for slot in (0, 1):
        stack.free.remove(slot)
        for group in range(8):
            stack.write(slot, group, 0, torch.ones(64, 1024), torch.ones(4096, 64))
    full = resident()
    assert full - empty > 1.8 * stack.slot_bytes
    stack.clear(0)
    assert full - resident() > 0.8 * stack.slot_bytes
    assert not stack.rows[0].any() and stack.b[0][0] is not None and bool((stack.b[0][0][1] == 1).all())


def kernels(shapes) -> NativeLora:
    library = load_library()
    if library is None:
        pytest.skip("no C++ compiler")
    return NativeLora(library, [(shape.width, shape.outs) for shape in shapes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "segments_",
    [
        [(0, 1), (1, 1), (2, 1)],  # decode, in slot order
        [(2, 1), (None, 3), (0, 1), (1, 1)],  # out of order, with base rows between
        [(0, 4), (1, 2), (3, 7)],  # padded, with a hole
        [(0, 2), (1, 90), (2, 1)],  # one long among short
        [(1, 200), (None, 2), (0, 1), (7, 1)],  # prefill with decode, far slots
        [(4, 2)],
        [(3, 1), (0, 1), (3, 1)],  # one adapter twice
        [(None, 5)],
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_jobs_equal_reference(segments_: list[tuple[int | None, int]], dtype: torch.dtype, way: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shapes = (
        lora_ops.GroupShape(32, (24, 8, 8), (4, 0, 3)),
        lora_ops.GroupShape(24, (16,), (5,)),
        lora_ops.GroupShape(8, (8,), (0,)),
        lora_ops.GroupShape(100, (300, 64), (37, 16)),
    )
    stack = lora_ops.Stack(shapes, dtype, torch.device("cpu"))
    stack.free = []
    for slot in range(lora_ops.STACK_SLOTS):
        for index, shape in enumerate(shapes):
            for part, (rank, out) in enumerate(zip(shape.ranks, shape.outs, strict=True)):
                if rank:
                    stack.write(slot, index, part, random(rank, shape.width), random(out, rank) / 8)
    rows: list[lora_ops.Segment] = [(None if slot is None else stack, slot or 0, count) for slot, count in segments_]
    total = sum(count for _, count in segments_)
    jobs = lora_ops.plan(rows, torch.device("cpu")) if way == "torch" else kernels(shapes).plan(rows)
    for index, shape in enumerate(shapes):
        x = random(total, shape.width) / shape.width**0.5
        start, parts = random(total, sum(shape.outs)), len(shape.outs)
        expected = start.clone()
        for part, y in enumerate(expected.split(shape.outs, 1)):
            lora_ops.reference(rows, index, part, x, y)
        whole, single = start.clone(), start.clone()
        for job in jobs:
            if job.adapts(index):
                job.add(index, 0, parts, x, whole, None)
                h = None
                for part, y in enumerate(single.split(shape.outs, 1)):
                    if job.adapts(index, part):
                        h = job.add(index, part, part + 1, x, y, h)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(whole, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(single, expected, rtol=tolerance, atol=tolerance)


def test_engine_gives_each_request_its_own_adapter(make_model, make_adapter) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from swiftlite.engine.engine import Engine
    from swiftlite.engine.request import SamplingParams

    base = make_model("qwen2")
    adapters = {name: make_adapter(base, seed) for seed, name in enumerate("abc", 1)}
    names = ["a", None, "b", "c", "a", None, "c"]
    prompts = [TOKENS[i % 4] for i in range(len(names))]
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)

    def expected(name: str | None, prompt: list[int]) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if name:
            model = PeftModel.from_pretrained(model, adapters[name])
        ids = model.eval().generate(torch.tensor([prompt]), max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None)
        return ids[0, len(prompt) :].tolist()

    with Engine(base, dtype="float32", adapters={name: str(path) for name, path in adapters.items()}) as engine:
        outputs = engine.generate(prompts, params, adapter=names)
        again = engine.generate(prompts, params, adapter=names)  # from the prefix cache of the right adapter
        engine.remove_adapter("a")
        engine.check()
        assert [info.name for info in engine.adapters()] == ["b", "c"]
    for name, prompt, output, repeated in zip(names, prompts, outputs, again, strict=True):
        assert output.outputs[0].token_ids == repeated.outputs[0].token_ids == expected(name, prompt)
