"""The C++ kernel equals torch's paged attention: every geometry, option, dtype and thread count; and how it is built."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import kernel_builds
import pytest
import torch
from conftest import FAMILIES
from test_attention_cpu import CPU, GEOMETRIES, make_case
from test_runner import generate, make_runner, prompts_for

from swiftlite.engine.attention_cpu import SequenceSlice, paged_attention
from swiftlite.engine.attention_native import NativeBatch
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.engine.panels import choose_pack
from swiftlite.engine.runner import Runner
from swiftlite.kernels import build as native

needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")

SHAPES = [(0, 1), (0, 7), (30, 1), (13, 20), (0, 150), (100, 1), (5, 3), (64, 65), (700, 1), (0, 64)]
MORE = {
    **{"d64": (8, 2, 64, 64), "d128": (4, 2, 128, 128), "mla192": (2, 2, 192, 128), "d32": (7, 7, 32, 32)},
    **{
        "d96 mqa": (12, 1, 96, 96),
        "7 heads": (14, 2, 64, 64),
        "8 heads": (64, 8, 128, 128),
        "16 heads": (32, 2, 64, 32),
        "20 heads": (20, 1, 64, 64),
    },
}


def run_native(q, cache, slices, layer, library=None) -> torch.Tensor:
    """Attend with everything already stored."""
    library = library or native.load_library()
    assert library is not None
    slots = torch.full((q.shape[0],), -1)
    k = torch.zeros(layer.kv_heads, q.shape[0], layer.head_dim, dtype=q.dtype)
    v = torch.zeros(layer.kv_heads, q.shape[0], layer.value_dim, dtype=q.dtype)
    return NativeBatch(library, cache, slots, slices).attend(layer, q.transpose(0, 1), k, v)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 2.0), (130, 5.0)])
@pytest.mark.parametrize("geometry", {**GEOMETRIES, **MORE})
def test_equals_the_textbook_and_torch(geometry: str, window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, value_dim = {**GEOMETRIES, **MORE}[geometry]
    layer = AttentionLayer(0, "test", heads, kv_heads, head_dim, value_dim, head_dim**-0.5, window, softcap)
    q, cache, slices, expected = make_case(layer, SHAPES, 16, dtype)
    out = run_native(q, cache, slices, layer)
    assert out.dtype == dtype and out.shape == (q.shape[0], heads, value_dim)
    exact = dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, **({"rtol": 2e-5, "atol": 2e-5} if exact else {"rtol": 2e-2, "atol": 2e-2}))
    reference = paged_attention(q, cache.keys[0], cache.values[0], slices, layer)
    torch.testing.assert_close(out, reference, **({"rtol": 2e-5, "atol": 2e-5} if exact else {"rtol": 3e-2, "atol": 3e-2}))


@pytest.fixture(scope="module", params=kernel_builds.RUN)
def older(request: pytest.FixtureRequest, older_kernels) -> Path:
    """The library as a machine with fewer instructions builds it."""
    return older_kernels("engine", request.param)


@needs_compiler
@pytest.mark.skipif(not kernel_builds.X86, reason="flags of x86 compilers")
@pytest.mark.parametrize("name", kernel_builds.COMPILE)
@pytest.mark.parametrize("library", native.LIBRARIES)
def test_every_generation_of_cpus_can_build_the_kernels(library: str, name: str, tmp_path: Path) -> None:
    assert native.build(library, tmp_path, kernel_builds.COMPILE[name]).is_file()


@needs_compiler
def test_with_fewer_instructions_the_results_are_the_same(older: Path) -> None:
    library = ctypes.CDLL(str(older))
    for dtype in (torch.float32, torch.bfloat16):
        for window, softcap in ((None, None), (40, 5.0)):
            layer = AttentionLayer(0, "test", 6, 2, 64, 32, 0.125, window, softcap)
            q, cache, slices, expected = make_case(layer, SHAPES, 16, dtype)
            tolerance = 2e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(run_native(q, cache, slices, layer, library).double(), expected, rtol=tolerance, atol=tolerance)
    assert choose_pack(library, torch.bfloat16)(torch.randn(8, 16).bfloat16()).multiply(torch.randn(3, 16).bfloat16(), None).shape == (3, 8)


@needs_compiler
def test_same_result_for_any_thread_count_up_to_splits() -> None:
    layer = AttentionLayer(0, "test", 2, 1, 64, 64, 0.125)
    q, cache, slices, expected = make_case(layer, [(3000, 1)], 16, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(run_native(q, cache, slices, layer).double(), expected, rtol=2e-5, atol=2e-5)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store(dtype: torch.dtype) -> None:
    """K and V land where kv.py would put them, from strided tensors, slot -1 skipped; rows of no sequence are zeros."""
    layer = AttentionLayer(0, "test", 4, 2, 12, 8, 1.0)
    caches = [KVCache([layer], 6, 4, dtype, CPU) for _ in range(2)]
    fused = torch.randn(5, 2 * 12 + 2 * 8 + 3).to(dtype)  # as a fused product leaves them
    k, v = fused[:, :24].view(5, 2, 12), fused[:, 24:40].view(5, 2, 8)
    slots = torch.tensor([3, -1, 22, 8, -1])
    caches[0].store(0, k, v, slots)
    q = torch.randn(4, 5, 12).to(dtype)
    batch = NativeBatch(native.load_library(), caches[1], slots, [SequenceSlice(2, 1, 2, [5])])
    out = batch.attend(layer, q, k.transpose(0, 1), v.transpose(0, 1))
    assert torch.equal(caches[0].keys[0], caches[1].keys[0]) and torch.equal(caches[0].values[0], caches[1].values[0])
    assert not out[[0, 1, 3, 4]].any() and out[2].any()


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_same_tokens_with_and_without_kernels(family: str, make_model) -> None:
    path = make_model(family)
    fast, plain = make_runner(path), Runner(path, EngineConfig(num_blocks=160, block_size=4), torch.float32, CPU, plain=True)
    assert fast.bridge.library is not None and plain.bridge.library is None
    prompts = prompts_for(fast.vocab_size, [37, 5, 1, 21])
    assert generate(fast, prompts, [7, 2, 1, 30], arrive=1) == generate(plain, prompts, [7, 2, 1, 30], arrive=1)


# ---- building ----


@needs_compiler
def test_built_once_and_found_again(tmp_path: Path) -> None:
    first = native.build("engine", tmp_path, kernel_builds.AVX2)
    stamp = first.stat().st_mtime_ns
    assert native.build("engine", tmp_path, kernel_builds.AVX2) == first and first.stat().st_mtime_ns == stamp
    assert os.listdir(tmp_path) == [first.name]  # nothing else is left behind


def forget() -> None:
    native.load_library.cache_clear()
    native._none.cache_clear()


def test_without_a_compiler_torch_takes_over(monkeypatch, capsys, make_model) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    forget()
    try:
        assert native.load_library() is None
        assert "no C++ compiler" in capsys.readouterr().out
        assert make_runner(make_model("llama")).bridge.library is None
    finally:
        forget()


def test_a_compiler_that_fails_is_named(monkeypatch, capsys, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'fatal error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    try:
        assert native.load_library() is None
        assert "no such header" in capsys.readouterr().out
        assert not list((tmp_path / "cache").rglob("*.so"))
    finally:
        forget()


def test_a_directory_others_can_write_is_not_used(monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "swiftlite" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(native.Unavailable, match="written by others"):
        native.cache_directory()
