"""Weights that are packed while a start goes on are the ones that would be packed after it, to the bit, or none."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_runner import CPU, Item, Seq, prompts_for

from swiftlite.engine.ahead import Ahead, pack_ahead
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.panels import Panels, PanelWeight
from swiftlite.engine.runner import Runner
from swiftlite.kernels.build import load_library

library = load_library()
pytestmark = pytest.mark.skipif(library is None or not Panels(library).size(32, 32), reason="needs a compiler and a CPU with AVX512-BF16")


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory: pytest.TempPathFactory):
    """checkpoint(shards, **config) -> a model whose linears fill whole panels, stored in bfloat16."""

    def make(shards: int = 1, **config) -> Path:
        path = tmp_path_factory.mktemp("bf16")
        made = make_model("qwen3", **{"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 640, **config})
        shutil.copytree(made, path, dirs_exist_ok=True)
        weights = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
        if shards > 1:
            (path / "model.safetensors").unlink()
            place = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(weights)}
            for file in set(place.values()):
                save_file({name: weights[name] for name, to in place.items() if to == file}, path / file, {"format": "pt"})
            (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
        else:
            save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path

    return make


def begin(path: Path) -> Ahead:
    ahead = pack_ahead(path, "bfloat16", "cpu", None)
    assert ahead is not None
    return ahead


def logits(path: Path, ahead: Ahead | None) -> tuple[torch.Tensor, Runner]:
    runner = Runner(path, EngineConfig(num_blocks=50, block_size=4), torch.bfloat16, CPU, ahead=ahead)
    prompt = prompts_for(runner.vocab_size, [9])[0]
    return runner.execute([Item(Seq(prompt, [0, 1, 2]), 0, len(prompt))]), runner


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_the_same_to_the_bit(checkpoint, shards: int, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(shards, tie_word_embeddings=tied)
    wanted, _ = logits(path, None)
    ahead = begin(path)
    with monkeypatch.context() as patch:
        patch.setattr(PanelWeight, "_pack", lambda *_: pytest.fail("a weight was packed again"))
        got, runner = logits(path, ahead)
    assert torch.equal(got, wanted)
    layer = runner.model.model.layers[1]
    of_file = load_file(next(file for file in path.glob("*.safetensors") if "model.layers.1.mlp.down_proj.weight" in load_file(file)))
    assert torch.equal(layer.mlp.down_proj.packed.to_dense(), of_file["model.layers.1.mlp.down_proj.weight"])


def test_what_is_not_the_files_is_packed_as_ever(checkpoint) -> None:
    """Another tensor of the same numbers, a weight that was changed after it was loaded, and parts that lie otherwise."""
    path = checkpoint()
    ahead = begin(path)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    loaded = load_file(path / "model.safetensors")  # views of the mapped file
    q, k, v = (loaded[name] for name in names)
    assert ahead.take([q.clone()]) is None
    assert ahead.take([k, q]) is None and ahead.take([q, v]) is None
    if (panels := ahead.take([q, k, v])) is not None:  # safetensors may read instead of mapping
        assert torch.equal(panels, PanelWeight(Panels(library), q, k, v).data)  # type: ignore[arg-type]
    ahead.close()
    changed = begin(path)
    v += 1
    assert changed.take([v]) is None


@pytest.mark.parametrize("how", ["replaced", "written to", "gone"])
def test_files_that_change_meanwhile_are_not_believed(checkpoint, how: str) -> None:
    path = checkpoint()
    ahead, file = begin(path), path / "model.safetensors"
    (path / "copy").write_bytes(file.read_bytes())
    if how == "replaced":
        (path / "copy").replace(file)
    elif how == "written to":
        with open(file, "r+b") as opened:
            opened.seek(-1, 2)
            opened.write(b"?")
    else:
        file.unlink()
        (path / "copy").rename(file)
    weight = load_file(file)["model.layers.0.mlp.down_proj.weight"]
    assert ahead.take([weight]) is None
    ahead.close()


def test_a_model_that_cannot_be_loaded_ends_the_packing(checkpoint) -> None:
    from swiftlite import LLM
    from swiftlite.errors import ModelError

    path = checkpoint()
    (path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        LLM(str(path), dtype="bfloat16", device="cpu")
    assert not any(thread.name == "swiftlite-pack-ahead" for thread in threading.enumerate())


def test_what_nobody_takes_is_given_back(checkpoint) -> None:
    ahead = begin(checkpoint(hidden_size=512, intermediate_size=2048))
    ahead.close()
    page = 2048
    data = ahead._data[: len(ahead._data) // page * page]
    assert (data.view(-1, page) == 0).all(1).float().mean() > 0.9


def test_only_where_it_will_be_wanted(checkpoint, make_model) -> None:
    path = checkpoint()
    for dtype, device, quantization in (("float32", "cpu", None), ("bfloat16", "cuda", None), ("bfloat16", "cpu", "int8")):
        assert pack_ahead(path, dtype, device, quantization) is None
    other = begin(make_model("qwen3"))  # float32, so there is nothing to pack
    assert len(other._jobs) == 0
    other.close()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xff" * 40,
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b"not JSON!",
        *(
            len(text).to_bytes(8, "little") + text + bytes(64 * 64 * 2)
            for text in (
                json.dumps({"model.layers.0.mlp.up_proj.weight": entry}).encode()
                for entry in (
                    {"dtype": "BF16", "shape": [64, 64], "data_offsets": [8, 8200]},  # beyond the end
                    {"dtype": "BF16", "shape": [64, 64], "data_offsets": [-8192, 0]},
                    {"dtype": "BF16", "shape": [128, 64], "data_offsets": [0, 8192]},
                    {"dtype": "BF16", "shape": [-64, -64], "data_offsets": [0, 8192]},
                    {"dtype": "BF16", "shape": "64", "data_offsets": None},
                    {},
                )
            )
        ),
    ],
)
def test_broken_files_are_left_to_who_loads_them(broken: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(broken)
    assert pack_ahead(tmp_path, "auto", "auto", None) is None


def test_no_files_at_all(tmp_path: Path) -> None:
    assert pack_ahead(tmp_path, "auto", "auto", None) is None
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert pack_ahead(tmp_path, "auto", "auto", None) is None
