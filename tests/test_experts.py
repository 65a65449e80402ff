"""Experts in panels give what the stock experts give, whoever chooses what; what computes otherwise keeps its own forward."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_runner import CPU, Item, Seq, generate, prompts_for
from torch import Tensor, nn
from torch.nn import functional as F

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.experts import PackedExperts, pack_experts
from swiftlite.engine.panels import Panels
from swiftlite.engine.runner import Runner
from swiftlite.engine.staged import Room
from swiftlite.kernels.build import load_library
from swiftlite.models.packed import mapped_files

library = load_library()
pytestmark = pytest.mark.skipif(library is None or not Panels(library).size(1, 2), reason="needs a compiler and a CPU with AVX512-BF16")


class Stock(nn.Module):
    """The experts of a transformers model, with what may be otherwise in one."""

    def __init__(
        self, experts: int = 5, width: int = 64, inner: int = 32, act: Callable[[Tensor], Tensor] = F.silu, swap: bool = False
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, width).bfloat16() / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner).bfloat16() / inner**0.5)
        self.act, self.swap = act, swap
        self.eval()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        pairs = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[1]).to(top_k_weights.dtype)  # [T, K, D]
        for expert in range(len(self.down_proj)):
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            first, second = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            gate, up = (second, first) if self.swap else (first, second)
            y = F.linear(self.act(gate) * up, self.down_proj[expert])
            pairs[token, place] = y * top_k_weights[token, place, None]
        return pairs.float().sum(1).to(hidden_states.dtype)


def routing(rows: int, top: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, experts).topk(top).indices, torch.rand(rows, top).to(dtype)


def packed(stock: Stock, panels: Panels) -> PackedExperts:
    return PackedExperts(panels, stock.gate_up_proj, stock.down_proj, Room(), keep=True)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """To one rounding of a result, and of the values between that add up to it."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.numel():
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-8 * theirs.abs().max().item())
        assert (ours != theirs).float().mean() < 0.05


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33, 200])
@pytest.mark.parametrize(
    ("experts", "top", "width", "inner"), [(5, 2, 64, 32), (16, 4, 96, 64), (3, 3, 50, 32), (40, 1, 64, 32), (1, 1, 32, 32)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_stock_experts(panels: Panels, rows: int, experts: int, top: int, width: int, inner: int, dtype: torch.dtype) -> None:
    """With few rows most experts have none."""
    torch.manual_seed(rows + experts + width)
    stock, x = Stock(experts, width, inner), torch.randn(rows, width).bfloat16()
    chosen, weights = routing(rows, top, experts, dtype)
    ours = packed(stock, panels).forward(x, chosen, weights)
    assert_same(ours, stock(x, chosen, weights).detach())


@pytest.mark.parametrize("rows", [1, 3, 40, 200])
def test_all_tokens_to_one_expert(panels: Panels, rows: int) -> None:
    torch.manual_seed(0)
    stock, x, chosen = Stock(), torch.randn(rows, 64).bfloat16(), torch.full((rows, 1), 3)
    weights = torch.rand(rows, 1).bfloat16()
    assert_same(packed(stock, panels).forward(x, chosen, weights), stock(x, chosen, weights).detach())


def test_a_few_experts_with_most_rows(panels: Panels) -> None:
    """Threads share panels, not experts: whatever the threads, to the bit."""
    stock, x = Stock(8), torch.randn(90, 64).bfloat16()
    chosen = torch.where(torch.rand(90, 2) < 0.9, torch.tensor([2, 5]), torch.tensor([0, 7]))
    weights, ours, before, results = torch.rand(90, 2).bfloat16(), packed(stock, panels), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ours.forward(x, chosen, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert_same(results[0], stock(x, chosen, weights).detach())


def test_rows_do_not_change_each_other(panels: Panels) -> None:
    """A token's result is the same to the bit in any batch, whatever the others choose."""
    ours, x = packed(Stock(), panels), torch.randn(50, 64).bfloat16()
    chosen, weights = routing(50, 2, 5)
    whole = ours.forward(x, chosen, weights)
    for row in (0, 17, 49):
        assert torch.equal(ours.forward(x[row : row + 1], chosen[row : row + 1], weights[row : row + 1])[0], whole[row])


def test_an_index_beyond_the_experts_adds_nothing(panels: Panels) -> None:
    ours, x = packed(Stock(), panels), torch.randn(9, 64).bfloat16()
    chosen, weights = routing(9, 2, 5)
    chosen[2] = torch.tensor([5, -1])
    chosen[4, 1] = 1 << 40
    alone = ours.forward(x[4:5], chosen[4:5, :1], weights[4:5, :1])
    whole = ours.forward(x, chosen, weights)
    assert torch.equal(whole[2], torch.zeros(64).bfloat16()) and torch.equal(whole[4], alone[0])


def test_what_is_the_same_is_packed_and_nothing_else_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Stock(), Stock(2, 96, 64)])
    x, (chosen, weights) = torch.randn(7, 64).bfloat16(), routing(7, 2, 5)
    wanted = model[0](x, chosen, weights).detach()
    assert pack_experts(model, library) == 2
    assert not list(model.parameters()) and model[0].gate_up_proj is None
    assert_same(model[0](x, top_k_index=chosen, top_k_weights=weights), wanted)
    assert pack_experts(model, library) == 0  # there is nothing left


def clamped(gate: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=7.0))


class Biased(Stock):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj_bias = nn.Parameter(torch.randn(5, 64).bfloat16())


class Other(Stock):
    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, router_indices, routing_weights)


class Squared(Stock):
    """Weights used otherwise."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights**2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stock(act=F.gelu), lambda: Stock(act=lambda gate: F.gelu(gate, approximate="tanh")), lambda: Stock(act=clamped),
        lambda: Stock(act=lambda gate: gate * torch.sigmoid(1.702 * gate)), lambda: Stock(act=F.relu), lambda: Stock(swap=True),
        lambda: Stock(inner=16), lambda: Stock(width=33), lambda: Stock().float(), Biased, Other, Squared, lambda: Stock().train(),
    ],
)  # fmt: skip
def test_what_is_otherwise_keeps_its_forward(make: Callable[[], Stock]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([make()])
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert pack_experts(model, library) == 0 and "forward" not in vars(model[0])
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_shared_and_hooked_experts_keep_theirs() -> None:
    first, second, hooked = Stock(), Stock(), Stock()
    second.gate_up_proj = first.gate_up_proj
    hooked.register_forward_hook(lambda *args: None)
    assert pack_experts(nn.ModuleList([first, second, hooked]), library) == 0
    assert pack_experts(nn.ModuleList([Stock()]), None) == 0


def test_small_activations_do_not_hide_which_they_are() -> None:
    """Near zero SiLU and GELU are the same: the trial must not be there."""
    for act, count in ((F.silu, 1), (F.gelu, 0)):
        stock = Stock(act=act)
        stock.gate_up_proj.data *= 1e-3
        assert pack_experts(nn.ModuleList([stock]), library) == count


def test_a_checkpoint_that_experts_were_joined_from_is_given_back(make_model) -> None:
    """In the file each expert has weights of its own. What is still read of it comes back: the embedding's rows are right."""
    path = make_model("qwen3_moe", moe_intermediate_size=32, hidden_size=256)
    config = EngineConfig(num_blocks=160, block_size=4)
    packed = Runner(path, config, torch.bfloat16, CPU)
    assert packed.packed_experts == 3
    assert resident(path / "model.safetensors") < os.path.getsize(path / "model.safetensors") / 1024 / 2
    stock = Runner(path, config, torch.bfloat16, CPU, plain=True)
    ours, theirs = packed.model.get_input_embeddings().weight, stock.model.get_input_embeddings().weight
    assert torch.equal(ours, theirs) and torch.equal(packed.model.model.norm.weight, stock.model.model.norm.weight)


def test_the_plain_weights_memory_is_given_back(tmp_path: Path) -> None:
    """As of a mapped checkpoint: its pages leave the process."""
    count = 8 * 3 * 256 * 512
    torch.randn(count).bfloat16().view(torch.uint8).numpy().tofile(tmp_path / "weights")
    whole = torch.from_file(str(tmp_path / "weights"), size=count, dtype=torch.bfloat16)
    stock = Stock(1)
    stock.gate_up_proj = nn.Parameter(whole[: count // 3 * 2].view(8, 512, 512))
    stock.down_proj = nn.Parameter(whole[count // 3 * 2 :].view(8, 512, 256))
    stock.gate_up_proj.sum(), stock.down_proj.sum()
    assert resident(tmp_path / "weights") > 5000
    assert any(mapping.file.endswith("weights") for mapping in mapped_files())
    assert pack_experts(nn.ModuleList([stock]), library) == 1
    assert resident(tmp_path / "weights") < 100


def resident(file: Path) -> int:
    """KB of a file that are in this process's memory."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mine = line.endswith(str(file))
        elif mine and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3_moe", {"moe_intermediate_size": 32}),
        ("qwen2_moe", {"moe_intermediate_size": 32}),
        ("mixtral", {}),
        ("olmoe", {}),
        ("granitemoe", {}),
    ],
)
def test_an_engine_writes_what_it_writes_without(family: str, settings: dict, make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = make_model(family, **settings), EngineConfig(num_blocks=160, block_size=4)

    def run(plain: bool = False) -> tuple[list[list[int]], int]:
        runner = Runner(path, config, torch.bfloat16, CPU, plain=plain)
        return generate(runner, prompts_for(runner.vocab_size, [19, 6]), [5, 64]), runner.packed_experts

    ours, count = run()
    assert count == 3
    monkeypatch.setattr("swiftlite.engine.runner.pack_experts", lambda *_: 0)
    assert run() == (ours, 0)


def test_adapters_beside_packed_experts(make_model, make_adapter) -> None:
    """They change attention's linears, in some rows of a batch."""
    path = make_model("qwen3_moe", moe_intermediate_size=32)
    adapter, logits = make_adapter(path, 1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), []
    for plain in (False, True):
        runner = Runner(path, EngineConfig(num_blocks=160, block_size=4), torch.bfloat16, CPU, plain=plain)
        assert runner.packed_experts == runner.fused_layers == (0 if plain else 3)
        runner.lora.add("one", adapter)
        [prompt] = prompts_for(runner.vocab_size, [12])
        seqs = [Seq(prompt, [1, 2, 3], runner.lora.acquire("one")), Seq(prompt, [4, 5, 6])]
        logits.append(runner.execute([Item(seq, 0, 12) for seq in seqs]).float())
    assert F.cosine_similarity(*logits).min() > 0.99
    assert F.cosine_similarity(logits[0][0], logits[0][1], dim=0) < 0.9


def test_where_they_are_packed(make_model) -> None:
    """In bfloat16, beside int8 linears too; not in float32 and not in the reference."""
    path = make_model("qwen3_moe", moe_intermediate_size=32)
    small = EngineConfig(num_blocks=160, block_size=4)
    int8 = EngineConfig(num_blocks=160, block_size=4, quantization="int8")
    cases = ((small, torch.bfloat16, False, 3), (int8, torch.bfloat16, False, 3), (small, torch.float32, False, 0))
    for config, dtype, plain, count in (*cases, (small, torch.bfloat16, True, 0), (int8, torch.float32, False, 0)):
        assert Runner(path, config, dtype, CPU, plain=plain).packed_experts == count
