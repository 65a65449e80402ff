"""Adapters as a part of the base's product: the same as the product and, behind it, what they add, rounded once less."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from swiftlite.engine import lora_native, lora_ops
from swiftlite.engine.lora_native import NativeJob, NativeLora
from swiftlite.engine.panels import Panels, PanelWeight
from swiftlite.kernels.build import load_library
from swiftlite.kernels.stages import Run

library = load_library()
pytestmark = pytest.mark.skipif(library is None or not library.swift_adapted_ready(), reason="needs a CPU with a matrix unit (AMX)")

WIDTH, OUTS = 96, (64, 32, 96)
RANKS = [(16, 16, 16), (1, 0, 3), (17, 40, 2), (0, 64, 0), (33, 5, 130)]  # of five adapters, each in a stack of its own


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.fixture(scope="module")
def stacks() -> list[lora_ops.Stack]:
    torch.manual_seed(0)
    found = []
    for ranks in RANKS:
        stack = lora_ops.Stack((lora_ops.GroupShape(WIDTH, OUTS, ranks),), torch.bfloat16, torch.device("cpu"))
        for part, (rank, out) in enumerate(zip(ranks, OUTS, strict=True)):
            if rank:
                stack.write(2, 0, part, random(rank, WIDTH) / 8, random(out, rank) / 8)
        found.append(stack)
    return found


def joined(stacks: list[lora_ops.Stack], segments: Iterable[tuple[int | None, int]]) -> tuple[NativeJob, list[lora_ops.Segment]]:
    rows: list[lora_ops.Segment] = [(None if index is None else stacks[index], 2, count) for index, count in segments]
    job = NativeJob(NativeLora(library, [(WIDTH, OUTS)]), rows)  # type: ignore[arg-type]
    assert job.joined == [True]
    return job, rows


CASES = [
    [(0, 64)],
    [(0, 20), (1, 13), (None, 40), (2, 9), (3, 1), (4, 50)],  # borders within blocks
    [(None, 33), (4, 70)],
    [(3, 65)],  # parts without any
    [(1, 9), (0, 9), (1, 9), (4, 9), (2, 9), (3, 9), (0, 9), (2, 9), (4, 1)],  # several in each block
    [(2, 100), (None, 300), (0, 8)],
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("segments", CASES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_product_with_the_adapters(stacks: list[lora_ops.Stack], segments: list, bias: bool, threads: int) -> None:
    torch.manual_seed(1)
    job, rows = joined(stacks, segments)
    total = sum(count for *_, count in rows)
    weight = random(sum(OUTS), WIDTH)
    packed, add = PanelWeight(Panels(library), weight), random(sum(OUTS)) if bias else None  # type: ignore[arg-type]
    x = random(1, total, WIDTH + 16)[..., :WIDTH]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = job.multiply(packed, add, 0, x)[0]
    finally:
        torch.set_num_threads(before)
    wanted = x[0].double() @ weight.double().T + (0 if add is None else add.double())
    first = 0
    for stack, slot, count in rows:
        for part, y in enumerate(wanted[first : first + count].split(OUTS, 1) if stack is not None else ()):
            a, b = stack.a[0], stack.b[0][part]
            if a is not None and b is not None:
                low = x[0, first : first + count].double() @ a[slot, stack.columns(0, part)].double().T
                y += low.bfloat16().double() @ b[slot].double()
        first += count
    torch.testing.assert_close(ours.double(), wanted, rtol=2**-7, atol=2e-2)
    plain, first = packed.multiply(x, add)[0], 0
    for stack, _, count in rows:
        same = torch.equal(ours[first : first + count], plain[first : first + count])
        assert same == (stack is None)  # rows without an adapter are the base's to the bit
        first += count


@pytest.mark.parametrize("segments", CASES, ids=str)
def test_a_gate_in_the_product_is_the_gate_after_it(stacks: list[lora_ops.Stack], segments: list) -> None:
    """silu(gate) * up, here of outputs [0, 96) and [96, 192), although parts lie otherwise."""
    torch.manual_seed(2)
    job, rows = joined(stacks, segments)
    total, half = sum(count for *_, count in rows), sum(OUTS) // 2
    packed, x = PanelWeight(Panels(library), random(2 * half, WIDTH)), random(1, total, WIDTH)  # type: ignore[arg-type]
    base = packed.stage(None)[1]
    stage = job.join(base, 0, gate=True)
    ours, product = torch.empty(total, half).bfloat16(), stage[1].product
    product.out, product.x, product.rows, product.stride = ours.data_ptr(), x.data_ptr(), total, WIDTH
    Run(library, [stage])()  # type: ignore[arg-type]
    gate, up = job.multiply(packed, None, 0, x)[0].split(half, -1)
    wanted = torch.nn.functional.silu(gate.float()).bfloat16() * up
    torch.testing.assert_close(ours, wanted, rtol=2**-6, atol=1e-2)


def test_rows_are_alone(stacks: list[lora_ops.Stack]) -> None:
    """What is in another row, and which adapter it has, changes no bit, and numbers that are none stay where they are."""
    torch.manual_seed(3)
    packed, x = PanelWeight(Panels(library), random(sum(OUTS), WIDTH)), random(1, 80, WIDTH)  # type: ignore[arg-type]
    first = joined(stacks, [(0, 37), (2, 43)])[0].multiply(packed, None, 0, x)[0]
    other = x.clone()
    other[0, 37:] = float("nan")
    second = joined(stacks, [(0, 37), (4, 43)])[0].multiply(packed, None, 0, other)[0]
    assert torch.equal(first[:37], second[:37]) and bool(second[37:].isnan().all())


def test_few_rows_of_many_adapters_come_behind_the_product(stacks: list[lora_ops.Stack]) -> None:
    """Decoding: a block's rows with an adapter each would be as many pieces."""
    owner = NativeLora(library, [(WIDTH, OUTS), (WIDTH, (24,)), (40, (64,))])  # type: ignore[arg-type]
    assert owner.joins == [True, False, False]  # panels are whole, and so are steps
    few = lora_native.JOINED_ROWS // 4
    alone = NativeLora(library, [(WIDTH, OUTS)])  # type: ignore[arg-type]
    assert not NativeJob(alone, [(stacks[i % 5], 2, 1) for i in range(2 * lora_native.JOINED_ROWS)]).joined[0]
    assert not NativeJob(alone, [(stacks[0], 2, few)]).joined[0]
