"""Each small step's C++ gradient equals autograd's through the stock arithmetic; fused training equals the stock model's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import kernel_builds
import pytest
import torch
from conftest import FAMILIES
from test_attention_native import needs_compiler
from test_fused import Norm
from torch import Tensor, nn
from torch.nn import functional as F

from swiftlite.data.store import Sample
from swiftlite.kernels.gradients import Gradients, gradients
from swiftlite.kernels.steps import Rotation
from swiftlite.models import attention_blocks, segments
from swiftlite.models.fused import fuse, unfuse
from swiftlite.models.loading import load_model
from swiftlite.options.parse import parse
from swiftlite.train.batches import collate
from swiftlite.train.build import fuse_steps
from swiftlite.train.lora import Lora, LoraSpec, TrainedCopy
from swiftlite.train.loss import Head, TargetLoss, chunked_nll

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=["here", *kernel_builds.RUN])
def kernels(request: pytest.FixtureRequest, older_kernels) -> Gradients:
    if request.param == "here":
        found = gradients()
        assert found is not None
        return found
    return Gradients(ctypes.CDLL(str(older_kernels("steps", request.param))))


def close(dtype: torch.dtype, scale: Tensor) -> dict:
    """Float32's rounding of a sum, or bfloat16's of its largest part."""
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2 * scale.abs().max().item()}


def compare(ours: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients against the same arithmetic in float64."""
    torch.manual_seed(9)
    mine = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, want = ours(*mine), exact(*wide)
    grad = torch.randn_like(out)
    out.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(out.double(), want, **close(inputs[0].dtype, want))
    for x, y in zip(mine, wide, strict=True):
        assert x.grad is not None and y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, **close(inputs[0].dtype, y.grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [7, 16, 50, 128])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_norm(kernels: Gradients, kind: int, dim: int, dtype: torch.dtype) -> None:
    module = Norm(dim, kind, 1e-3)
    weight = module.weight.detach().to(dtype)
    module.weight = nn.Parameter(weight.double(), requires_grad=False)

    def exact(x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return y * (module.weight + (1 if kind == 2 else 0))

    flat = torch.randn(1, 9, dim).to(dtype)
    heads = torch.randn(1, 9, 3 * dim).to(dtype)
    compare(lambda x: kernels.rms_norm(x, weight, 1e-3, kind), exact, flat)
    compare(lambda x: kernels.rms_norm(x.view(1, 9, 3, dim), weight, 1e-3, kind), lambda x: exact(x.view(1, 9, 3, dim)), heads)
    # one head's part of a wider row: strided
    compare(lambda x: kernels.rms_norm(x[..., dim : 2 * dim], weight, 1e-3, kind), lambda x: exact(x[..., dim : 2 * dim]), heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 5), (1, 40, 700)])
def test_gate(kernels: Gradients, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = 4 * torch.randn(shape), torch.randn(shape)
    gate[0, 0, :3] = torch.tensor([-200.0, 0.0, 200.0])
    compare(kernels.gate, lambda a, b: F.silu(a) * b, gate.to(dtype), up.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 32, 80])
def test_rotation(kernels: Gradients, dim: int, dtype: torch.dtype) -> None:
    cos, sin = (torch.randn(1, 11, dim).to(dtype) for _ in range(2))  # halves that differ: the transpose must be the true one
    x = torch.randn(1, 11, 3 * dim).to(dtype)

    def heads(x: Tensor) -> Tensor:
        return x.view(1, 11, 3, dim).transpose(1, 2)

    def exact(x: Tensor) -> Tensor:
        a, b = heads(x).chunk(2, -1)
        return heads(x) * cos.double()[:, None] + torch.cat((-b, a), -1) * sin.double()[:, None]

    compare(lambda x: kernels.rope(heads(x), cos, sin, Rotation(dim)), exact, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "offset", "window"), [(1, 1, 0, None), (5, 5, 0, None), (7, 40, 33, None), (20, 60, 40, 17), (3, 9, 6, 1)]
)
def test_softmax(kernels: Gradients, queries: int, keys: int, offset: int, window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = (3 * torch.randn(2, 3 * queries, keys)).to(dtype)
    at = offset + torch.arange(queries)[:, None] - torch.arange(keys)[None]
    hidden = ((at < 0) | (at >= window) if window else at < 0).repeat(3, 1)
    wide = scores.double().requires_grad_()
    want = torch.softmax((wide * 0.3).masked_fill(hidden, -torch.inf), -1)
    grad = torch.randn_like(scores)
    want.backward(grad.double())
    weights = kernels.softmax_(scores.clone(), queries, offset, window, 0.3)
    torch.testing.assert_close(weights.double(), want, **close(dtype, want))
    assert (weights[hidden.expand_as(weights)] == 0).all()
    back = kernels.softmax_back_(grad.clone(), weights, queries, offset, window, 0.3)
    assert wide.grad is not None
    torch.testing.assert_close(back.double(), wide.grad, **close(dtype, wide.grad))


def test_softmax_of_a_row_that_is_no_number(kernels: Gradients) -> None:
    scores = torch.zeros(1, 2, 20)
    scores[0, 1, 3] = torch.nan
    weights = kernels.softmax_(scores, 2, 18, None, 1.0)
    assert torch.isfinite(weights[0, 0]).all() and torch.isnan(weights[0, 1]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighed", [False, True])
def test_cross_entropy(kernels: Gradients, weighed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = (5 * torch.randn(6, 1003)).to(dtype), torch.randint(0, 1003, (6,))
    labels[0] = logits[0].argmax()
    logits[1, [3, 9]], labels[1] = 30, 9  # the first of equal ones is the argmax
    logits[2, [3, 9]], labels[2] = 30, 3
    factors = torch.rand(6) if weighed else None
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide, labels, reduction="none")
    (want * (factors.double() if factors is not None else 1)).sum().backward()
    grad = logits.clone()
    nll, hits = kernels.cross_entropy_(grad, labels, factors, back=True)
    torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=1e-5)
    assert hits.tolist()[:3] == [1, 0, 1]
    assert wide.grad is not None
    torch.testing.assert_close(grad.double(), wide.grad, **close(dtype, wide.grad))
    untouched = logits.clone()
    again, _ = kernels.cross_entropy_(untouched, labels, factors, back=False)
    assert torch.equal(again, nll) and torch.equal(untouched, logits)
    logits[4, 7] = torch.nan
    assert torch.isnan(kernels.cross_entropy_(logits, labels, None, back=False)[0]).tolist() == [False] * 4 + [True, False]


# ---- where they are used ----


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain torch code of attention and loss."""
    for module in ("swiftlite.models.attention_blocks", "swiftlite.train.loss"):
        monkeypatch.setattr(f"{module}.gradients", lambda: None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "window"), [(130, None), (300, None), (300, 70), (600, 200)])
def test_attention(tokens: int, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, tokens, 16).to(dtype) for heads in (4, 2, 2)]
    grad = torch.randn(2, 4, tokens, 16).to(dtype)

    def run() -> list[Tensor]:
        own = [x.clone().requires_grad_() for x in inputs]
        out = attention_blocks.attend(*own, 0.25, window, None)
        return [out.detach(), *torch.autograd.grad(out, own, grad)]

    mine = run()
    without(monkeypatch)
    for ours, theirs in zip(mine, run(), strict=True):
        torch.testing.assert_close(ours, theirs, **close(dtype, theirs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained_head", [False, True])
def test_loss(trained_head: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(24, 5000, bias=False).to(dtype).requires_grad_(trained_head)
    hidden, labels, weights = torch.randn(90, 24).to(dtype), torch.randint(0, 5000, (90,)), torch.rand(90)
    monkeypatch.setattr("swiftlite.train.loss.CHUNK_BYTES", 4 * 5000 * 40)  # three chunks

    def run() -> list[Tensor]:
        own = hidden.clone().requires_grad_()
        head.weight.grad = None
        nll, hits = chunked_nll(own, labels, Head(head, dtype), 0.0, weights)
        nll.backward()
        assert own.grad is not None
        return [nll.detach(), hits, own.grad, *([head.weight.grad] if head.weight.grad is not None else [])]

    mine = run()
    without(monkeypatch)
    theirs = run()
    assert len(mine) == len(theirs) == 3 + trained_head
    for ours, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, reference, **close(dtype, reference.float()))


def batch_of(lengths: list[int]):
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in lengths:
        mask = torch.ones(length, dtype=torch.bool).numpy()
        samples.append(Sample(torch.randint(3, 60, (length,), generator=generator).int().numpy(), mask))
    return collate(samples, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_a_family_equals_stock(family: str, make_model) -> None:
    """Loss and every adapter gradient of packed rows, in float32, with the fused steps and without."""
    model = load_model(make_model(family), torch.float32, torch.device("cpu"), segments.register())
    torch.manual_seed(0)
    lora = Lora(model, LoraSpec(4, 8.0))
    for _, parameter in lora.named_parameters():
        nn.init.normal_(parameter, std=0.05)
    batch = batch_of([40, 9, 70])

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = TargetLoss(model)(batch)
        loss.backward()
        grads = {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}
        for _, parameter in lora.named_parameters():
            parameter.grad = None
        return loss.detach(), grads

    model.train()
    want, theirs = run()
    found = gradients()
    assert found is not None
    done = fuse(model.eval(), found)
    model.train()
    got, mine = run()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item() + 1e-7)
    if family in ("llama", "qwen3"):
        assert done.norms and done.gates and done.rope
    unfuse(model)
    again, _ = run()
    assert torch.equal(again, want)


def test_a_trained_norm_is_left_to_torch(make_model) -> None:
    model = load_model(make_model("llama"), torch.float32, torch.device("cpu"), segments.register())
    lora = Lora(model, LoraSpec(4, 8.0, modules_to_save=("input_layernorm",)))
    found = gradients()
    assert found is not None
    done = fuse(model.eval(), found)
    inside = {id(m) for module in model.modules() if isinstance(module, TrainedCopy) for m in module.modules()}
    assert done.norms and not any(id(module) in inside for module in done.norms)
    model.train()
    TargetLoss(model)(batch_of([12]))[0].backward()
    for name, parameter in lora.named_parameters():
        if "input_layernorm" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("copied", ["embed_tokens", "mlp", "input_layernorm", "lm_head"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_module_trained_whole_beside_an_adapter(copied: str, dtype: torch.dtype, make_model) -> None:
    """Its copy is float32 whatever the base is, and neither it nor the rest is fused wrongly."""
    model = load_model(make_model("qwen2"), dtype, torch.device("cpu"), segments.register())
    lora = Lora(model, LoraSpec(4, 8.0, modules_to_save=(copied,)))
    fuse_steps(parse("sft", ["--model", "x", "--dataset", "y"]), model, lora)
    model.train()
    loss = TargetLoss(model)
    assert loss.onednn == (dtype == torch.bfloat16)
    loss(batch_of([12, 30]))[0].backward()
    grads = [p.grad for name, p in lora.named_parameters() if copied in name and "lora_" not in name]
    assert grads and all(grad is not None and grad.abs().max() > 0 for grad in grads)
    assert sum(getattr(vars(m).get("forward"), "fused", False) for m in model.modules()) >= 3


def test_checkpointing_recomputes_the_same(make_model: Callable[[str], Path]) -> None:
    grads = []
    for on in (False, True):
        model = load_model(make_model("qwen3"), torch.float32, torch.device("cpu"), segments.register())
        torch.manual_seed(0)
        lora = Lora(model, LoraSpec(4, 8.0))
        for _, parameter in lora.named_parameters():
            nn.init.normal_(parameter, std=0.05)
        found = gradients()
        assert found is not None
        fuse(model.eval(), found)
        model.train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        TargetLoss(model)(batch_of([30, 20]))[0].backward()
        grads.append({name: p.grad for name, p in lora.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name])
