"""Every kind of adapter that PEFT makes and the engine serves: in one mixed batch each equals PEFT alone, packed and plain, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_runner import CPU, Item, Seq
from transformers import AutoModelForCausalLM

from swiftlite.adapters.merge import merge
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.runner import Runner

PROMPTS = [[5, 9, 30, 42, 7, 11, 80], [31, 4, 4, 17, 3, 5], [12, 13, 5, 20, 15], [9, 8, 7, 6, 5, 4, 3, 25, 26]]
SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {"target_modules": "all-linear"},
    "patterns": {"target_modules": SOME, "rank": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    "wide": {"target_modules": ["k_proj", "o_proj", "gate_proj"], "rank": 512, "lora_alpha": 64},
    "dora": {"target_modules": SOME, "use_dora": True},
    "bias": {"target_modules": SOME, "lora_bias": True},
    "trained-bias": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "saved-both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "lora-embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora-head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding-alone": {"target_modules": ["embed_tokens"]},
    "head-alone": {"target_modules": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 5, 80]},
    "tokens-of-each": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [4, 100]}},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def changed(path: Path, seed: int) -> Path:
    """The adapter with random values wherever training would have changed them (make_adapter fills only A and B)."""
    from safetensors.torch import load_file, save_file

    file = path / "adapter_model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "lora_A" not in name and "lora_B.weight" not in name and "base_layer.weight" not in name and "lora_embedding" not in name:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor * (1 + 0.3 * noise) if "magnitude" in name else tensor + 0.2 * noise
    save_file(tensors, file)
    return path


@torch.inference_mode()
def peft_logits(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return model(input_ids=torch.tensor([tokens])).logits[0, -1]


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_kinds_in_one_batch_equal_peft_alone(family: str, plain: bool, make_model, make_adapter, tmp_path) -> None:
    base = make_model(family, **({"tie_word_embeddings": True} if family == "gemma3" else {}))
    kinds = {n: f for n, f in KINDS.items() if family == "qwen2" or n != "trained-bias"}  # the others have no biases
    paths = {name: changed(make_adapter(base, seed, **fields), seed) for seed, (name, fields) in enumerate(kinds.items())}
    runner = Runner(base, EngineConfig(num_blocks=160, block_size=4), torch.float32, CPU, plain=plain)
    names: list[str | None] = [None, *kinds, None, "dora", "plain"]
    for name, path in paths.items():  # what is counted before it is read is what it takes
        size = runner.lora.register(name, path).nbytes
        assert runner.lora.add(name, path).weights.nbytes == size, name
    items, blocks = [], iter(range(160))
    for index, name in enumerate(names):
        version = None
        if name is not None:
            version = runner.lora.acquire(name)
        tokens = PROMPTS[index % len(PROMPTS)]
        items.append(Item(Seq(tokens, [next(blocks) for _ in range(3)], version), 0, len(tokens)))
    got = runner.execute(items)
    base_logits = [peft_logits(base, None, tokens) for tokens in PROMPTS]
    for index, name in enumerate(names):
        expected = peft_logits(base, paths[name] if name else None, PROMPTS[index % len(PROMPTS)])
        torch.testing.assert_close(got[index], expected, rtol=5e-4, atol=5e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert name is None or (expected - base_logits[index % len(PROMPTS)]).abs().max() > 0.01, f"{name} does nothing"
    alone = runner.execute([Item(Seq(PROMPTS[0], [157, 158, 159]), 0, len(PROMPTS[0]))])  # and then the stock modules again
    torch.testing.assert_close(alone[0], base_logits[0], rtol=5e-4, atol=5e-4)
    for name in kinds:
        runner.lora.remove(name)
    for item in items:
        if item.seq.adapter is not None:
            runner.lora.release(item.seq.adapter)
    assert runner.lora.store.stacks == {} and runner.lora.infos() == []


def test_an_own_embedding_is_loaded_beside_one_that_runs(make_model, make_adapter) -> None:
    """The running batch's stands in for the base's at that moment."""
    base = make_model("gemma3")
    runner = Runner(base, EngineConfig(num_blocks=8, block_size=4), torch.float32, CPU)
    paths = [changed(make_adapter(base, seed, **KINDS["saved-embedding"]), seed) for seed in range(2)]
    for index, path in enumerate(paths):
        runner.lora.add(f"a{index}", path)
        got = runner.execute([Item(Seq(PROMPTS[0], [0, 1], runner.lora.acquire(f"a{index}")), 0, len(PROMPTS[0]))])
        torch.testing.assert_close(got[0], peft_logits(base, path, PROMPTS[0]), rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_trained_tokens_merge(make_model, make_adapter, tmp_path, tie: bool) -> None:
    base = make_model("qwen2", tie_word_embeddings=tie)
    for name in ("tokens", "tokens-of-each"):
        adapter = changed(make_adapter(base, 3, **KINDS[name]), 3)
        merge(base, adapter, tmp_path / name, log=lambda line: None)  # compares logits itself
        tokens = PROMPTS[0]
        torch.testing.assert_close(peft_logits(tmp_path / name, None, tokens), peft_logits(base, adapter, tokens), rtol=1e-3, atol=1e-3)
