"""Names -> directories, offline: paths, the bundled model, both hubs' caches, and what the error says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from swiftlite.errors import HubError
from swiftlite.hub import TINY_CHAT, resolve_dataset, resolve_model
from swiftlite.models.catalog import MODELS


def resolve(name: str, kind: str = "model", **env: str) -> str:
    """In a process of its own: the hubs' clients read their environment once."""
    import os

    code = f"from swiftlite.hub import resolve_{kind} as resolve; print('GOT', resolve({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    return done.stdout + done.stderr


def test_paths_and_the_bundled_model(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("tiny-chat") == TINY_CHAT
    (tmp_path / "f").write_text("")
    with pytest.raises(HubError, match="is a file"):
        resolve_model(str(tmp_path / "f"))


@pytest.mark.parametrize("layout", ["hub/models/Qwen/Qwen2___5-0___5B-Instruct", "models/Qwen/Qwen2___5-0___5B-Instruct"])
def test_a_modelscope_cache(tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True)
    (tmp_path / layout / "config.json").write_text("{}")
    assert f"GOT {tmp_path / layout}" in resolve("qwen2_5-0_5b-instruct", MODELSCOPE_CACHE=str(tmp_path))


@pytest.mark.parametrize("layout", ["hub/datasets/some-org/rows", "datasets/some-org/rows", "datasets/some-org--rows/snapshots/master"])
def test_a_modelscope_dataset_cache(tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True)
    (tmp_path / layout / "train.jsonl").write_text("{}")
    assert f"GOT {tmp_path / layout}" in resolve("some-org/rows", "dataset", MODELSCOPE_CACHE=str(tmp_path))


def test_a_hugging_face_cache(tmp_path):
    repo = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / "config.json").write_text("{}")
    out = resolve("qwen3-0_6b", HF_HOME=str(tmp_path), MODELSCOPE_CACHE=str(tmp_path / "empty"))
    assert f"GOT {repo / 'snapshots' / 'abc'}" in out


def test_an_unknown_name_says_what_was_tried():
    with pytest.raises(HubError, match="did you mean 'qwen2_5-7b-instruct'"):
        resolve_model("qwen2_5-7b-instrct")
    with pytest.raises(HubError, match="no hub id"):
        resolve_dataset("missing.jsonl")


def test_the_names_of_the_guide_are_in_the_catalog():
    for name in ("qwen-7b-chat", "qwen-7b", "yi-6b-chat", "qwen1half-7b-chat-int4", "llama2-7b-chat", "chatglm3-6b", "llama3-8b-instruct"):
        assert all("/" in id for id in MODELS[name])
