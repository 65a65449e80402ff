"""Merged models answer like base + adapter, for every kind of adapter; one rounding; nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.adapters import merge as merging
from swiftlite.adapters.directory import read
from swiftlite.adapters.merge import merge
from swiftlite.errors import AdapterError, ModelError, SwiftError
from swiftlite.models.shards import open_shards

IDS = torch.arange(3, 35)[None]


def load(path: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits[0]


def with_adapter(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load(base), adapter).eval())


KINDS = {
    "plain": ("llama", {}),
    "biased-base": ("qwen2", {}),
    "fused": ("phi3", {}),
    "patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "dora": ("llama", {"use_dora": True}),
    "head-saved": ("llama", {"modules_to_save": ["lm_head"]}),
    "norms-saved": ("llama", {"modules_to_save": ["norm"]}),
    "tied-head-saved": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "tied-embedding-saved": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "tied-head-adapted": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-embedding-adapted": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied-together": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "biases": ("qwen2", {"bias": "all"}),
    "lora-bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_base_plus_adapter(make_model, make_adapter, tmp_path, kind: str) -> None:
    family, fields = KINDS[kind]
    base = make_model(family)
    adapter = tmp_path / "adapter"
    shutil.copytree(make_adapter(base, 1, **fields), adapter)
    generator = torch.Generator().manual_seed(2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_" not in key and "base_layer.weight" not in key:  # saved modules and biases: as if they had been trained
            tensor += torch.randn(tensor.shape, generator=generator) * 0.2
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    merge(base, adapter, tmp_path / "merged", log=lines.append)
    expected = with_adapter(base, adapter)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=2e-4)
    assert (expected - logits(load(base))).abs().max() > 0.05
    assert any("top-1 agrees on 100.0%" in line for line in lines) and any("differ by at most" in line for line in lines)
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json"} <= {
        p.name for p in (tmp_path / "merged").iterdir()
    }


def test_sharded_bf16_base_is_rounded_once(make_model, make_adapter, tmp_path) -> None:
    base = tmp_path / "base"
    load(make_model("llama"), torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    shards = open_shards(base)
    assert len(shards.names) > 2
    adapter = make_adapter(make_model("llama"), 1)
    merge(base, adapter, tmp_path / "merged", log=lambda line: None)
    result = open_shards(tmp_path / "merged")
    assert {key: info.shard for key, info in result.tensors.items()} == {key: info.shard for key, info in shards.tensors.items()}
    updates = read(adapter).modules
    for key in shards.tensors:
        weights = updates.get(key.removesuffix(".weight"))
        before, after = shards.get(key), result.get(key)
        assert after.dtype == torch.bfloat16
        expected = before if weights is None else (before.double() + weights.scale * (weights.b.double() @ weights.a.double())).bfloat16()
        if weights is None:
            assert torch.equal(after, expected)
        else:  # fp32 and fp64 sums may fall on two sides of a rounding border, never further
            assert (after != expected).float().mean() < 0.01
            torch.testing.assert_close(after, expected, rtol=2**-7, atol=1e-6)
    load(tmp_path / "merged")


def test_settings_become_those_of_a_full_model(make_model, make_adapter, tmp_path) -> None:
    base = make_model("qwen2")
    adapter = tmp_path / "checkpoint-9"
    shutil.copytree(make_adapter(base, 1), adapter)
    settings = {"tuner_type": "lora", "model": str(base), "model_type": "qwen-7b-chat", "dataset": ["a.jsonl"], "system": "Be kind."}
    (adapter / "sft_args.json").write_text(json.dumps(settings))
    (adapter / "swift_template.json").write_text('{"name": "mine"}')
    (adapter / "optimizer.pt").write_bytes(b"big")
    shutil.copy(base / "tokenizer.json", adapter)
    (adapter / "chat_template.jinja").write_text("adapter's own")
    merge(base, adapter, tmp_path / "merged", log=lambda line: None)
    saved = json.loads((tmp_path / "merged" / "sft_args.json").read_text())
    assert saved["tuner_type"] == "full" and saved["model"] is None
    assert (saved["model_type"], saved["dataset"], saved["system"]) == ("qwen-7b-chat", ["a.jsonl"], "Be kind.")
    assert (tmp_path / "merged" / "swift_template.json").read_text() == '{"name": "mine"}'
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "adapter's own"
    assert not (tmp_path / "merged" / "optimizer.pt").exists() and not (tmp_path / "merged" / "adapter_config.json").exists()


def test_failures_write_nothing(make_model, make_adapter, tmp_path, monkeypatch) -> None:
    base, out = make_model("qwen2"), tmp_path / "out"
    adapter = make_adapter(base, 1)
    with pytest.raises(AdapterError, match=r"in the adapter and \[64, 48\] in the base|\[48, 64\] in the base"):
        merge(base, make_adapter(make_model("qwen2", intermediate_size=96), 1), out)
    with pytest.raises(ModelError, match=r"no config\.json"):
        merge(tmp_path, adapter, out)
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be read"):
        merge(broken, adapter, out)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        merge(broken, adapter, out)
    quantized = tmp_path / "quantized"
    shutil.copytree(base, quantized)
    config = json.loads((base / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"(?s)is quantized.*16-bit base"):
        merge(quantized, adapter, out)
    with monkeypatch.context() as patch:  # a defect of ours must be found by the check
        patch.setattr(merging, "merged_weight", lambda base, weights, transpose=False: base.float())
        with pytest.raises(AdapterError, match="does not answer like base \\+ adapter"):
            merge(base, adapter, out, log=lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(SwiftError, match="not enough space"):
            merge(base, adapter, out)
    out.mkdir()
    with pytest.raises(SwiftError, match="exists already"):
        merge(base, adapter, out)
    assert list(out.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out", "quantized"]
