"""Packed and fused linears equal the stock ones; shared weights are left alone; adapters see nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from test_runner import CPU, Item, Seq, make_runner, prompts_for
from torch import nn
from torch.nn import functional as F

from swiftlite.engine import lora_taps
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.lora_native import NativeJob
from swiftlite.engine.panels import PanelWeight
from swiftlite.engine.runner import Runner
from swiftlite.engine.staged import Stack
from swiftlite.models.packed import FusedPart, PackedLinear, can_pack, pack_linears, pack_tied_head


class Net(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(24, width, bias=bias or width == 8) for width in (16, 8, 40))
        self.down = nn.Linear(64, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.cat([self.a(x), self.b(x), self.c(x)], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [[], [["a", "b", "c"]], [["a", "c"]]])
def test_packed_equals_plain(groups: list[list[str]], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = Net().to(dtype).eval()
    inputs = [torch.randn(1, rows, 24, dtype=dtype) for rows in (1, 7, 40)]
    with torch.inference_mode():
        wanted = [net(x) for x in inputs]
        assert pack_linears(net, groups) == 4
        assert isinstance(net.down, PackedLinear) and isinstance(net.a, FusedPart if groups else PackedLinear)
        assert isinstance(net.a, nn.Linear) and (net.a.in_features, net.a.out_features) == (24, 16)
        assert not list(net.parameters())  # the plain weights are gone
        for x, y in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(net(x), y, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))
            torch.testing.assert_close(net(x), net(x.clone()), rtol=0, atol=0)


def test_parts_may_be_called_in_any_order() -> None:
    torch.manual_seed(0)
    net, plain = Net().eval(), Net().eval()
    net.load_state_dict(plain.state_dict())
    pack_linears(net, [["a", "b", "c"]])
    x, other = torch.randn(3, 24), torch.randn(3, 24)
    with torch.inference_mode():
        for name, value in (("c", x), ("a", x), ("a", other), ("b", x), ("c", other), ("a", x)):
            torch.testing.assert_close(net.get_submodule(name)(value), plain.get_submodule(name)(value))


def test_shared_hooked_and_quantized_stay_plain() -> None:
    net = Net().eval()
    net.a.weight = net.b.weight = nn.Parameter(torch.randn(16, 24))
    net.c.register_forward_hook(lambda *args: None)
    net.down.forward = net.down.forward  # type: ignore[method-assign]  # as quantizers do
    assert pack_linears(net, [["a", "b", "c"]]) == 0


def test_only_where_it_is_understood() -> None:
    assert can_pack(torch.float32, CPU)
    assert not can_pack(torch.float16, CPU) and not can_pack(torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_equals_the_plain_one(family: str, make_model) -> None:
    path = make_model(family)
    packed, plain = make_runner(path), Runner(path, EngineConfig(num_blocks=160, block_size=4), torch.float32, CPU, plain=True)
    fused = [m for m in packed.model.modules() if isinstance(m, FusedPart)]
    assert len(fused) >= (0 if family in ("phi3", "glm4") else 3 * 5) and not any(
        isinstance(m, PackedLinear) for m in plain.model.modules()
    )
    first, second = prompts_for(packed.vocab_size, [20, 9])
    items = [Item(Seq(first, list(range(5))), 0, 20), Item(Seq(second, list(range(5, 8))), 0, 9)]
    torch.testing.assert_close(packed.execute(items), plain.execute(items), rtol=2e-4, atol=2e-4)
    assert packed.execute([Item(Seq(first, list(range(5))), 0, 8)]).shape == (0, packed.vocab_size)


def test_a_tied_head_multiplies_by_a_copy(make_model) -> None:
    """Head and embedding stay one tensor, whose rows are still those of the file after its pages were given back."""
    path = make_model("qwen2")
    packed, plain = make_runner(path), Runner(path, EngineConfig(num_blocks=160, block_size=4), torch.float32, CPU, plain=True)
    head, embedding = packed.model.lm_head, packed.model.model.embed_tokens
    assert head.weight is embedding.weight and "forward" in vars(head)
    torch.testing.assert_close(embedding.weight, plain.model.lm_head.weight, rtol=0, atol=0)
    x = torch.randn(1, 3, head.in_features)
    with torch.inference_mode():
        torch.testing.assert_close(head(x), F.linear(x, embedding.weight))


def test_only_a_tied_head_is_packed(make_model) -> None:
    assert not pack_tied_head(Runner(make_model("llama"), EngineConfig(num_blocks=8), torch.float32, CPU, plain=True).model)


def test_adapters_work_on_packed_linears(make_model, make_adapter) -> None:
    path: Path = make_model("llama")
    adapter = make_adapter(path, 1)
    packed, plain = make_runner(path), Runner(path, EngineConfig(num_blocks=160, block_size=4), torch.float32, CPU, plain=True)
    prompts = prompts_for(packed.vocab_size, [12, 5])
    results = []
    for runner in (packed, plain):
        runner.lora.add("one", adapter)
        version = runner.lora.acquire("one")
        seqs = [Seq(prompts[0], [1, 2, 3], version), Seq(prompts[1], [4, 5]), Seq(prompts[1], [6, 7], version)]
        results.append(runner.execute([Item(seq, 0, len(seq.token_ids)) for seq in seqs]))
    torch.testing.assert_close(results[0], results[1], rtol=2e-4, atol=2e-4)
    assert (results[0][1] - results[0][2]).abs().max() > 0.1


def test_adapters_join_the_product(make_model, make_adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for the base's product and the adapters' gives bit for bit what two calls give, for any mix of rows."""
    path: Path = make_model("qwen3")
    monkeypatch.setattr(Stack, "forward", lambda *_: None)  # layer by layer, linear by linear
    runner = Runner(path, EngineConfig(num_blocks=160, block_size=4), torch.bfloat16, CPU)
    if not any(isinstance(m, PackedLinear) and isinstance(m.packed, PanelWeight) for m in runner.model.modules()):
        pytest.skip("needs a CPU with AVX512-BF16")
    for index, rank in enumerate((4, 3)):
        runner.lora.add(f"a{index}", make_adapter(path, index, rank=rank))
    one, two = runner.lora.acquire("a0"), runner.lora.acquire("a1")
    prompts = prompts_for(runner.vocab_size, [12, 5, 1])
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)]
    batches = ([one, None, two, None], [one], [None, two], [one, one])

    def run() -> list[torch.Tensor]:
        found = []
        for batch in batches:
            seqs = [Seq(prompts[i % 3], tables[i], version) for i, version in enumerate(batch)]
            for _ in range(2):  # the second time the plan is the last one's
                found.append(runner.execute([Item(seq, 0, len(seq.token_ids)) for seq in seqs]).clone())
        return found

    calls = []
    multiply = NativeJob.multiply
    monkeypatch.setattr(NativeJob, "multiply", lambda self, *args: calls.append(1) or multiply(self, *args))
    together = run()
    assert calls
    calls.clear()
    monkeypatch.setattr(lora_taps, "PanelWeight", int)  # nothing is one
    apart = run()
    assert not calls
    for left, right in zip(together, apart, strict=True):
        assert torch.equal(left, right)
