"""Memory in huge pages."""

from __future__ import annotations

import gc

import pytest
import torch

from swiftlite.pages import HUGE, zeros


@pytest.mark.parametrize("shape", [(0,), (3, 5), (HUGE // 2,), (3, HUGE // 2 + 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32])
def test_zeros_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    one, other = zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype)
    assert one.shape == shape and one.dtype == dtype and not one.any()
    if one.nbytes >= HUGE:
        assert one.data_ptr() % HUGE == 0
    one.fill_(1)
    gc.collect()
    assert not other.any() and one.view(-1)[-1:].sum() == one.view(-1)[-1:].numel()
