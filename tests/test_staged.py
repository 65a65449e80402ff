"""Layers in one call give bit for bit what their steps give one by one, whatever is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_runner import CPU, Item, Seq, prompts_for

from swiftlite.engine.attention_cpu import SequenceSlice
from swiftlite.engine.bridge import ForwardBatch
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.lora_native import NativeJob
from swiftlite.engine.panels import Panels
from swiftlite.engine.runner import Runner
from swiftlite.engine.staged import Linears, Stack
from swiftlite.kernels.build import load_library

library = load_library()
STAGED = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "glm4", "olmo2", "granite", "smollm3", "exaone4"]
pytestmark = pytest.mark.skipif(library is None or not Panels(library).size(1, 2), reason="needs a compiler and a CPU with AVX512-BF16")


def make(path: Path, quantization: str | None = None) -> Runner:
    return Runner(path, EngineConfig(num_blocks=200, block_size=4, quantization=quantization), torch.bfloat16, CPU)


def steps_of(runner: Runner, lengths: list[int], versions: list | None = None) -> list[torch.Tensor]:
    """Logits of a prefill of prompts, then of two steps of decoding together with a part of another prompt."""
    prompts = prompts_for(runner.vocab_size, [*lengths, 9])
    tables, first = [], 0
    for prompt in prompts:
        tables.append(list(range(first, first + 8 + len(prompt) // 4)))
        first += len(tables[-1])
    seqs = [
        Seq(prompt, table, version)
        for prompt, table, version in zip(prompts, tables, [*(versions or [None] * len(lengths)), None], strict=True)
    ]
    found = [runner.execute([Item(seq, 0, len(seq.token_ids)) for seq in seqs[:-1]]).clone()]
    for step in range(2):
        for seq in seqs[:-1]:
            seq.token_ids.append(5 + step)
        items = [Item(seq, len(seq.token_ids) - 1, 1) for seq in seqs[:-1]]
        found.append(runner.execute([*items, Item(seqs[-1], 4 * step, 4)]).clone())
    return found


def both_ways(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """In one call, step by step, and how many forwards were one call."""
    done: list[bool] = []
    forward = Stack.forward

    def counted(self: Stack, *args) -> torch.Tensor | None:
        out = forward(self, *args)
        done.append(out is not None)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "forward", counted)
        together = run()
        patch.setattr(Stack, "forward", lambda *_: None)
        apart = run()
    return together, apart, sum(done)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("family", STAGED)
def test_one_call_is_the_same_to_the_bit(
    family: str, quantization: str | None, threads: int, make_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    runner = make(make_model(family), quantization)
    if quantization and not all(linear.packed.many for linear in _linears(runner)):
        pytest.skip("needs AVX512-VBMI")
    try:
        torch.set_num_threads(threads)
        for lengths in ([1], [3, 2], [12, 5, 1], [70, 33, 9, 1, 1, 1]):
            together, apart, calls = both_ways(monkeypatch, lambda lengths=lengths: steps_of(runner, lengths))
            assert calls == 3 and runner.fused_layers == 3
            for left, right in zip(together, apart, strict=True):
                assert torch.equal(left, right)
    finally:
        torch.set_num_threads(before)


def _linears(runner: Runner) -> list:
    layer = runner.model.model.layers[0]
    return [layer.self_attn.o_proj, layer.mlp.down_proj]


def test_layers_of_two_kinds_of_rotation(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 has tables for each kind of layer: only neighbours of one kind are one call."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    runner = make(make_model("gemma3", num_hidden_layers=4, layer_types=kinds))
    together, apart, calls = both_ways(monkeypatch, lambda: steps_of(runner, [33, 5, 1]))
    assert runner.fused_layers == 4 and calls == 3 * 3
    for left, right in zip(together, apart, strict=True):
        assert torch.equal(left, right)


def test_int8_in_float32_goes_step_by_step(make_model) -> None:
    """Stages are bfloat16: a float32 model keeps its fused layers, whose steps are called one by one."""
    runner = Runner(make_model("qwen3"), EngineConfig(num_blocks=200, block_size=4, quantization="int8"), torch.float32, CPU)
    assert runner.fused_layers == len(runner.model.model.layers)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_adapters_are_stages_too(quantization: str | None, make_model, make_adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any mix of rows with and without, whichever linears an adapter has, as the batch changes."""
    path: Path = make_model("qwen3")
    runner = make(path, quantization)
    kinds: list[dict] = [
        {"rank": 4},
        {"rank": 3, "target_modules": ["q_proj", "v_proj"]},
        {"rank": 2, "target_modules": ["down_proj", "up_proj"]},
    ]
    for index, kind in enumerate(kinds):
        runner.lora.add(f"a{index}", make_adapter(path, index, **kind))
    one, two, three = (runner.lora.acquire(f"a{index}") for index in range(3))
    for versions in ([one, None, two], [None, None, None], [two], [three], [three, three, None, one], [None, two, three], [one]):
        lengths = [11, 6, 1, 2][: len(versions)]
        together, apart, calls = both_ways(monkeypatch, lambda lengths=lengths, versions=versions: steps_of(runner, lengths, versions))
        assert calls == 3
        for left, right in zip(together, apart, strict=True):
            assert torch.equal(left, right)
    with_adapter, without = steps_of(runner, [11], [one])[0], steps_of(runner, [11])[0]
    assert not torch.allclose(with_adapter, without, atol=1e-3)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_adapters_of_many_rows(quantization: str | None, make_model, make_adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts long enough for adapters to be a part of the base's products, where those can be; then decoding, where they are not."""
    path: Path = make_model("qwen3", hidden_size=64, head_dim=16, intermediate_size=96)
    runner = make(path, quantization)
    kinds: list[dict] = [
        {"rank": 17},
        {"rank": 3, "target_modules": ["q_proj", "v_proj"]},
        {"rank": 2, "target_modules": ["down_proj", "up_proj"]},
    ]
    for index, kind in enumerate(kinds):
        runner.lora.add(f"a{index}", make_adapter(path, index, **kind))
    one, two, three = (runner.lora.acquire(f"a{index}") for index in range(3))
    joined: list[bool] = []
    build = NativeJob.__init__

    def noted(self: NativeJob, *args) -> None:
        build(self, *args)
        joined.append(all(self.joined))

    monkeypatch.setattr(NativeJob, "__init__", noted)
    for versions in ([one, None, two], [two], [three, one], [None, three, three]):
        lengths = [70, 33, 41][: len(versions)]
        together, apart, calls = both_ways(monkeypatch, lambda lengths=lengths, versions=versions: steps_of(runner, lengths, versions))
        assert calls == 3
        for left, right in zip(together, apart, strict=True):
            assert torch.equal(left, right)
    assert set(joined) == ({True, False} if library.swift_adapted_ready() else {False})  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["phi3", "gemma3"])
def test_adapters_of_other_layers(family: str, make_model, make_adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One linear for q, k and v and one for gate and up, whose gate has its adapter's part; gates that are not SiLU."""
    path: Path = make_model(family, hidden_size=64, head_dim=None if family == "phi3" else 16, intermediate_size=96)
    runner = make(path)
    runner.lora.add("a", make_adapter(path, 0, rank=5))
    version = runner.lora.acquire("a")
    for lengths in ([70, 33, 41], [3, 1, 2]):
        versions = [version, None, version]
        together, apart, calls = both_ways(monkeypatch, lambda lengths=lengths, versions=versions: steps_of(runner, lengths, versions))
        assert calls == 3
        for left, right in zip(together, apart, strict=True):
            assert torch.equal(left, right)
        assert not torch.allclose(together[0][0], steps_of(runner, lengths)[0][0], atol=1e-3)


def test_what_is_no_stage_goes_step_by_step(make_model, make_adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA changes the base's product itself; the batch beside it is unharmed."""
    path: Path = make_model("qwen3")
    runner = make(path)
    runner.lora.add("dora", make_adapter(path, 0, rank=4, use_dora=True))
    version = runner.lora.acquire("dora")
    mixed, apart, calls = both_ways(monkeypatch, lambda: steps_of(runner, [7, 5], [version, None]))
    assert calls == 0 and all(torch.equal(left, right) for left, right in zip(mixed, apart, strict=True))
    alone, _, calls = both_ways(monkeypatch, lambda: steps_of(runner, [7, 5]))
    assert calls == 3
    torch.testing.assert_close(alone[0][1], mixed[0][1], rtol=0.05, atol=0.05)


def test_layers_between_that_are_no_stages(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours run together, the others step by step between them."""
    path = make_model("qwen3")
    wanted, of, seen = steps_of(make(path), [9, 4, 1]), Linears.of, []

    def some(*linears) -> Linears | None:
        seen.append(None)
        return None if len(seen) == 2 else of(*linears)

    monkeypatch.setattr(Linears, "of", some)
    runner = make(path)
    together, apart, calls = both_ways(monkeypatch, lambda: steps_of(runner, [9, 4, 1]))
    assert len(seen) == runner.fused_layers == 3 and calls == 3 * 2
    for left, right, whole in zip(together, apart, wanted, strict=True):
        assert torch.equal(left, right) and torch.equal(left, whole)


def test_rows_of_no_sequence(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill a batch up are nobody's: nothing is stored for them, and the others do not notice."""
    runner = make(make_model("qwen3"))
    ids, positions, index = torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor([0, 1, 2, 3, 0, 0]), torch.arange(4)
    slots = torch.tensor([0, 1, 2, 3, -1, -1])
    pieces = [SequenceSlice(0, 4, 0, [0])]

    def run() -> list[torch.Tensor]:
        some = runner.bridge.forward(ForwardBatch(ids, positions, slots, pieces, index), runner.cache)
        fewer = runner.bridge.forward(ForwardBatch(ids[:4], positions[:4], slots[:4], pieces, index), runner.cache)
        return [some, fewer]

    together, apart, calls = both_ways(monkeypatch, run)
    assert calls == 2
    for left, right in zip(together, apart, strict=True):
        assert torch.equal(left, right)
    assert torch.equal(together[0], together[1])
