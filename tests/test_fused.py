"""Each fused step equals the stock module's; what differs is left alone; fused models equal plain ones."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from test_attention_native import needs_compiler
from test_runner import CPU, Item, Seq, make_runner, prompts_for
from torch import nn
from torch.nn import functional as F

from swiftlite.engine.bridge import NAME, Bridge
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.layers import _trial, fuse_layers
from swiftlite.engine.runner import Runner
from swiftlite.kernels.build import load_library
from swiftlite.kernels.steps import Kernels, Rotation
from swiftlite.models.fused import Rope, _fuse_gate, _fuse_norm, fuse
from swiftlite.models.loading import load_model

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16]


def kernels() -> Kernels:
    library = load_library("steps")
    assert library is not None
    return Kernels(library)


def close(dtype: torch.dtype) -> dict:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (1, 15), (2, 17), (3, 1024), (5, 3000), (0, 64)])
def test_best_of_rows(rows: int, dim: int, dtype: torch.dtype) -> None:
    """torch's max, with the first of equal places; infinite and NaN rows included."""
    torch.manual_seed(dim)
    x = torch.randn(rows, dim + 3).to(dtype)[:, :dim]
    if rows > 2:
        x[0, dim // 2] = torch.nan
        x[1, :] = -torch.inf
        x[2, [dim // 3, dim - 1]] = torch.inf
    best, place = kernels().best_of_rows(x)
    wanted = x.max(dim=-1).values.float()
    torch.testing.assert_close(best, wanted, rtol=0, atol=0, equal_nan=True)
    for row in range(rows):
        if not wanted[row].isnan():
            assert place[row] == (x[row].float() == wanted[row]).nonzero()[0, 0]


class Norm(nn.Module):
    """The three ways models round an RMSNorm, and one that no kernel has."""

    def __init__(self, dim: int, kind: int, eps: float) -> None:
        super().__init__()
        self.weight, self.kind, self.eps = nn.Parameter(torch.randn(dim)), kind, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == 0:
            return self.weight * y.to(x.dtype)
        if self.kind == 1:
            return (self.weight.float() * y).to(x.dtype)
        return (y * ((1.0 if self.kind == 2 else 1.1) + self.weight.float())).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [7, 48, 128])
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_norms(kind: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(kind)
    for eps in (1e-5, 1e-6):
        module = Norm(dim, kind, eps).to(dtype).eval()
        stock = module.forward
        with torch.inference_mode():
            assert (_fuse_norm(module, kernels(), {}) is not None) == (kind < 3)
            wide = torch.randn(1, 6, 3 * dim + 5).to(dtype)
            for x in (wide[..., :dim], wide[..., dim : 3 * dim].view(1, 6, 2, dim), torch.randn(2, 4, dim).to(dtype)):
                torch.testing.assert_close(module(x), stock(x), **close(dtype))
                torch.testing.assert_close(module(x * 1e-3), stock(x * 1e-3), **close(dtype))


class Gate(nn.Module):
    def __init__(self, activation: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.act_fn, self.factor = activation, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scaled(nn.Module):
    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * self.scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        for module, taken in (
            (Gate(nn.SiLU()), True),
            (Gate(nn.GELU("tanh")), True),
            (Gate(nn.GELU()), False),
            (Gate(nn.SiLU(), 1.5), False),
        ):
            module = module.to(dtype).eval()
            stock, x = module.forward, torch.randn(1, 9, 24).to(dtype)
            assert (_fuse_gate(module, kernels(), dtype, {}) is not None) == taken
            torch.testing.assert_close(module(x), stock(x), **close(dtype))


def test_modules_of_one_kind_are_told_apart_by_their_settings() -> None:
    """One check serves all that are alike, and a gate that only looks alike has its own."""
    torch.manual_seed(0)
    with torch.inference_mode():
        kinds: dict = {}
        same = [Gate(nn.SiLU()).eval() for _ in range(2)]
        assert all(_fuse_gate(module, kernels(), torch.float32, kinds) for module in same) and len(kinds) == 1
        for other in (Gate(nn.SiLU(), 1.5).eval(), Gate(nn.GELU()).eval()):
            assert not _fuse_gate(other, kernels(), torch.float32, kinds)
        assert len(kinds) == 3
        scaled = [Gate(nn.SiLU(), 1.0).eval() for _ in range(2)]
        for gate, scale in zip(scaled, (1.0, 2.0), strict=True):  # what only a buffer tells apart
            gate.act_fn = Scaled(torch.tensor(scale))
        assert [_fuse_gate(gate, kernels(), torch.float32, kinds) is not None for gate in scaled] == [True, False]
        norms = [Norm(16, kind, 1e-5).bfloat16().eval() for kind in (0, 1, 2, 3, 0)]
        found = [_fuse_norm(norm, kernels(), kinds) for norm in norms]
        assert [norm and norm.kind for norm in found] == [0, 1, 2, None, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    stock = apply_rotary_pos_emb.stock if isinstance(apply_rotary_pos_emb, Rope) else apply_rotary_pos_emb
    torch.manual_seed(0)
    for dim in (8, 64, 128):
        x = torch.randn(1, 5, 3 * dim + 4).to(dtype)[..., : 3 * dim].view(1, 5, 3, dim).transpose(1, 2)
        angles = torch.randn(1, 5, dim)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        torch.testing.assert_close(kernels().rope(x, cos, sin, Rotation(dim)), stock(x, x, cos, sin)[0], **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [False, True])
def test_rope_of_some_dimensions(pairs: bool, dtype: torch.dtype) -> None:
    """In halves, as Phi-3 has it, and in pairs, as GLM-4 has it; the others stay as they are."""
    from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as by_pairs
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as by_halves

    stock = by_pairs if pairs else by_halves
    stock = stock.stock if isinstance(stock, Rope) else stock
    torch.manual_seed(0)
    for dims, dim in ((8, 8), (8, 12), (64, 128), (48, 64), (30, 31)):
        x = torch.randn(1, 5, 3, dim).to(dtype).transpose(1, 2)
        half = torch.randn(1, 5, dims // 2)
        cos, sin = (torch.cat((f(half), f(half)), -1).to(dtype) for f in (torch.cos, torch.sin))
        torch.testing.assert_close(kernels().rope(x, cos, sin, Rotation(dims, pairs)), stock(x, x, cos, sin)[0], **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_equals_the_plain_one(family: str, dtype: torch.dtype, make_model) -> None:
    path = make_model(family)
    fast, plain = (Runner(path, EngineConfig(num_blocks=160, block_size=4), dtype, CPU, plain=flag) for flag in (False, True))
    first, second = prompts_for(fast.vocab_size, [20, 9])
    items = [Item(Seq(first, list(range(5))), 0, 20), Item(Seq(second, list(range(5, 8))), 0, 9)]
    ours, theirs = fast.execute(items), plain.execute(items)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    else:
        assert F.cosine_similarity(ours.float(), theirs.float()).min() > 0.99


def test_what_is_fused(make_model) -> None:
    """The families that speed matters most for do get the kernels."""
    runner = Runner(make_model("qwen3"), EngineConfig(num_blocks=8), torch.float32, CPU, plain=True)
    done = fuse(runner.model, kernels())
    assert (len(done.norms), len(done.gates), done.rotation) == (3 * 4 + 1, 3, Rotation(12))


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", 3),
        ("qwen2", 3),
        ("qwen3", 3),
        ("mistral", 3),
        ("phi3", 3),
        ("gemma2", 3),
        ("gemma3", 3),
        ("glm4", 3),
        ("granite", 3),
        ("smollm3", 3),
        ("exaone4", 3),
        ("qwen3_moe", 3),
        ("mixtral", 3),
        ("olmoe", 3),
        ("granitemoe", 0),
        ("olmo2", 3),
    ],
)
def test_whole_layers(family: str, layers: int, make_model) -> None:
    """Layers of these kinds run as one; others keep their own forward."""
    runner = make_runner(make_model(family))
    assert runner.fused_layers == layers


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "glm4", "olmo2", "exaone4", "granite"])
def test_each_norm_is_where_it_belongs(family: str, make_model, tmp_path) -> None:
    """With weights of their own: the norms of a new model are all alike, whichever is taken for which."""
    path = shutil.copytree(make_model(family), tmp_path / "model")
    torch.manual_seed(0)
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if "norm" in name:
            weight += 0.3 * torch.randn(weight.shape)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    fast, plain = (Runner(path, EngineConfig(num_blocks=80, block_size=4), torch.float32, CPU, plain=flag) for flag in (False, True))
    assert fast.fused_layers == 3
    items = [Item(Seq(prompts_for(fast.vocab_size, [40])[0], list(range(10))), 0, 40)]
    torch.testing.assert_close(fast.execute(items), plain.execute(items), rtol=2e-4, atol=2e-4)


def test_a_limit_of_queries_and_keys_is_left_to_the_model(make_model) -> None:
    """The few tokens of the check may all be within it."""
    assert make_runner(make_model("olmoe", clip_qkv=8.0)).fused_layers == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_scaled_by_position_are_noticed(dtype: torch.dtype, make_model) -> None:
    """Ministral 3 differs from Mistral only beyond the length that it was first trained on."""
    assert Runner(make_model("ministral3"), EngineConfig(num_blocks=8), dtype, CPU).fused_layers == 0


def test_a_layer_that_only_looks_alike_is_restored(make_model) -> None:
    model = load_model(make_model("llama"), torch.float32, CPU, NAME)
    layer = model.model.layers[1]
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: 0.5 * stock(*args, **kwargs)
    own, bridge = layer.forward, Bridge(model, CPU)
    before = _trial(bridge)
    assert fuse_layers(bridge, fuse(model, kernels())) == 0
    assert layer.forward is own and "forward" not in vars(model.model.layers[0])
    torch.testing.assert_close(_trial(bridge), before, rtol=2e-4, atol=2e-4)


def test_another_model_of_the_process_is_untouched(make_model) -> None:
    """The rope function of a modeling file serves all its models; ours acts for the engine's model alone."""
    from transformers import AutoModelForCausalLM

    path, ids = make_model("llama"), torch.tensor([[3, 4, 5, 6]])
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = other(ids).logits
    make_runner(path)
    after = other(ids).logits
    after.sum().backward()
    assert torch.equal(before, after) and other.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
