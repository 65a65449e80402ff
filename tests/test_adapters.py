"""Reading a PEFT directory refuses what it does not understand, by name; SWIFT's own layout becomes PEFT's."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.adapters import digest
from swiftlite.adapters.config import AdapterConfig
from swiftlite.adapters.convert import to_peft
from swiftlite.adapters.directory import read
from swiftlite.engine.lora_native import NativeLora
from swiftlite.errors import AdapterError, SwiftError
from swiftlite.kernels.build import load_library
from swiftlite.models.shards import open_shards

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(make_model, make_adapter, tmp_path) -> Path:
    """A copy of an adapter that the test may break."""
    path = tmp_path / "adapter"
    shutil.copytree(make_adapter(make_model("qwen2"), 1), path)
    return path


def change_config(path: Path, **fields) -> None:
    raw = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**raw, **fields}))


def change_weights(path: Path, change) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / WEIGHTS)


def test_reads_every_tensor_with_its_scale(make_model, make_adapter) -> None:
    base = make_model("qwen2")
    path = make_adapter(
        base,
        1,
        rank=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"v_proj": 5},
    )
    adapter = read(path, open_shards(base).module_shapes())
    assert len(adapter.modules) == 3 * 7 and adapter.max_rank == 4 and adapter.saved == {}
    stored = load_file(path / WEIGHTS)
    assert len(stored) == 2 * len(adapter.modules)
    for name, weights in adapter.modules.items():
        assert torch.equal(weights.a, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(weights.b, stored[f"base_model.model.{name}.lora_B.weight"])
        rank = 2 if name.endswith("q_proj") else 3 if name.endswith("layers.1.mlp.up_proj") else 4
        alpha = 5 if name.endswith("v_proj") else 6
        assert weights.rank == rank and weights.scale == pytest.approx(alpha / rank**0.5)


def test_scales_are_those_of_peft(make_model, make_adapter) -> None:
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from transformers import AutoModelForCausalLM

    base = make_model("llama")
    path = make_adapter(base, 1, rank=4, rank_pattern={"proj": 3, "down_proj": 2}, alpha_pattern={".*mlp.*": 7})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    peft = {n.removeprefix("base_model.model."): m.scaling["default"] for n, m in model.named_modules() if isinstance(m, Linear)}
    ours = {name: weights.scale for name, weights in read(path).modules.items()}
    assert ours == pytest.approx(peft) and len(ours) == 21


def test_digest_is_of_the_content(adapter: Path, tmp_path) -> None:
    first = read(adapter).digest
    shutil.copytree(adapter, tmp_path / "copy")
    change_config(tmp_path / "copy", base_model_name_or_path="elsewhere", lora_dropout=0.5)
    assert read(tmp_path / "copy").digest == first
    change_config(tmp_path / "copy", lora_alpha=9)
    assert read(tmp_path / "copy").digest != first
    change_weights(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[0].add_(0.5))
    assert read(adapter).digest != first


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 4096, 10_000, digest.PIECE + 5000])
def test_digests_of_lanes_are_blake2s(size: int) -> None:
    """Sixteen messages, dealt out word by word; by hashlib, by the kernel, and by hand."""
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)).numpy().tobytes()
    whole = data + bytes(-len(data) % digest.BLOCK or (0 if data else digest.BLOCK))
    messages = [b"".join(whole[at : at + 4] for at in range(4 * lane, len(whole), 64)) for lane in range(digest.LANES)]
    expected = b"".join(hashlib.blake2s(message).digest() for message in messages)
    assert digest.lanes(memoryview(data)) == expected
    library = load_library()
    if library is not None:
        assert NativeLora(library, [(8, (8,))]).lanes(memoryview(data)) == expected


def test_a_digest_is_of_length_and_of_what_comes_first() -> None:
    one, two, three = (digest.Hashing(first, memoryview(data)).result() for first, data in ((b"a", b"x"), (b"a", b"x\0"), (b"b", b"x")))
    assert len({one, two, three}) == 3 and len(one) == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "is not a LoRA adapter\n.*'IA3'"),
        ({"target_parameters": ["experts.w"]}, "uses target_parameters, which is not supported"),
        ({"trainable_token_indices": [1]}, "the rows of its trained tokens"),
        ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "was initialised with pissa"),
        ({"r": 0}, "rank must be at least 1"),
        ({"r": 8}, r"(?s)do not fit its configuration.*rank 8 needs \[8, in\]"),
        ({"r": None}, "not a usable LoRA configuration"),
        ({"lora_alpha": float("nan")}, "must be a finite number"),
        ({"use_dora": True}, "do not fit its configuration\n.*no DoRA magnitude"),
        ({"rank_pattern": {"(": 3}}, "not a usable LoRA configuration"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_configurations_that_are_refused(adapter: Path, fields: dict, message: str) -> None:
    change_config(adapter, **fields)
    with pytest.raises(AdapterError, match=message):
        read(adapter)


def drop_b(tensors: dict) -> None:
    del tensors[next(key for key in tensors if "lora_B" in key)]


def set_value(value: float):
    def change(tensors: dict) -> None:
        tensors[sorted(tensors)[3]][0, 0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_b, "(?s)is incomplete.*has no lora_B"),
        (set_value(float("nan")), r"(?s)not finite.*lora_B.weight has NaN"),
        (set_value(float("-inf")), "not finite"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(48)}), "model.norm.weight is not part of a LoRA adapter"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 48)}), "SWIFT's own key names"),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(4, 8, dtype=torch.int32)}), "dtype torch.int32"),
        (lambda t: t.clear(), "is empty"),
    ],
)  # fmt: skip
def test_weights_that_are_refused(adapter: Path, change, message: str) -> None:
    change_weights(adapter, change)
    with pytest.raises(AdapterError, match=message):
        read(adapter)


def test_broken_files_are_refused(adapter: Path, tmp_path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    for data in (whole[: len(whole) // 2], b"", (1 << 60).to_bytes(8, "little") + whole[8:], b"\x80\x04pickle" * 9):
        (adapter / WEIGHTS).write_bytes(data)
        with pytest.raises(AdapterError, match="not a whole safetensors file"):
            read(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="safetensors is missing"):
        read(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"(?s)pickled weights.*--to_peft_format true"):
        read(adapter)
    (adapter / CONFIG).write_text("{")
    (adapter / WEIGHTS).write_bytes(whole)
    with pytest.raises(AdapterError, match="not valid JSON"):
        read(adapter)
    with pytest.raises(AdapterError, match="no such directory"):
        read(tmp_path / "nowhere")


def test_adapter_of_another_base_says_which_shape_differs(make_model, make_adapter) -> None:
    shapes = open_shards(make_model("qwen2")).module_shapes()
    wide = make_adapter(make_model("qwen2", hidden_size=64, head_dim=16), 1, target_modules=["o_proj"])
    with pytest.raises(AdapterError, match=r"model.layers.0.self_attn.o_proj is \[64, 64\] in the adapter and \[48, 48\] in the base"):
        read(wide, shapes)
    deep = make_adapter(make_model("qwen2", num_hidden_layers=4), 1, target_modules=["o_proj"])
    with pytest.raises(AdapterError, match=r"no module model.layers.3.self_attn.o_proj; the nearest is model.layers.\d.self_attn.o_proj"):
        read(deep, shapes)
    fused = make_adapter(make_model("phi3"), 1, target_modules=["qkv_proj"])
    with pytest.raises(AdapterError, match=r"no module model.layers.0.self_attn.qkv_proj; the nearest is model.layers.0.self_attn"):
        read(fused, shapes)
    with pytest.raises(AdapterError, match=r"has rank 4\n.*at most 2"):
        read(make_adapter(make_model("qwen2"), 1), shapes, max_rank=2)


def test_scale_rules() -> None:
    assert AdapterConfig(rank=16, alpha=32).scale_of("a.q_proj") == 2
    assert AdapterConfig(rank=16, alpha=32, use_rslora=True).scale_of("a.q_proj") == 8


# -- conversion


def swift_layout(adapter: Path, out: Path, pickled: bool = False) -> Path:
    """The adapter as SWIFT 1.x wrote it, with a trainer's leftovers."""
    inner = out / "default"
    inner.mkdir(parents=True)
    raw = json.loads((adapter / CONFIG).read_text())
    del raw["peft_type"]
    (inner / CONFIG).write_text(json.dumps({**raw, "swift_type": "LORA", "lora_dtype": None, "use_qa_lora": False, "enable_lora": None}))
    tensors = {
        key.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for key, tensor in load_file(adapter / WEIGHTS).items()
    }
    if pickled:
        torch.save(tensors, inner / "adapter_model.bin")
    else:
        save_file(tensors, inner / WEIGHTS)
    (out / "sft_args.json").write_text(json.dumps({"model_type": "qwen-7b-chat"}))
    (out / "configuration.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"):
        (out / name).write_bytes(b"big")
    return out


@pytest.mark.parametrize("layout", ["peft", "swift", "swift-pickled", "swift-inner"])
def test_to_peft_always_makes_the_directory(adapter: Path, tmp_path, layout: str) -> None:
    original = read(adapter)
    source = adapter
    if layout != "peft":
        source = swift_layout(adapter, tmp_path / "checkpoint-5", pickled=layout == "swift-pickled")
        with pytest.raises(AdapterError, match="SWIFT's own layout"):
            read(source)
    else:
        (adapter / "optimizer.pt").write_bytes(b"big")
    out = to_peft(source / "default" if layout == "swift-inner" else source, tmp_path / "out")
    converted = read(out)
    assert converted.digest == read(to_peft(out, tmp_path / "again")).digest
    assert converted.config == original.config and converted.modules.keys() == original.modules.keys()
    for name, weights in original.modules.items():
        assert torch.equal(converted.modules[name].a, weights.a) and torch.equal(converted.modules[name].b, weights.b)
    names = {path.name for path in out.iterdir()}
    assert not names & {"optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", "default"}
    assert "swift_type" not in json.loads((out / CONFIG).read_text())
    if layout == "swift":
        assert {"sft_args.json", "configuration.json"} <= names


def test_converted_directory_works_in_peft(make_model, adapter: Path, tmp_path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model("qwen2")
    out = to_peft(swift_layout(adapter, tmp_path / "checkpoint-5"), tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        expected, got = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()(input_ids=ids).logits
            for path in (adapter, out)
        )
    assert torch.equal(got, expected)


def test_conversions_that_are_refused_write_nothing(adapter: Path, tmp_path, make_model) -> None:
    out = tmp_path / "results" / "out"
    two = swift_layout(adapter, tmp_path / "two")
    shutil.copytree(two / "default", two / "second")
    with pytest.raises(AdapterError, match=r"(?s)several adapters: default, second.*--ckpt_dir .*default"):
        to_peft(two, out)
    states = swift_layout(adapter, tmp_path / "states")
    (states / "extra_states").mkdir()
    with pytest.raises(AdapterError, match="extra_states"):
        to_peft(states, out)
    with pytest.raises(AdapterError, match=r"(?s)holds no adapter.*full model"):
        to_peft(make_model("qwen2"), out)
    with pytest.raises(AdapterError, match="no such directory"):
        to_peft(tmp_path / "nowhere", out)
    change_weights(adapter, drop_b)
    with pytest.raises(AdapterError, match="incomplete"):
        to_peft(adapter, out)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_existing_result_is_kept_unless_told(adapter: Path, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(SwiftError, match="exists already"):
        to_peft(adapter, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    to_peft(adapter, out, exist_ok=True)
    assert (out / WEIGHTS).is_file() and (out / "mine").read_text() == "keep"  # a folder with other things in it is not ours to empty
    (out / "stale").write_text("")
    to_peft(adapter, out, exist_ok=True)
    assert (out / WEIGHTS).is_file() and not (out / "stale").exists()  # an earlier result is
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
