"""Our LoRA against PEFT's: forward, gradients, files."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from swiftlite.errors import AdapterError, UsageError
from swiftlite.models.loading import load_model
from swiftlite.models.segments import register
from swiftlite.train.adapted import LowRank
from swiftlite.train.lora import Lora, LoraLinear, LoraSpec, TrainedCopy, select

CPU = torch.device("cpu")


def load(path):
    return load_model(path, torch.float32, CPU, register())


def randomise(lora: Lora, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in lora.named_parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_linear_equals_peft(bias, rslora):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias))
    net.requires_grad_(False)
    spec = LoraSpec(4, 6, use_rslora=rslora)
    mine = LoraLinear(net[0], 4, spec.scale)
    theirs = get_peft_model(torch.nn.Sequential(net[0]), LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_rslora=rslora))
    layer = theirs.base_model.model[0]
    torch.nn.init.normal_(mine.lora_B)
    layer.lora_A.default.weight.data.copy_(mine.lora_A.data)
    layer.lora_B.default.weight.data.copy_(mine.lora_B.data)
    x = torch.randn(2, 7, 12)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = mine(x1), theirs(x2)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(a)
    a.backward(grad)
    b.backward(grad)
    for got, want in [
        (x1.grad, x2.grad), (mine.lora_A.grad, layer.lora_A.default.weight.grad), (mine.lora_B.grad, layer.lora_B.default.weight.grad)
    ]:  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert mine.base.weight.grad is None


def test_gradcheck_in_double():
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 5), (2, 5), (4, 2)))
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: LowRank.apply(x, weight, bias, a, b, 0.5), (x, a, b))


def test_dropout_hits_only_the_adapter():
    torch.manual_seed(0)
    linear = LoraLinear(torch.nn.Linear(16, 16), 4, 1.0, dropout=0.5)
    x = torch.randn(3, 16)
    assert torch.equal(linear.train()(x), linear.base(x))  # B is zero
    torch.nn.init.normal_(linear.lora_B)
    assert not torch.equal(linear(x), linear(x))
    assert torch.equal(linear.eval()(x), linear(x))


def test_masters_are_float32_on_a_bfloat16_base():
    linear = LoraLinear(torch.nn.Linear(16, 8).bfloat16().requires_grad_(False), 4, 1.0)
    torch.nn.init.normal_(linear.lora_B)
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    y = linear(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert linear.lora_A.grad.dtype == linear.lora_B.grad.dtype == torch.float32
    want = x @ linear.base.weight.T + linear.base.bias + (x.float() @ linear.lora_A.T @ linear.lora_B.T)
    torch.testing.assert_close(y.float(), want.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(4, 8),
        LoraSpec(3, 5, use_rslora=True),
        LoraSpec(4, 8, target_modules=("q_proj", "v_proj"), modules_to_save=("lm_head",)),
        LoraSpec(4, 8, target_modules=(r".*layers\.[01]\.mlp\.(up|down)_proj",)),
        LoraSpec(4, 8, target_modules=("model.layers.1.self_attn.q_proj",), modules_to_save=("embed_tokens", "norm")),
    ],
    ids=["all", "rslora", "names+head", "regex", "one+embeddings"],
)
def test_saved_adapter_loads_in_peft_with_equal_logits(make_model, tmp_path, spec):
    from peft import PeftModel

    path = make_model("qwen3")
    lora = Lora(load(path), spec)
    randomise(lora)
    lora.save(tmp_path, str(path))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tmp_path).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        got, want = lora.model.eval()(input_ids=ids, use_cache=False, swift_segments=(ids.shape[1],)).logits, theirs(input_ids=ids).logits
        plain = load(path)(input_ids=ids, use_cache=False, swift_segments=(ids.shape[1],)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, plain, atol=1e-2)  # the adapter does something
    names = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if type(m).__module__.startswith("peft.tuners.lora") and n.endswith("proj")
    }
    assert names == set(lora.linears)

    again = Lora(load(path), LoraSpec.read(tmp_path))
    assert set(again.linears) == set(lora.linears)
    again.load(tmp_path)
    for key, tensor in again.tensors().items():
        assert torch.equal(tensor, lora.tensors()[key])


def test_peft_adapter_can_be_taken_over(make_model, make_adapter):
    from peft import PeftModel

    path = make_model("llama")
    adapter = make_adapter(path, 3)
    lora = Lora(load(path), LoraSpec.read(adapter))
    lora.load(adapter)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), adapter).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            lora.model.eval()(input_ids=ids, use_cache=False, swift_segments=(ids.shape[1],)).logits,
            theirs(input_ids=ids).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_all_linear_leaves_out_the_head(make_model):
    chosen = select(load(make_model("qwen2")), ("all-linear",))
    assert len(chosen) == 3 * 7
    assert "lm_head" not in chosen


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("q_prj",), "q_proj"), ((r".*\.nothing\d",), "matches no"), (("(",), "regular expression"), (("norm",), "no linear")],
)
def test_wrong_targets_are_explained(make_model, targets, message):
    with pytest.raises(UsageError, match=message):
        select(load(make_model("llama")), targets)


def test_adapter_of_another_base_is_refused(make_model, make_adapter):
    adapter = make_adapter(make_model("llama"))
    other = make_model("llama", hidden_size=96, head_dim=24)
    lora = Lora(load(other), LoraSpec.read(adapter))
    with pytest.raises(AdapterError, match=r"\(48, 4\), this model needs \(96, 4\)"):
        lora.load(adapter)


def test_unusual_adapters_are_refused(make_model, make_adapter):
    adapter = make_adapter(make_model("llama"), use_dora=True)
    with pytest.raises(AdapterError, match="use_dora"):
        LoraSpec.read(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_dora"]


def test_modules_to_save_are_float32_copies(make_model):
    model = load_model(make_model("llama"), torch.bfloat16, CPU, register())
    lora = Lora(model, LoraSpec(2, 4, modules_to_save=("lm_head",)))
    assert isinstance(model.lm_head, TrainedCopy)
    assert model.lm_head.whole.weight.dtype == torch.float32
    out = model(input_ids=torch.arange(3, 9)[None], use_cache=False, swift_segments=(6,)).logits
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert lora.copies["lm_head"].whole.weight.grad is not None
    assert all(p.dtype == torch.float32 for _, p in lora.named_parameters())
