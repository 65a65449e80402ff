"""What the engine relies on in transformers, what the probe records, and what the verdict refuses."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import AttentionInterface

from swiftlite.engine.bridge import NAME, Bridge, swift_pages_attention
from swiftlite.errors import ModelError
from swiftlite.models.loading import load_model, load_tokenizer

CPU = torch.device("cpu")


def load(path: Path):
    return load_model(path, torch.float32, CPU, NAME)


def build(name: str, **settings):
    """A random model of a class that FAMILIES does not have, with our attention."""
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = NAME
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


# ---- the contract with transformers (DESIGN §4) ----


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family: str, make_model) -> None:
    """No mask, our keyword at every layer, new K and V only, logits for the rows asked and no others."""
    calls = []

    def recording(module, query, key, value, attention_mask, swift_mark=None, **kwargs):
        calls.append((attention_mask, swift_mark, query.shape, key.shape, value.shape))
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register("swift_contract", recording)
    assert NAME not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    model = load_model(make_model(family), torch.float32, CPU, "swift_contract")
    ids, positions, mark = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 9]]), object()
    with torch.no_grad():
        settings = {"input_ids": ids, "position_ids": positions, "use_cache": False, "swift_mark": mark}
        whole = model(**settings).logits
        calls.clear()
        picked = model(**settings, logits_to_keep=torch.tensor([3, 1])).logits
    assert len(calls) == model.config.num_hidden_layers
    for mask, got, q, k, v in calls:
        assert mask is None and got is mark
        assert q[2] == k[2] == v[2] == 4
    torch.testing.assert_close(picked, whole[:, [3, 1]])


# ---- the probe ----


def test_probe_records_what_the_model_does(make_model) -> None:
    bridge = Bridge(load(make_model("gemma2")), CPU)
    assert [layer.window for layer in bridge.layers] == [16, None, 16]
    assert {layer.softcap for layer in bridge.layers} == {50.0}
    assert [layer.index for layer in bridge.layers] == [0, 1, 2]
    assert (bridge.layers[0].heads, bridge.layers[0].kv_heads, bridge.layers[0].head_dim) == (4, 2, 12)
    assert bridge.layers[1].name == "model.layers.1.self_attn"
    assert Bridge(load(make_model("granite")), CPU).layers[0].scale == 0.2
    assert Bridge(load(make_model("llama")), CPU).max_model_len == 512


def test_context_length_is_checked(make_model) -> None:
    model = load(make_model("llama"))
    assert Bridge(model, CPU, 100).max_model_len == 100
    with pytest.raises(ModelError, match="more than the model's 512"):
        Bridge(model, CPU, 513)


def attention_arguments() -> dict:
    q = torch.zeros(1, 2, 1, 4)
    return {"module": nn.Identity(), "query": q, "key": q, "value": q, "attention_mask": None, "scaling": 1.0}


class Echo:
    def attend(self, module, q, k, v, mask, settings):
        return v.transpose(0, 1)


@pytest.mark.parametrize(
    ("keyword", "reason"),
    [
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"brand_new_option": 0.5}, "brand_new_option"),
        ({"is_causal": False}, "not causal"),
        ({"dropout": 0.1}, "dropout"),
        ({"swift_pages": None}, "did not reach"),
    ],
)
def test_unknown_keyword_raises(keyword: dict, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        swift_pages_attention(**{**attention_arguments(), "swift_pages": Echo(), **keyword})


def test_known_and_empty_keywords_pass() -> None:
    out, weights = swift_pages_attention(**attention_arguments(), swift_pages=Echo(), s_aux=None, is_causal=True, use_cache=False)
    assert out.shape == (1, 1, 2, 4) and weights is None


# ---- the verdict ----


def base(**extra) -> dict:
    return {**{key: SMALL[key] for key in SMALL if key != "bos_token_id"}, "vocab_size": 64, **extra}


def refused(model, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        Bridge(model, CPU)
    assert reason in str(caught.value) and "vLLM backend" in caught.value.fix, str(caught.value)


def test_sinks_are_refused() -> None:
    model = build("GptOss", **base(num_local_experts=2, num_experts_per_tok=1))
    refused(model, "attention sinks (s_aux)")


def test_convolution_is_refused() -> None:
    refused(build("Lfm2", **base(full_attn_idxs=[1], block_multiple_of=8)), "convolution")


@pytest.mark.parametrize("name", ["Mamba", "Qwen3Next", "RecurrentGemma", "Bloom", "Falcon"])
def test_no_plain_attention_is_refused(name: str, tmp_path: Path) -> None:
    """Recurrent models, and those (ALiBi) that do not attend through the interface, whatever step they fail at."""
    own = {
        "Mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "Qwen3Next": base(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
                          linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                          num_hidden_layers=4),
        "RecurrentGemma": base(lru_width=48, attention_window_size=8),
        "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2},
        "Falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**own[name])
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / name)
    with pytest.raises(ModelError) as caught:
        Bridge(load(tmp_path / name), CPU)
    assert caught.value.why and "vllm" in caught.value.fix


class Twice(nn.Module):
    """Calls the inner layer again on its own output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, **kwargs):
        return self.inner(self.inner(hidden_states, **kwargs), **kwargs)


def test_a_layer_called_twice_is_refused(make_model) -> None:
    model = load(make_model("llama"))
    model.model.layers[1] = Twice(model.model.layers[1])
    refused(model, "called twice")


class Shift(nn.Module):
    """A token shift: each row sees its neighbour, outside attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + torch.nn.functional.pad(x, (0, 0, 1, 0))[..., :-1, :])


def test_mixing_outside_attention_is_refused(make_model) -> None:
    model = load(make_model("llama"))
    model.model.layers[0].mlp = Shift(model.model.layers[0].mlp)
    refused(model, "mixes tokens outside attention")


def test_chunked_attention_is_refused() -> None:
    settings = base(num_local_experts=2, intermediate_size_mlp=32, attention_chunk_size=8)
    config = transformers.Llama4TextConfig(**settings)
    config._attn_implementation = NAME
    refused(transformers.Llama4ForCausalLM(config).eval(), "neither causal nor a sliding window")


def test_a_probe_keeps_no_model(make_model) -> None:
    """transformers' tables of attention and mask functions are the process's."""
    model = load(make_model("llama"))
    Bridge(model, CPU)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# ---- rope that depends on the batch ----


def test_dynamic_rope_caps_the_context(make_model) -> None:
    model = load(make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}))
    bridge = Bridge(model, CPU)
    assert bridge.max_model_len == 512 and "dynamic" in bridge.notes[0]
    with pytest.raises(ModelError, match="512"):
        Bridge(model, CPU, 2048)


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def test_dynamic_rope_is_frozen(make_model) -> None:
    path = make_model("llama", rope_parameters=DYNAMIC)
    stock, ours = load(path).model.rotary_emb, load(path)
    Bridge(ours, CPU)
    x, positions = torch.zeros(1, dtype=torch.float32), torch.tensor([[0, 3, 511]])
    for one, other in zip(stock(x, positions), ours.model.rotary_emb(x, positions), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", [*FAMILIES, "dynamic"])
def test_a_forward_reads_nothing_back(family: str, make_model, monkeypatch) -> None:
    """What looks at a number on the device waits for it, and cannot be captured: a tensor without numbers has none to show."""
    model = load(make_model("llama", rope_parameters=DYNAMIC) if family == "dynamic" else make_model(family))
    bridge = Bridge(model, CPU)
    layers = iter(bridge.layers)

    class Pages:
        def attend(self, module, q, k, v, mask, settings):
            return q.new_empty(q.shape[1], q.shape[0], next(layers).value_dim)

    model.to("meta")
    rows = torch.zeros(1, 5, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        output = model(input_ids=rows, position_ids=rows, use_cache=False, logits_to_keep=rows[0, :2], swift_pages=Pages())
    assert output.logits.shape[:2] == (1, 2) and next(layers, None) is None


@pytest.mark.parametrize(("length", "long"), [(64, False), (200, True)])
def test_longrope_is_frozen(make_model, length: int, long: bool) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
            "original_max_position_embeddings": 64, "factor": 8.0}  # fmt: skip
    path = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    model = load(path)
    before = model.model.rotary_emb.inv_freq.clone()
    Bridge(model, CPU, length)
    frozen = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(frozen, before) != long
    for far in (3, 180):  # neither short nor long batches change it any more
        model.model.rotary_emb(torch.zeros(1), torch.tensor([[0, far]]))
        assert torch.equal(model.model.rotary_emb.inv_freq, frozen)


# ---- loading ----


@pytest.fixture
def broken(make_model, tmp_path: Path):
    """broken(change) -> a copy of a good model directory after `change(directory)`."""

    def make(change) -> Path:
        target = tmp_path / "copy"
        shutil.copytree(make_model("llama"), target)
        change(target)
        return target

    return make


def edit_config(**fields):
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def drop_a_tensor(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


CASES = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "truncated": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]), "weights"),
    "missing tensor": (drop_a_tensor, "model.layers.1.mlp.up_proj.weight"),
    "other shape": (edit_config(intermediate_size=96), "weights"),
    "broken json": (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "unknown architecture": (edit_config(model_type="never_heard_of"), "never_heard_of"),
    "remote code": (edit_config(model_type="theirs", auto_map={"AutoModelForCausalLM": "x.Y"}), "never run here"),
    "not a language model": (edit_config(model_type="vit"), "not a causal language model"),
    "missing shard": (
        lambda d: (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}})),
        "model-1.safetensors",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_directories_are_explained(case: str, broken) -> None:
    change, reason = CASES[case]
    path = broken(change)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert reason in str(caught.value) and "Traceback" not in str(caught.value)


def test_missing_directory_and_tokenizer(tmp_path: Path, make_model) -> None:
    with pytest.raises(ModelError, match="no model directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(make_model("llama"))
    assert tokenizer.decode(tokenizer.encode("你好, world")) == "你好, world"
