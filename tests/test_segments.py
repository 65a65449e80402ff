"""Packed attention: a document's result does not depend on its neighbours, and equals the stock model's alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swiftlite.errors import ModelError
from swiftlite.models.attention_blocks import attend as blocks
from swiftlite.models.loading import load_model
from swiftlite.models.segments import attend, register
from swiftlite.train.batches import collate
from swiftlite.train.lora import Lora, LoraSpec
from swiftlite.train.loss import TargetLoss

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama_mqa", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "glm4", "olmo2", "granite"]


@dataclass
class Row:
    ids: np.ndarray
    mask: np.ndarray
    weights: None = None


def rows(*lengths: int, seed: int = 0) -> list[Row]:
    generator = np.random.default_rng(seed)
    return [Row(generator.integers(3, 300, n).astype(np.int32), np.arange(n) >= n // 3) for n in lengths]


def load(path):
    return load_model(path, torch.float32, CPU, register())


@pytest.mark.parametrize(
    ("family", "lengths"),
    [(family, (40, 7, 23)) for family in FAMILIES]  # 40 and 23 pass the windows of 16
    + [(family, (40, 7, 23, 5, 90, 38, 33, 2)) for family in ("llama", "qwen3", "gemma2", "mistral")],  # short ones side by side
)
def test_packed_equals_unpacked_and_stock(make_model, family, lengths):
    path = make_model(family)
    samples = rows(*lengths)
    torch.manual_seed(0)
    model = load(path)
    lora = Lora(model, LoraSpec(4, 8))
    for name, parameter in lora.named_parameters():  # B is zero at first, and would hide A's gradient
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    loss = TargetLoss(model)

    def gradients(groups: list[list[Row]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for group in groups:
            nll, _ = loss(collate(group, CPU))
            nll.backward()
            total += nll.item()
        return total, {name: p.grad.clone() for name, p in lora.named_parameters()}

    packed, packed_grads = gradients([samples])
    alone, alone_grads = gradients([[sample] for sample in samples])
    assert packed == pytest.approx(alone, rel=1e-6)
    for name, grad in packed_grads.items():
        torch.testing.assert_close(grad, alone_grads[name], rtol=1e-5, atol=1e-6 * max(1.0, alone_grads[name].abs().max().item()))

    reference = load_model(path, torch.float32, CPU, "eager")  # no adapter: compare with B = 0
    for name, parameter in lora.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.zero_()
    stock = 0.0
    for sample in samples:
        ids = torch.tensor(sample.ids.astype(np.int64))[None]
        logits = reference(input_ids=ids).logits[0, :-1].float()
        keep = torch.tensor(sample.mask[1:])
        stock += F.cross_entropy(logits[keep], ids[0, 1:][keep], reduction="sum").item()
    assert loss(collate(samples, CPU))[0].item() == pytest.approx(stock, rel=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("count", [2, 4])  # one by one, side by side
def test_first_document_never_changes_the_others(make_model, family, count):
    model = load(make_model(family))
    first, other, second, third, fourth = rows(19, 19, 30, 22, 17)

    def outputs(before: Row) -> torch.Tensor:
        batch = collate([before, second, third, fourth][:count], CPU)
        with torch.no_grad():
            body = model.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, swift_segments=batch.lengths
            )
        return body.last_hidden_state[0, batch.lengths[0] :]

    assert torch.equal(outputs(first), outputs(other))


def test_unknown_keyword_is_refused(make_model):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ModelError, match="s_aux"):
        attend(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(ModelError, match="mask"):
        attend(torch.nn.Module(), q, q, q, torch.zeros(1))


def test_collate_leaves_out_what_teaches_nothing():
    one = Row(np.array([5, 6, 7, 8, 9], np.int32), np.array([True, False, True, False, False]))
    two = Row(np.array([10, 11, 12], np.int32), np.array([False, True, True]))
    batch = collate([one, two], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 10, 11]]  # nothing after the last target's predecessor
    assert batch.position_ids.tolist() == [[0, 1, 0, 1]]
    assert batch.lengths == (2, 2)
    assert batch.keep.tolist() == [1, 2, 3]
    assert batch.labels.tolist() == [7, 11, 12]
    assert batch.tokens == 8


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("tokens", "heads", "groups"), [(3, 4, 2), (64, 2, 2), (150, 4, 1), (530, 2, 1)])
def test_blocks_equal_the_reference(tokens, heads, groups, softcap, window):
    """The CPU kernel against the masked reference path, values and gradients (530: weights are computed again)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, tokens, d, requires_grad=True) for n, d in ((heads, 8), (groups, 8), (groups, 6)))
    grad = torch.randn(1, heads, tokens, 6)

    def run(attention) -> list[torch.Tensor]:
        out = attention()
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    def reference() -> torch.Tensor:
        scores = q @ k.repeat_interleave(heads // groups, 1).transpose(2, 3) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
        seen = (distance >= 0) & (distance < (window or tokens))
        return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v.repeat_interleave(heads // groups, 1)

    for got, want in zip(run(lambda: blocks(q, k, v, 0.3, window, softcap)), run(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_blocks_gradcheck():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 5, 3, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    for window, softcap in ((None, None), (3, 2.0)):
        assert torch.autograd.gradcheck(lambda q, k, v, w=window, s=softcap: blocks(q, k, v, 0.5, w, s), (q, k, v))


def test_blocks_in_bfloat16_are_as_close_as_torch_s_own():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 90, 16, requires_grad=True) for n in (4, 2, 2))
    grad = torch.randn(1, 4, 90, 16)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wanted = [exact, *torch.autograd.grad(exact, (q, k, v), grad)]
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    out = blocks(*half, 0.25, None, None)
    for got, want in zip([out, *torch.autograd.grad(out, half, grad.bfloat16())], wanted, strict=True):
        assert (got.float() - want).norm() / want.norm() < 0.01


def test_bfloat16_products_over_float32_masters(make_model):
    """Full training under autocast: short and long documents, gradients close to float32's."""
    model = load(make_model("qwen3"))
    batch = collate(rows(150, 9, 40), CPU)

    def gradient(autocast: torch.dtype | None) -> torch.Tensor:
        model.zero_grad()
        TargetLoss(model, autocast)(batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, half = gradient(None), gradient(torch.bfloat16)  # the latter with oneDNN's rounded lengths
    assert half.dtype == torch.float32
    assert F.cosine_similarity(exact, half, dim=0) > 0.99
