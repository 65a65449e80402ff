"""The product with weights in panels equals torch's in double precision, whatever the shape, the stride and the threads."""

from __future__ import annotations

import pytest
import torch

from swiftlite.engine.panels import Panels, PanelWeight, choose_pack
from swiftlite.kernels.build import load_library
from swiftlite.kernels.stages import Run
from swiftlite.kernels.steps import Activation, Kernels
from swiftlite.models.packed import OneDnnWeight

library = load_library()
pytestmark = pytest.mark.skipif(library is None or not Panels(library).size(1, 2), reason="needs a compiler and a CPU with AVX512-BF16")


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 12, 13, 24, 31, 33, 100, 300])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (31, 8), (32, 64), (47, 130), (50, 1026), (256, 4096), (70, 320)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_double_precision(panels: Panels, rows: int, n: int, k: int, bias: bool) -> None:
    torch.manual_seed(rows + n + k)
    weight, x = torch.randn(n, k).bfloat16(), torch.randn(1, rows, k).bfloat16()
    add = torch.randn(n).bfloat16() if bias else None
    ours = PanelWeight(panels, weight).multiply(x, add)
    wanted = x.double() @ weight.double().T + (0 if add is None else add.double())
    assert ours.shape == (1, rows, n)
    torch.testing.assert_close(ours.double(), wanted, rtol=2**-7, atol=1e-4 * k**0.5)


def test_rows_may_be_strided(panels: Panels) -> None:
    whole = torch.randn(2, 9, 96).bfloat16()
    weight = PanelWeight(panels, torch.randn(40, 32).bfloat16())
    for x in (whole[:1, :, 32:64], whole[:, :, :32], whole[0, :, 64:], whole[:1].transpose(1, 2)[:, :9, :9].repeat(1, 1, 4)[..., :32]):
        torch.testing.assert_close(weight.multiply(x, None), weight.multiply(x.contiguous(), None), rtol=0, atol=0)


def test_threads_do_not_change_a_bit(panels: Panels) -> None:
    weight, x = PanelWeight(panels, torch.randn(500, 512).bfloat16()), torch.randn(1, 33, 512).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(weight.multiply(x, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rows_do_not_change_each_other(panels: Panels) -> None:
    """A row's product is the same to the bit in any batch: what a request says does not depend on its neighbours."""
    weight, x = PanelWeight(panels, torch.randn(96, 256).bfloat16()), torch.randn(1, 40, 256).bfloat16()
    whole = weight.multiply(x, None)
    for row in (0, 11, 12, 39):
        assert torch.equal(weight.multiply(x[:, row : row + 1], None)[0, 0], whole[0, row])


def test_the_way_back(panels: Panels) -> None:
    for n, k in ((1, 2), (45, 130), (64, 64)):
        weight = torch.randn(n, k).bfloat16()
        assert torch.equal(PanelWeight(panels, weight).to_dense(), weight)


@pytest.mark.parametrize("rows", [(64, 32, 32), (32, 7), (40, 32), (5, 6, 7)])
def test_weights_below_each_other_are_as_one(panels: Panels, rows: tuple[int, ...]) -> None:
    """Whether each begins a panel or not."""
    weights = [torch.randn(n, 48).bfloat16() for n in rows]
    ours, whole = PanelWeight(panels, *weights), PanelWeight(panels, torch.cat(weights))
    assert ours.data.shape == whole.data.shape and torch.equal(ours.to_dense(), torch.cat(weights))
    x = torch.randn(1, 3, 48).bfloat16()
    assert torch.equal(ours.multiply(x, None), whole.multiply(x, None))


def test_what_has_no_panels_goes_to_onednn() -> None:
    pack = choose_pack(library, torch.bfloat16)
    assert isinstance(pack(torch.randn(8, 16).bfloat16()), PanelWeight) and isinstance(pack(torch.randn(8, 15).bfloat16()), OneDnnWeight)
    assert choose_pack(library, torch.float32) is OneDnnWeight and choose_pack(None, torch.bfloat16) is OneDnnWeight


@pytest.mark.parametrize("rows", [0, 3, 4, 17, 33, 300])
@pytest.mark.parametrize(("width", "k"), [(32, 64), (96, 320), (1024, 1024)])
@pytest.mark.parametrize(("bias", "activation"), [(False, Activation.SILU), (True, Activation.SILU), (True, Activation.GELU_TANH)])
def test_a_gate_in_the_product_is_the_gate_after_it(
    panels: Panels, rows: int, width: int, k: int, bias: bool, activation: Activation
) -> None:
    """To the bit."""
    torch.manual_seed(rows + width)
    weight = PanelWeight(panels, torch.randn(2 * width, k).bfloat16())
    x, add = torch.randn(1, rows, k).bfloat16() * 3 / k**0.5, torch.randn(2 * width).bfloat16() if bias else None
    ours, stage = torch.empty(1, rows, width).bfloat16(), weight.gated(add, activation)
    assert stage is not None
    stage[1].x, stage[1].out, stage[1].rows, stage[1].stride = x.data_ptr(), ours.data_ptr(), rows, k
    Run(panels.library, [stage])()
    gate, up = weight.multiply(x, add).split(width, -1)
    steps = load_library("steps")
    assert steps is not None
    assert torch.equal(ours, Kernels(steps).gate(gate, up, activation))


def test_a_half_that_ends_within_a_panel_is_not_done_in_the_product(panels: Panels) -> None:
    assert PanelWeight(panels, torch.randn(48, 64).bfloat16()).gated(None, Activation.SILU) is None
