"""A watched folder: whole adapters appear within a second, half ones never, removed ones drain; a server shows them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from test_engine import wait_until

from swiftlite.adapters.watch import CALM, Watcher, scan
from swiftlite.commands.serving import load_service, make_plan, runtime_adapters, watched
from swiftlite.errors import AdapterError, UsageError
from swiftlite.options.parse import parse


@pytest.fixture(scope="module")
def model_dir(make_model) -> Path:
    return make_model("llama")


@pytest.fixture(scope="module")
def adapter(model_dir, make_adapter) -> Path:
    return make_adapter(model_dir, 1)


class Seen:
    """A watcher's calls."""

    def __init__(self, root: Path) -> None:
        self.calls: list[str] = []
        self.lines: list[str] = []
        self.refuse: set[str] = set()
        self.watcher = Watcher(root, self.add, lambda name: self.calls.append(f"-{name}"), self.lines.append)

    def add(self, name: str, path: Path) -> None:
        if name in self.refuse:
            raise AdapterError("broken", "for the test")
        self.calls.append(f"+{name}")

    def looks(self, count: int = 1) -> list[str]:
        self.calls.clear()
        for _ in range(count):
            self.watcher.look()
        return list(self.calls)


def aged(path: Path) -> Path:
    """As if it was written long ago."""
    for file in path.iterdir():
        os.utime(file, (time.time() - 10 * CALM,) * 2)
    return path


def test_names_of_folders_and_runs(adapter, tmp_path) -> None:
    for place in (
        "mine",
        "run/tiny-chat/v0-20261120-101010/checkpoint-50",
        "run/tiny-chat/v1-20261120-111111/checkpoint-7",
        "plain/checkpoint-3",
    ):
        shutil.copytree(adapter, tmp_path / place)
    shutil.copytree(adapter, tmp_path / "run/tiny-chat/v1-20261120-111111/.checkpoint-9.123")  # being written
    (tmp_path / "mine" / "inner").mkdir()
    (tmp_path / "file").write_text("x")
    assert sorted(scan(tmp_path)) == ["mine", "plain-checkpoint-3", "run-tiny-chat-v0-checkpoint-50", "run-tiny-chat-v1-checkpoint-7"]


def test_new_changed_and_removed(adapter, tmp_path) -> None:
    aged(Path(shutil.copytree(adapter, tmp_path / "old")))
    seen = Seen(tmp_path)
    assert seen.looks() == ["+old"]
    shutil.copytree(adapter, tmp_path / "new")
    os.utime(tmp_path / "new" / "adapter_config.json")
    assert seen.looks() == [] and seen.looks() == ["+new"] and seen.looks(3) == []
    os.utime(tmp_path / "old" / "adapter_model.safetensors")
    assert seen.looks() == [] and seen.looks() == ["+old"]
    shutil.rmtree(tmp_path / "old")
    (tmp_path / "new" / "adapter_config.json").unlink()
    assert sorted(seen.looks()) == ["-new", "-old"]


def test_half_written_is_not_touched_and_broken_is_said_once(adapter, tmp_path) -> None:
    seen = Seen(tmp_path)
    path = tmp_path / "slow"
    path.mkdir()
    shutil.copy(adapter / "adapter_config.json", path)
    content = (adapter / "adapter_model.safetensors").read_bytes()
    for end in range(0, len(content), len(content) // 5):
        (path / "adapter_model.safetensors").write_bytes(content[:end])
        assert seen.looks() == []
    (path / "adapter_model.safetensors").write_bytes(content)
    assert seen.looks(2) == ["+slow"]
    seen.refuse = {"slow"}
    (path / "adapter_model.safetensors").write_bytes(content[:-4])
    seen.lines.clear()
    assert seen.looks(5) == [] and seen.lines == ["adapter slow is not served: broken: for the test"]
    seen.refuse = set()
    (path / "adapter_model.safetensors").write_bytes(content)
    assert seen.looks(2) == ["+slow"]
    (tmp_path / "no name").mkdir()
    shutil.copytree(adapter, tmp_path / "no name", dirs_exist_ok=True)
    assert seen.looks(3) == [] and "cannot be a model's name" in seen.lines[-1]


def test_a_server_follows_its_folder(model_dir, adapter, make_adapter, tmp_path, capsys) -> None:
    from swiftlite.engine.request import SamplingParams

    shutil.copytree(adapter, tmp_path / "first")
    options = parse(
        "deploy", ["--model", str(model_dir), "--torch_dtype", "float32", "--adapter_dir", str(tmp_path), "--adapters", f"given={adapter}"]
    )
    service = load_service(options, make_plan(options))
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    def ask(name: str) -> list[int]:
        served = service.served(name)
        return service.submit([5, 6, 7, 8], greedy, served).result().outputs[0].token_ids

    try:
        with watched(options, service):
            wait_until(lambda: service.names()[1:] == ["given", "first"])
            assert ask("first") == ask("given")
            run = tmp_path / "run" / "tiny" / "v0-20261120-101010"
            run.mkdir(parents=True)
            shutil.copytree(make_adapter(model_dir, 2), run / ".checkpoint-5.1")
            os.rename(run / ".checkpoint-5.1", run / "checkpoint-5")
            started = time.monotonic()
            wait_until(lambda: "run-tiny-v0-checkpoint-5" in service.adapters)
            assert time.monotonic() - started < 5  # a second when the machine is quiet
            other = ask("run-tiny-v0-checkpoint-5")
            assert other != ask("first")
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(run / "checkpoint-5" / file, tmp_path / "first" / f".{file}")
                os.replace(tmp_path / "first" / f".{file}", tmp_path / "first" / file)
            wait_until(lambda: ask("first") == other)
            shutil.copytree(adapter, tmp_path / "given")  # a name that is taken stays what it was
            os.rename(run / "checkpoint-5", run / ".gone")
            wait_until(lambda: "run-tiny-v0-checkpoint-5" not in service.adapters)
            wait_until(lambda: "adapter given is not served" in capsys.readouterr().out)
            service.engine.check()
    finally:
        service.close()


def test_flags_that_make_no_sense(model_dir, adapter, tmp_path) -> None:
    with pytest.raises(UsageError, match="needs --adapter_root"):
        runtime_adapters(parse("deploy", ["--model", str(model_dir), "--allow_runtime_lora"]))
    with pytest.raises(UsageError, match=r"--adapter_root .* is not a directory"):
        runtime_adapters(parse("deploy", ["--model", str(model_dir), "--allow_runtime_lora", "--adapter_root", str(tmp_path / "no")]))
    with pytest.raises(UsageError, match="is an adapter itself"), watched(parse("deploy", ["--adapter_dir", str(adapter)]), _Named()):
        pass
    allowed = runtime_adapters(parse("deploy", ["--allow_runtime_lora", "--adapter_dir", str(tmp_path), "--admin_key", "k"]))
    assert allowed is not None and (allowed.root, allowed.admin_key) == (Path(os.path.realpath(tmp_path)), "k")
    assert json.dumps(str(allowed.root))


class _Named:
    def __init__(self) -> None:
        self.adapters: dict[str, object] = {}
