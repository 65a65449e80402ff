"""Attention within documents on the matrix unit (kernels/segments.py) against double precision and against torch's way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftlite.kernels import segments as kernel
from swiftlite.kernels import unit
from swiftlite.models import segments

pytestmark = pytest.mark.skipif(unit.library() is None, reason="this CPU has no bfloat16 matrix unit (AMX), or there is no compiler")

# heads, KV heads, dims of keys and values, lengths, window: whole blocks, one more, one less, single tokens, several blocks behind a window
CASES = [
    (4, 2, 64, 64, (5, 33, 64, 1, 130), None),
    (16, 8, 128, 128, (150, 97, 32, 31), None),
    (4, 4, 192, 128, (77, 65), None),
    (14, 2, 64, 64, (1100,), None),
    (8, 2, 32, 96, (40, 70, 1), 9),
    (6, 1, 64, 64, (300, 12, 3), 40),
    (4, 2, 64, 64, (500, 100), 100),
    (2, 2, 32, 32, (64, 33), 1),
    (2, 2, 32, 32, (96,), 5000),
]


def case(heads: int, kv_heads: int, dim: int, value_dim: int, tokens: int) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(1, tokens, n, d).bfloat16() for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))]


def passes(attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The result and the gradients of q, k and v; each [1, T, heads, dim]."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*(x.transpose(1, 2) for x in leaves))
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def torchs(lengths: tuple[int, ...], scale: float, window: int | None):
    """One document after the other, a mask for what is hidden."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        outputs = []
        for one in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
            distance = torch.arange(one[0].shape[2])[:, None] - torch.arange(one[0].shape[2])
            hidden = (distance < 0) | (distance >= (window or len(distance)))
            scores = (one[0] @ one[1].transpose(2, 3) * scale).masked_fill(hidden, float("-inf"))
            outputs.append(torch.softmax(scores, -1) @ one[2])
        return torch.cat(outputs, 2).transpose(1, 2)

    return attend


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_equals_double_precision_as_torch_does(shape):
    heads, kv_heads, dim, value_dim, lengths, window = shape
    data, scale = case(heads, kv_heads, dim, value_dim, sum(lengths)), dim**-0.5
    exact = passes(torchs(lengths, scale, window), *(x.double() for x in data))
    theirs = passes(torchs(lengths, scale, window), *data)
    ours = passes(lambda q, k, v: kernel.attend(q, k, v, lengths, scale, window), *data)
    for name, our, their, right in zip("oqkv", ours, theirs, exact, strict=True):
        assert our.dtype == torch.bfloat16 and our.shape == right.shape
        error, allowed = ((x.double() - right).abs().max() for x in (our, their))
        assert error <= 1.1 * allowed + 1e-3 * right.abs().max() + 1e-5, name


def test_large_scores():
    """Softmax of scores in the hundreds is finite; what is hidden may be larger still."""
    q, k, v, grad = case(2, 2, 32, 32, 70)
    lengths = (38, 32)
    exact = passes(torchs(lengths, 4.0, None), *((x * s).double() for x, s in zip((q, k, v, grad), (4, 4, 1, 1), strict=True)))
    ours = passes(lambda *x: kernel.attend(*x, lengths, 4.0, None), q * 4, k * 4, v, grad)
    for our, right in zip(ours, exact, strict=True):
        assert torch.isfinite(our).all()
        torch.testing.assert_close(our.double(), right, atol=2e-2 * right.abs().max().item(), rtol=2e-2)


def test_neighbours_strides_and_threads_change_nothing():
    lengths = (50, 7, 100)
    q, k, v, grad = case(4, 2, 64, 64, sum(lengths))
    run = lambda *x: kernel.attend(*x, lengths, 0.2, 30)  # noqa: E731
    wanted = passes(run, q, k, v, grad)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = passes(run, q, k, v, grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(wanted, alone, strict=True))
    # as one projection gives all three: rows far apart, and heads that do not begin at its first
    joined = torch.cat((q, k, v), 2)
    parts = passes(run, *joined.split((4, 2, 2), 2), grad)
    assert all(torch.equal(x, y) for x, y in zip(wanted, parts, strict=True))
    # what a neighbour holds reaches nobody, not even as 0 * inf
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        x[:, 50:57] = float("inf")
    among = passes(run, *spoiled, grad)
    for x, y in zip(wanted, among, strict=True):
        assert torch.equal(x[:, :50], y[:, :50]) and torch.equal(x[:, 57:], y[:, 57:])


def test_a_model_s_attention_takes_it(monkeypatch):
    module = torch.nn.Identity()
    q, k, v, _ = (x.transpose(1, 2) for x in case(4, 2, 64, 64, 90))
    calls = []
    monkeypatch.setattr(kernel, "_run", lambda args, back, run=kernel._run: (calls.append(back), run(args, back=back)))
    ours, _ = segments.attend(module, q, k, v, None, swift_segments=(40, 50))
    assert calls == [False]
    for settings in ({"dropout": 0.5}, {"softcap": 20.0}, {"scaling": -1.0}):
        segments.attend(module, q, k, v, None, swift_segments=(40, 50), **settings)
    segments.attend(module, q.float(), k.float(), v.float(), None, swift_segments=(40, 50))
    assert calls == [False]
    monkeypatch.setattr(kernel, "takes", lambda *_: False)
    torchs_way, _ = segments.attend(module, q, k, v, None, swift_segments=(40, 50))
    torch.testing.assert_close(ours, torchs_way, atol=2e-2, rtol=2e-2)


def test_what_it_takes():
    q, k, v, _ = (x.transpose(1, 2) for x in case(4, 2, 64, 64, 8))
    assert kernel.takes(q, k, v, (8,) * torch.get_num_threads(), 0.1)
    assert not kernel.takes(q.half(), k, v, (8,) * 8, 0.1)
    assert not kernel.takes(q[..., :48], k[..., :48], v, (8,) * 8, 0.1)
    assert not kernel.takes(torch.cat((q, q)), torch.cat((k, k)), torch.cat((v, v)), (8,) * 8, 0.1)
    assert not kernel.takes(q, k, v, (), 0.1)
    one = (x[:, :1] for x in (q, k, v))  # its one long document would be one thread's work
    assert not kernel.takes(*one, (500, *(10,) * 30), 0.1) or torch.get_num_threads() == 1
