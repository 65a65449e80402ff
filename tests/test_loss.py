"""Chunked cross entropy against torch's own, value and gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swiftlite.models.loading import load_model
from swiftlite.models.segments import register
from swiftlite.train import loss as loss_module
from swiftlite.train.batches import collate
from swiftlite.train.lora import Lora, LoraSpec
from swiftlite.train.loss import Head, TargetLoss, chunked_nll, filler, rounded
from swiftlite.train.peft_lora import PeftLora, Variant
from tests.test_must_hold import Largest
from tests.test_segments import rows

CPU = torch.device("cpu")


def head_of(weight, *settings) -> Head:
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight)
    return Head(linear, *settings)


def reference(hidden, weight, labels, scale, softcap, smoothing=0.0):
    logits = scale * (hidden @ weight.T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize(
    ("scale", "softcap", "smoothing"),
    [(1.0, None, 0.0), (0.5, None, 0.0), (1.0, 5.0, 0.0), (0.3, 2.0, 0.0), (1.0, None, 0.1), (0.3, 2.0, 0.2)],
)
def test_equals_torch(monkeypatch, scale, softcap, smoothing, trained_head):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 16 * 4 * 101)  # 16 rows a chunk: several chunks and a rest
    torch.manual_seed(0)
    hidden = torch.randn(53, 24, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(101, 24) * 0.5, requires_grad=trained_head)
    labels = torch.randint(0, 101, (53,))
    want = reference(hidden, weight, labels, scale, softcap, smoothing)
    (want / 7).backward()
    wanted = [hidden.grad.clone(), weight.grad.clone() if trained_head else None]
    hidden.grad = weight.grad = None
    got, hits = chunked_nll(hidden, labels, head_of(weight, torch.float32, scale, softcap), smoothing)
    (got / 7).backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-5, atol=1e-6)
    assert (weight.grad is not None) == trained_head
    if trained_head:
        torch.testing.assert_close(weight.grad, wanted[1], rtol=1e-5, atol=1e-6)
    assert hits.item() == ((hidden @ weight.T).argmax(1) == labels).sum().item()


def test_gradcheck_in_double():
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(9, 6, dtype=torch.float64), requires_grad=False)
    labels = torch.randint(0, 9, (5,))
    assert torch.autograd.gradcheck(lambda h: chunked_nll(h, labels, head_of(weight, torch.float64, 0.7, 3.0))[0], (hidden,))


def test_loss_value_is_float32_in_bfloat16():
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 32).bfloat16(), torch.nn.Parameter(torch.randn(500, 32).bfloat16(), requires_grad=False)
    labels = torch.randint(0, 500, (300,))
    got, _ = chunked_nll(hidden.requires_grad_(), labels, head_of(weight, torch.bfloat16))
    want = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", {}), ("qwen2", {}), ("gemma2", {"final_logit_softcapping": 8.0}), ("granite", {})]
)
def test_heads_are_understood(make_model, family, overrides):
    """Soft caps and scales take the chunked path, and it gives the stock forward's loss."""
    model = load_model(make_model(family, **overrides), torch.float32, CPU, register())
    loss = TargetLoss(model)
    assert loss.head is not None
    batch = collate(rows(21, 9), CPU)
    chunked = loss(batch)
    loss.head = None
    stock = loss(batch)
    assert chunked[0].item() == pytest.approx(stock[0].item(), rel=1e-5)
    assert chunked[1].item() == stock[1].item()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_body_is_not_run_twice_to_check_a_head(make_model, family):
    """What the model's own call gave is taken where that call is ours; where it is another, ours is made."""
    model = load_model(make_model(family), torch.float32, CPU, register())
    loss, ids = TargetLoss(model), torch.arange(4)[None]
    body = model.base_model.forward
    with torch.no_grad():
        logits, hidden = loss._stock(ids)
        assert hidden is not None and torch.equal(hidden, loss._hidden(ids, ids, (4,)))
        torch.testing.assert_close(loss.head.logits(hidden), logits)
        own = model.forward
        model.forward = lambda **given: own(**given, output_router_logits=True)
        assert loss._stock(ids)[1] is None
        model.forward = lambda **given: own(**{**given, "input_ids": given["input_ids"].clone()})
        assert loss._stock(ids)[1] is None
    assert model.base_model.forward == body and not model.base_model._forward_hooks


HEADS = {  # family, config, what the adapter is: heads that are more than a product with a frozen weight
    "bias": ("phi", {}, None),
    "multiplier": ("falcon_h1", {}, None),
    "soft cap": ("recurrent_gemma", {}, None),
    "adapter": ("qwen3", {}, (LoraSpec(4, 8, target_modules=("q_proj", "lm_head")), None)),
    "DoRA": ("qwen3", {}, (LoraSpec(4, 8, target_modules=("q_proj", "lm_head")), Variant(use_dora=True))),
    "trained, through PEFT": ("gemma2", {"final_logit_softcapping": 8.0}, (LoraSpec(4, 8, modules_to_save=("lm_head",)), Variant(True))),
    "trained bias": ("phi", {}, "full"),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_other_heads_are_applied_in_chunks(make_model, monkeypatch, kind, smoothing):
    """The stock forward's loss and gradients, and never more than a chunk of logits in a forward pass."""
    family, settings, adapter = HEADS[kind]
    model = load_model(make_model(family, **settings), torch.float32, CPU, register())
    vocabulary = model.config.vocab_size
    model.requires_grad_(adapter == "full")
    if isinstance(adapter, tuple):
        tuner = Lora(model, adapter[0]) if adapter[1] is None else PeftLora(model, *adapter)
        torch.manual_seed(0)
        for _, parameter in tuner.named_parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
    elif adapter is None:
        model.get_input_embeddings().requires_grad_(True)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 16 * 4 * vocabulary)  # 16 rows
    loss = TargetLoss(model, smoothing=smoothing)
    assert loss.head is not None and loss.head.plain == (kind in ("multiplier", "soft cap"))
    batch = collate(rows(120, seed=3), CPU)
    batch = replace(batch, weights=torch.linspace(0.1, 2, batch.targets)) if smoothing else batch
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for head in (loss.head, None):
        loss.head = head
        model.zero_grad()
        nll, hits = loss.train()(batch)
        nll.backward()
        results.append((nll.item(), hits.item(), [p.grad.clone() if p.grad is not None else None for p in trained]))
        with Largest(vocabulary) as seen, torch.no_grad():
            value, _ = loss.eval()(batch)
        weight = model.config.hidden_size if kind == "DoRA" else 0  # it makes the head's weight anew
        assert 0 < seen.rows <= max(16, weight) < batch.targets
        assert smoothing or value.item() == pytest.approx(nll.item(), rel=1e-5)
    (mine, mine_hits, grads), (stock, stock_hits, wanted) = results
    assert mine == pytest.approx(stock, rel=1e-5) and mine_hits == stock_hits
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-5 * max(1.0, want.abs().max().item()))


def test_unknown_head_goes_through_the_stock_forward(make_model, monkeypatch):
    model = load_model(make_model("llama"), torch.float32, CPU, register())

    def squash(module, args, out):  # after the head, and announced by no config key
        out.logits = torch.tanh(out.logits)

    model.register_forward_hook(squash)
    loss = TargetLoss(model)
    assert loss.head is None
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 0)  # 16 rows of logits at a time in evaluation
    batch = collate(rows(40, 30), CPU)
    with torch.no_grad():
        value, hits = loss(batch)
    whole, whole_hits = loss(batch)
    assert batch.targets > 32 and value.item() == pytest.approx(whole.item(), rel=1e-5) and hits == whole_hits
    sample = rows(12)[0]
    nll, _ = loss(collate([sample], CPU))
    ids = torch.tensor(sample.ids.astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False, swift_segments=(12,)).logits[0, :-1]
    keep = torch.tensor(sample.mask[1:])
    assert nll.item() == pytest.approx(F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="sum").item(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 31, 33, 100, 500, 1000, 1025])
def test_filler_keeps_shapes_few(count):
    total = count + filler(count)
    assert count <= total <= count * 17 / 16
    assert total < 32 or total % (1 << total.bit_length() - 6) == 0


def test_rounding_for_onednn_changes_nothing(make_model):
    """bfloat16 on a CPU: a filler document and filler rows of the head leave loss and gradients as they are."""
    model = load_model(make_model("qwen3"), torch.bfloat16, CPU, register())
    loss = TargetLoss(model)
    assert loss.onednn
    batch = collate(rows(50, 21, 9, 66), CPU)
    assert rounded(batch).input_ids.shape[1] > batch.input_ids.shape[1]
    hidden = torch.randn(70, 48).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (70,))
    head = head_of(torch.randn(300, 48).bfloat16(), torch.bfloat16)
    chunked_nll(hidden, labels, head)[0].backward()
    got = [hidden.grad.float(), head.weight.grad.float()]
    exact, weight = hidden.detach().float().requires_grad_(), head.weight.detach().float().requires_grad_()
    F.cross_entropy(exact @ weight.T, labels, reduction="sum").backward()
    for mine, want in zip(got, (exact.grad, weight.grad), strict=True):
        assert (mine - want).norm() / want.norm() < 0.02
    value, hits = loss(batch)
    loss.onednn = False
    plain, plain_hits = loss(batch)
    assert value.item() == pytest.approx(plain.item(), rel=5e-3)
    assert abs(hits.item() - plain_hits.item()) <= 1
