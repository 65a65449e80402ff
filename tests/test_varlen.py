"""All packed documents in one kernel on a GPU. Without one, its wrapper is held against a torch twin of the kernel's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftlite.models import attention_varlen, segments

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; the wrapper is tested without one")
CASES = [((40, 7, 23), None), ((1,), None), ((5, 90, 33, 2), 16), ((64, 64), 1), ((30, 3), 500)]


def contract(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, *, scale: float | None,
    window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch.nn.attention.varlen.varlen_attn documents: q [T, H, D], k and v [T, G, D], window (left, right), -1 for no end."""
    assert ends_q.dtype == torch.int32 and ends_q[0] == 0 and ends_q[-1] == len(q) and torch.equal(ends_q, ends_k)
    assert max_q == max_k == ends_q.diff().max() and enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    outputs = []
    for start, end in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        repeats = q.shape[1] // k.shape[1]
        a, b, c = (x[start:end].transpose(0, 1) for x in (q, k, v))
        b, c = (x.repeat_interleave(repeats, 0) for x in (b, c))
        at = torch.arange(end - start)
        behind = at[:, None] - at[None]
        hidden = (behind < -right if right >= 0 else behind < -(10**9)) | (behind > left if left >= 0 else behind > 10**9)
        scores = (a @ b.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ c).transpose(0, 1))
    return torch.cat(outputs)


def inputs(tokens: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, heads, tokens, 16, generator=generator).to(device, dtype).requires_grad_() for heads in (4, 2, 2)]


def one_by_one(tensors: list[Tensor], lengths: tuple[int, ...], window: int | None) -> Tensor:
    """The reference: what dropout takes, with none."""
    parts = [x.split(lengths, 2) for x in tensors]
    return torch.cat([segments._segment(q, k, v, 0.3, 0.0, window, None) for q, k, v in zip(*parts, strict=True)], 2).transpose(1, 2)


@pytest.mark.parametrize(("lengths", "window"), CASES)
def test_the_wrapper_asks_for_what_the_reference_does(lengths, window, monkeypatch) -> None:
    monkeypatch.setattr(attention_varlen, "varlen_attn", contract)
    tensors = inputs(sum(lengths), "cpu", torch.float32)
    found, want = attention_varlen.attend(*tensors, lengths, 0.3, window), one_by_one(tensors, lengths, window)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(found, tensors, grad), torch.autograd.grad(want, tensors, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_where_the_kernel_does_not_run_it_is_said(capsys) -> None:
    assert not attention_varlen._works(torch.device("cpu"), torch.bfloat16, 16)
    assert "one by one" in capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize(("lengths", "window"), CASES)
def test_on_a_gpu(lengths, window) -> None:
    tensors = inputs(sum(lengths), "cuda", torch.bfloat16)
    assert attention_varlen.takes(tensors[0], tensors[2], 0.0, None)
    exact = [x.detach().double().cpu().requires_grad_() for x in tensors]
    found, want = attention_varlen.attend(*tensors, lengths, 0.3, window), one_by_one(exact, lengths, window)
    grad = torch.randn_like(want)
    pairs = zip((found, *torch.autograd.grad(found, tensors, grad.to(found))), (want, *torch.autograd.grad(want, exact, grad)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double().cpu(), b, rtol=0.05, atol=0.05)
