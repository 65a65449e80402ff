"""Round-to-nearest checkpoints: what transformers and the engine load back equals the dequantized reference."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from swiftlite.errors import ModelError, SwiftError
from swiftlite.quantize import packed, rtn


def load(path, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(40)[None] % 29, use_cache=False).logits[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [32, 48, 51])
def test_packing_is_that_of_compressed_tensors(bits: int, width: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (5, width), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    words = packed.pack(q, bits)
    assert torch.equal(words, pack_to_int32(q, bits))
    assert torch.equal(packed.unpack(words, bits, (5, width)), q)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((5, width))), q)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_within_half_a_step(bits: int, group: int | None, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    q, scale = rtn.round_to_nearest(weight, bits, group)
    assert scale.dtype == dtype and bool(torch.isfinite(scale).all())
    step = scale.float().repeat_interleave(64 // scale.shape[1], 1)
    error = (q.float() * step - weight.float()).abs()
    assert bool((error <= step * (0.51 if dtype == torch.float32 else 0.6)).all())
    assert not q[3].any()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.08), (4, 0.8)])
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_transformers_loads_the_dequantized_weights(make_model, tmp_path, family: str, bits: int, bound: float) -> None:
    from transformers import CompressedTensorsConfig

    base, out = make_model(family), tmp_path / "out"
    lines: list[str] = []
    rtn.quantize(base, out, bits, log=lines.append)
    original, stored = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert "model.embed_tokens.weight" in stored and not any(key.startswith("lm_head.weight_") for key in stored)
    reference = {}
    for key, weight in original.items():
        name = key.removesuffix(".weight")
        if f"{name}.weight_packed" not in stored:
            assert torch.equal(stored[key], weight)
            continue
        assert weight.dim() == 2 and key not in stored
        q, scale = rtn.round_to_nearest(weight, bits, 16 if bits == 4 else None)
        assert torch.equal(packed.unpack(stored[f"{name}.weight_packed"], bits, tuple(weight.shape)), q)
        reference[key] = packed.dequantize(q, scale)
    assert len(reference) == 3 * (7 if family == "qwen2" else 4)
    dense = load(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    weights = dict(dense.named_parameters())
    for key, expected in reference.items():
        assert torch.equal(weights[key], expected)
    plain = logits(load(out))  # transformers' own default: unpacked at the first forward
    torch.testing.assert_close(plain, logits(dense), rtol=1e-4, atol=1e-4)
    exact = logits(load(base))
    assert 0 < ((plain - exact).norm() / exact.norm()).item() < bound
    assert any("relative error" in line for line in lines)
    assert (out / "tokenizer.json").is_file() and (out / "chat_template.jinja").is_file()


def test_group_size_follows_the_model_or_is_refused(make_model, tmp_path) -> None:
    base = make_model("qwen2")  # 48 and 64 inputs: 16 divides both
    lines: list[str] = []
    rtn.quantize(base, tmp_path / "auto", 4, log=lines.append)
    weights = json.loads((tmp_path / "auto" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["group_size"] == 16 and any("group size 16: 128 does not divide" in line for line in lines)
    with pytest.raises(SwiftError, match=r"(?s)group size 128 does not fit.*--group_size 16"):
        rtn.quantize(base, tmp_path / "given", 4, 128, group_size_given=True, log=lines.append)
    with pytest.raises(ModelError, match="quantized already"):
        rtn.quantize(tmp_path / "auto", tmp_path / "twice", 4, log=lines.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auto"]


def test_config_is_valid_for_compressed_tensors(make_model, tmp_path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    rtn.quantize(make_model("llama"), tmp_path / "out", 8, log=lambda line: None)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    weights = config.config_groups["group_0"].weights
    assert config.format == "pack-quantized" and config.ignore == ["lm_head"]
    assert (weights.num_bits, weights.strategy, weights.symmetric) == (8, "channel", True)


def test_experts_are_quantized_and_routers_are_not(tmp_path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from swiftlite.models.loading import load_model

    config = Qwen3MoeConfig(
        hidden_size=48, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, vocab_size=64, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    rtn.quantize(tmp_path / "base", tmp_path / "out", 8, log=lambda line: None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight_packed" in stored and "model.layers.1.mlp.gate.weight" in stored
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert sorted(ignored) == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    exact = logits(model)
    error = (logits(load_model(tmp_path / "out", torch.float32, torch.device("cpu"), "sdpa")) - exact).norm() / exact.norm()
    assert 0 < error.item() < 0.05
