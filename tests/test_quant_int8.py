"""Int8 linears: the product against double precision on the dequantized weight, and the engine against a dequantized stock model."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import kernel_builds
import pytest
import torch

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.int8 import Kernels, PanelInt8, PlainInt8, choose_int8, new_int8
from swiftlite.engine.request import SamplingParams
from swiftlite.errors import ModelError
from swiftlite.kernels import build as native
from swiftlite.quantize import packed
from swiftlite.quantize.rounding import round_to_nearest

HERE = native.load_library()
SHAPES = [(1, 2), (31, 8), (33, 64), (47, 130), (64, 1026), (2100, 96)]
INT8 = EngineConfig(quantization="int8")


@pytest.fixture(scope="module", params=["kernel", *kernel_builds.RUN, "torch"])
def kernels(request: pytest.FixtureRequest, older_kernels) -> Kernels | None:
    """The kernels of this machine, those of one with fewer instructions, and none."""
    if request.param == "torch":
        return None
    if HERE is None:
        pytest.skip("needs a C++ compiler")
    if request.param == "kernel":
        return Kernels(HERE)
    return Kernels(ctypes.CDLL(str(older_kernels("engine", request.param))))


def make(kernels: Kernels | None, n: int, k: int, seed: int = 0) -> tuple[PlainInt8 | PanelInt8, torch.Tensor]:
    """A weight with every integer from -128 to 127, and its value."""
    generator = torch.Generator().manual_seed(seed)
    q, scale = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8), torch.rand(n, generator=generator) / 99 + 1e-3
    weight = new_int8(kernels, n, k)
    for first in range(0, n, 1024):
        weight.put(first, q[first : first + 1024], scale[first : first + 1024])
    return weight, q * scale[:, None]


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (20, 15)])
def test_product_equals_double_precision_on_the_dequantized_weight(kernels: Kernels | None, n: int, k: int) -> None:
    torch.manual_seed(n + k)
    weight, dense = make(kernels, n, k)
    assert torch.equal(weight.to_dense(), dense)
    for rows in (0, 1, 2, 4, 7, 12, 13, 24, 31, 48, 100):
        for dtype, bias in ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)):
            x, add = torch.randn(1, rows, k).to(dtype), torch.randn(n).to(dtype) if bias else None
            ours, wanted = weight.multiply(x, add), x.double() @ dense.double().T + (0 if add is None else add.double())
            assert ours.shape == (1, rows, n) and ours.dtype == dtype
            rounding = 1e-5 if dtype == torch.float32 else 2**-7
            once = isinstance(weight, PanelInt8) and (rows <= 32 or weight.kernels.many(dtype == torch.bfloat16))
            near_zero = (
                1e-5 * k**0.5 if once or not rows else rounding * wanted.abs().max().item()
            )  # torch also rounds before scale and bias
            torch.testing.assert_close(ours.double(), wanted, rtol=rounding, atol=near_zero)


def test_rows_may_be_strided_and_do_not_change_each_other(kernels: Kernels | None) -> None:
    weight, _ = make(kernels, 40, 32)
    whole = torch.randn(2, 30, 96).bfloat16()
    for x in (whole[:1, :, 32:64], whole[:, :, :32], whole[0, :, 64:]):
        torch.testing.assert_close(weight.multiply(x, None), weight.multiply(x.contiguous(), None), rtol=0, atol=0)
    if kernels is not None:
        x = whole[:1, :, :32]
        together = weight.multiply(x, None)
        for row in (0, 11, 12, 29):
            assert torch.equal(weight.multiply(x[:, row : row + 1], None)[0, 0], together[0, row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_as_the_export_does(kernels: Kernels | None, dtype: torch.dtype) -> None:
    library = None if kernels is None else HERE
    for n, k in ((70, 130), (33, 48), (1500, 64), (5, 7)):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
        weight[1], weight[2], weight[3] = 0, weight[2] * 1e-30, weight[3] * 1e30
        q, scale = round_to_nearest(weight, 8, None)
        ours = choose_int8(library)(weight)
        assert isinstance(ours, PlainInt8 if library is None or k % 2 else PanelInt8)
        assert torch.equal(ours.rows(0, n), q) and torch.equal(ours.scale, scale[:, 0].float())


@pytest.mark.parametrize("widths", [(64, 32, 32), (32, 7), (40, 24)])
def test_parts_are_their_joined_weight(kernels: Kernels | None, widths: tuple[int, ...]) -> None:
    """Whether each begins a panel or not."""
    library = None if kernels is None else HERE
    parts = [torch.randn(width, 64).bfloat16() for width in widths]
    ours, joined = choose_int8(library)(*parts), choose_int8(library)(torch.cat(parts))
    assert torch.equal(ours.rows(0, sum(widths)), joined.rows(0, sum(widths))) and torch.equal(ours.scale, joined.scale)


def dequantized(base: Path):
    """The stock model with every linear, a tied head included, rounded to int8."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(packed.dequantize(*round_to_nearest(module.weight.detach(), 8, None)))
    return model


def greedy(model, prompt: list[int], count: int = 12) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


PROMPTS = [[5, 9, 30, 42, 7, 11, 80], [31, 4, 4, 17], list(range(10, 60))]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("library", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])  # a tied head and biases; none; fused projections of its own
def test_engine_with_adapters_equals_peft_on_the_dequantized_model(
    make_model, make_adapter, monkeypatch, family: str, library: bool
) -> None:
    from peft import PeftModel

    if not library:
        monkeypatch.setenv("SWIFTLITE_KERNELS", "0")
        native.load_library.cache_clear()
    base = make_model(family)
    adapter = make_adapter(base, 1)
    try:
        with Engine(base, INT8, dtype="float32", adapters={"a": str(adapter)}) as engine:
            plain = [type(m) for m in engine.runner.model.modules() if type(m) is torch.nn.Linear]
            assert len(plain) == (family == "qwen2")  # the tied head keeps its weight for the embedding
            outputs = engine.generate(PROMPTS * 2, PARAMS, adapter=["a"] * 3 + [None] * 3)
    finally:
        native.load_library.cache_clear()
    ours = [output.outputs[0].token_ids for output in outputs]
    assert ours[3:] == [greedy(dequantized(base), prompt) for prompt in PROMPTS]
    assert ours[:3] == [greedy(PeftModel.from_pretrained(dequantized(base), adapter).eval(), prompt) for prompt in PROMPTS]


def test_what_is_not_possible_is_refused(make_model) -> None:
    base = make_model("llama")
    with pytest.raises(ModelError, match=r"(?s)'int3' at load is not possible.*int8"):
        Engine(base, EngineConfig(quantization="int3"))
    with pytest.raises(ModelError, match="loaded already cannot be quantized"):
        Engine(base, INT8, model=dequantized(base))


def test_tiny_chat_still_answers_what_users_are_told_to_ask() -> None:
    import sys

    root = Path(__file__).parent.parent
    sys.path.insert(0, str(root / "scripts"))
    import build_tiny_chat as build

    from swiftlite.offline import LLM

    rows = json.loads(build.QUESTIONS.read_text("utf-8"))["must"]
    llm = LLM("tiny-chat", quantization="int8")
    try:
        history: list[list[dict[str, str]]] = [[] for _ in rows]
        ended = [False] * len(rows)
        for turn in range(max(len(row["ask"]) for row in rows)):
            live = [i for i, row in enumerate(rows) if turn < len(row["ask"])]
            for i in live:
                history[i].append({"role": "user", "content": rows[i]["ask"][turn]})
            outputs = llm.chat([history[i] for i in live], SamplingParams(temperature=0, max_tokens=64))
            for i, output in zip(live, outputs, strict=True):
                history[i].append({"role": "assistant", "content": output.outputs[0].text})
                ended[i] = output.outputs[0].finish_reason == "stop"
    finally:
        llm.shutdown()
    wrong = [row["ask"] for row, said, stop in zip(rows, history, ended, strict=True) if not build.right(row, said[-1]["content"], stop)]
    assert not wrong


def test_bench_measures_it(make_model, capsys, tmp_path: Path) -> None:
    from swiftlite.cli import main

    report = tmp_path / "bench.json"
    arguments = ["bench", "-m", str(make_model("llama")), "--batch_size", "2", "--input_output_len", "8,4", "--quant", "int8"]
    assert main([*arguments, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "[BENCHMARK]" in printed and "peak_mem(gb)" in printed
    measured = json.loads(report.read_text())
    assert measured["quantization"] == "int8" and measured["peak_memory_gb"] > 0
