"""The product with a low-rank part inside (kernels/lowrank.py) against double precision and against torch's way."""

from __future__ import annotations

import pytest
import torch

from swiftlite.kernels import lowrank
from swiftlite.train.adapted import LowRank, LowRankByKernel
from swiftlite.train.lora import LoraLinear

READY = lowrank.takes(torch.zeros(1, 32).bfloat16(), torch.zeros(32, 32).bfloat16())
pytestmark = pytest.mark.skipif(not READY, reason="this CPU has no bfloat16 matrix unit (AMX), or there is no compiler")

# rows, inputs, outputs, rank, bias: one block and many, of one tile of rows and two, panels that stay and that pass, inputs in pieces
SHAPES = [(1, 64, 96, 8, False), (5, 64, 32, 16, True), (17, 1024, 64, 16, False), (33, 96, 1024, 33, True), (300, 1024, 512, 16, True),
          (200, 3072, 256, 64, False), (1000, 320, 640, 16, True),
          (70, 8224, 96, 16, True), (33, 96, 12320, 16, False), (40, 12288, 64, 8, False)]  # fmt: skip


def case(rows: int, inputs: int, outputs: int, rank: int, bias: bool):
    torch.manual_seed(rows)
    x, g = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, outputs).bfloat16()
    weight, plus = (torch.randn(outputs, inputs) / inputs**0.5).bfloat16(), torch.randn(outputs).bfloat16() if bias else None
    return x, weight, plus, torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank), g


def passes(function, x, weight, bias, a, b, g):
    """y and the gradients of x, a and b."""
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    y = function(x, weight, bias, a, b, 1.5)
    y.backward(g)
    return y.detach(), x.grad, a.grad, b.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_double_precision_as_torch_does(shape):
    x, weight, bias, a, b, g = case(*shape)
    exact = passes(LowRank.apply, *(None if t is None else t.double() for t in (x, weight, bias, a, b, g)))
    torchs, ours = (passes(f.apply, x, weight, bias, a, b, g) for f in (LowRank, LowRankByKernel))
    for ours_, torchs_, exact_ in zip(ours, torchs, exact, strict=True):
        assert ours_.dtype == torchs_.dtype
        error, theirs = ((t.double() - exact_).abs().max() for t in (ours_, torchs_))
        assert error <= 1.1 * theirs + 1e-3 * exact_.abs().max()


def test_strided_rows_and_threads_change_nothing():
    x, weight, bias, a, b, _ = case(150, 256, 288, 16, True)
    low, up = x @ lowrank.widened(a).T, lowrank.widened(b.T)
    wanted = lowrank.multiply(x, weight, low, up, bias)
    wide = torch.randn(150, 300).bfloat16()
    wide[:, 7:263] = x
    assert torch.equal(lowrank.multiply(wide[:, 7:263], weight, low, up, bias), wanted)
    assert torch.equal(lowrank.multiply(x.T.contiguous().T, weight, low, up, bias), wanted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(lowrank.multiply(x, weight, low, up, bias), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("inputs, outputs, dtype", [(100, 64, torch.bfloat16), (64, 100, torch.bfloat16), (64, 64, torch.float32)])
def test_other_shapes_and_dtypes_go_through_torch(inputs, outputs, dtype):
    linear = LoraLinear(torch.nn.Linear(inputs, outputs).to(dtype).requires_grad_(False), 4, 1.0)
    assert not lowrank.takes(torch.zeros(3, inputs, dtype=dtype), linear.weight)
    assert linear(torch.randn(2, 3, inputs, dtype=dtype)).shape == (2, 3, outputs)


def test_an_adapted_linear_uses_it():
    linear = LoraLinear(torch.nn.Linear(64, 96).bfloat16().requires_grad_(False), 4, 1.0)
    y = linear(torch.randn(2, 3, 64).bfloat16().requires_grad_())
    assert y.shape == (2, 3, 96)
    assert "ByKernel" in type(y.grad_fn.next_functions[0][0]).__name__ or "ByKernel" in type(y.grad_fn).__name__


def test_a_gradient_may_be_one_number_for_all():
    x, weight, bias, a, b, _ = case(70, 256, 288, 16, True)
    one = torch.tensor(0.5).bfloat16().expand(70, 288)
    for ours, wanted in zip(
        passes(LowRankByKernel.apply, x, weight, bias, a, b, one), passes(LowRank.apply, x, weight, bias, a, b, one), strict=True
    ):
        torch.testing.assert_close(ours.float(), wanted.float(), rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_a_small_adapter_is_not_rounded_away():
    """An addition below half a unit of the result's last place is lost where both are rounded, and shows in the mean where the sum is."""
    x, weight, _, a, b, _ = case(400, 256, 320, 16, False)
    b = b * 1e-4
    added = (x.double() @ a.double().T) @ b.double().T * 1.5
    base = x.double() @ weight.double().T
    shares = [
        ((f.apply(x, weight, None, a, b, 1.5).double() - base) * added).sum() / (added * added).sum() for f in (LowRank, LowRankByKernel)
    ]
    assert abs(shares[1] - 1) < 0.5 < abs(shares[0] - 1)


def test_what_the_kernel_is_not_for():
    x, weight = torch.zeros(1, 64).bfloat16(), torch.zeros(32, 64).bfloat16()
    assert lowrank.takes(x, weight, torch.zeros(32).bfloat16())
    assert not lowrank.takes(x, weight, torch.zeros(32))
    assert not lowrank.takes(torch.zeros(1, 48).bfloat16(), torch.zeros(32, 48).bfloat16())
    assert not lowrank.takes(x[:0], weight)
