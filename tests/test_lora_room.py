"""Adapters come from disk when they are wanted, share little memory fairly, and everything is given back."""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import PROMPTS, answers, greedy, hf, wait_until
from transformers import AutoModelForCausalLM

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.errors import AdapterError, RequestError

COUNT = 6


@pytest.fixture(scope="module")
def model_dir(make_model):
    return make_model("llama")


@pytest.fixture(scope="module")
def adapters(model_dir, make_adapter):
    return [make_adapter(model_dir, seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def expected(model_dir, adapters):
    """By PEFT: the answer of each adapter to PROMPTS[2]."""
    from peft import PeftModel

    found = []
    for path in adapters:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), path).eval()
        found.append(hf(model, PROMPTS[2]))
    assert len(set(map(tuple, found))) == COUNT
    return found


@pytest.fixture
def build(model_dir):
    made: list[Engine] = []

    def make(**config) -> Engine:
        made.append(Engine(model_dir, EngineConfig(**{"num_blocks": 128, **config}), device="cpu", dtype="float32"))
        return made[-1]

    yield make
    for one in made:
        wait_until(lambda one=one: not one.stats()["running"] and not one.stats()["waiting"])
        one.check()
        one.shutdown()


def size_of(engine: Engine, path) -> int:
    engine.register_adapter("size", path)
    size = next(info.nbytes for info in engine.adapters() if info.name == "size")
    engine.remove_adapter("size")
    return size


def test_registered_adapters_are_read_when_wanted(build, adapters, expected) -> None:
    engine = build()
    for index, path in enumerate(adapters):
        info = engine.register_adapter(f"a{index}", path)
        assert (info.tier, info.digest, info.state, info.rank) == ("disk", "", "ready", 4)
    names = [f"a{index}" for index in (3, 1, 3, 5)]
    assert answers(engine.generate([PROMPTS[2]] * 4, greedy(), adapter=names)) == [expected[i] for i in (3, 1, 3, 5)]
    tiers = {info.name: info.tier for info in engine.adapters()}
    assert tiers == {f"a{i}": "device" if i in (1, 3, 5) else "disk" for i in range(COUNT)}


def test_little_memory_serves_all_and_stays_within_its_limit(build, adapters, expected) -> None:
    probe = build()
    size = size_of(probe, adapters[0])
    engine = build(adapter_memory=2 * size + 100)
    for index, path in enumerate(adapters):
        (engine.register_adapter if index % 2 else engine.add_adapter)(f"a{index}", path)
    order = [0, 1, 2, 3, 4, 5, 0, 5, 1, 1, 2, 0]
    outputs = engine.generate([PROMPTS[2]] * len(order), greedy(), adapter=[f"a{i}" for i in order])
    assert answers(outputs) == [expected[i] for i in order]
    assert sum(info.tier == "device" for info in engine.adapters()) == 2
    again = engine.generate([PROMPTS[2]] * 2, greedy(), adapter=["a3", "a4"])  # their prefixes outlive their weights
    assert answers(again) == [expected[3], expected[4]] and all(output.num_cached_tokens for output in again)
    small = build(adapter_memory=size - 1)
    with pytest.raises(AdapterError, match=r"(?s)too large.*--adapter_memory"):
        small.add_adapter("a", adapters[0])


def test_what_was_read_is_kept_beside_a_device(build, adapters, expected, monkeypatch) -> None:
    from swiftlite.engine import lora

    probe = build()
    size = size_of(probe, adapters[0])
    engine = build(adapter_memory=size + 100, adapter_host_memory=2 * size)  # as beside a GPU: one on it, two more at hand
    for index in range(4):
        engine.register_adapter(f"a{index}", adapters[index])
    reads: list[str] = []
    real = lora.read
    monkeypatch.setattr(lora, "read", lambda path, *args, **kwargs: reads.append(str(path)) or real(path, *args, **kwargs))
    for index in (0, 1, 0, 1, 2, 3):
        assert answers(engine.generate(PROMPTS[2], greedy(), adapter=f"a{index}"))[0] == expected[index]
    assert reads == [str(adapters[index]) for index in (0, 1, 2, 3)]
    assert [info.tier for info in engine.adapters()] == ["disk", "disk", "host", "device"]
    engine.remove_adapter("a2")
    assert engine.runner.lora._host.used <= size
    for index in (0, 1, 3):
        engine.remove_adapter(f"a{index}")
    assert engine.runner.lora._host.used == 0


def test_a_popular_adapter_cannot_starve_a_rare_one(build, adapters, expected) -> None:
    probe = build()
    engine = build(adapter_memory=size_of(probe, adapters[0]) + 100, max_num_seqs=4)  # room for one
    engine.add_adapter("popular", adapters[0])
    engine.register_adapter("rare", adapters[1])
    stop, done = threading.Event(), []

    def crowd() -> None:
        while not stop.is_set():
            done.append(engine.generate(PROMPTS[2], greedy(), adapter="popular")[0].outputs[0].token_ids)

    threads = [threading.Thread(target=crowd) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(done) > 8)
    for _ in range(3):
        before = len(done)
        assert answers(engine.generate(PROMPTS[2], greedy(), adapter="rare"))[0] == expected[1]
        assert len(done) - before <= 3 * 8  # those that sat when it came, and a turn of everyone around its own
    stop.set()
    for thread in threads:
        thread.join()
    assert all(tokens == expected[0] for tokens in done)


def test_an_adapter_that_cannot_be_read_fails_its_requests_and_nothing_else(build, adapters, expected, tmp_path) -> None:
    engine = build()
    for name in ("gone", "changed", "nan"):
        shutil.copytree(adapters[0], tmp_path / name)
        engine.register_adapter(name, tmp_path / name)
    engine.register_adapter("good", adapters[1])
    shutil.rmtree(tmp_path / "gone")
    assert answers(engine.generate(PROMPTS[2], greedy(), adapter="changed"))[0] == expected[0]
    for name, value in (("changed", 0.5), ("nan", float("nan"))):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        next(iter(tensors.values())).view(-1)[0] = value
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    outputs = engine.generate([PROMPTS[2]] * 4, greedy(), adapter=["gone", "good", "nan", "changed"])
    assert "no such directory" in outputs[0].error and "not finite" in outputs[2].error
    assert [o.error for o in outputs[1::2]] == [None, None] and answers(outputs[1::2]) == [expected[1], expected[0]]
    version = next(v for v in engine.runner.lora._versions if v.name == "changed")
    with engine.runner.lora._lock:
        engine.runner.lora._memory.push_out(version.weights)
    output = engine.generate(PROMPTS[2], greedy(), adapter="changed")[0]
    assert "changed on disk" in output.error
    engine.add_adapter("changed", tmp_path / "changed")
    assert engine.generate(PROMPTS[2], greedy(), adapter="changed")[0].error is None


def test_aborted_while_its_adapter_comes(build, adapters, monkeypatch) -> None:
    from swiftlite.engine import lora

    engine = build()
    engine.register_adapter("a", adapters[0])
    hold, reading = threading.Event(), threading.Event()
    real = lora.read

    def slow(*args, **kwargs):
        reading.set()
        hold.wait()
        return real(*args, **kwargs)

    monkeypatch.setattr(lora, "read", slow)
    one, other = (engine.submit(PROMPTS[2], greedy(), adapter="a") for _ in range(2))
    assert engine.generate(PROMPTS[2], greedy())[0].finished  # the base does not wait for the disk
    assert reading.wait(10)
    one.abort()
    assert one.result().outputs[0].finish_reason == "abort"
    engine.remove_adapter("a")
    hold.set()
    assert other.result().error is None
    wait_until(lambda: engine.adapters() == [])
    third = engine.register_adapter("a", adapters[1])
    assert third.version == 2
    hold.clear()
    fourth = engine.submit(PROMPTS[2], greedy(), adapter="a")
    fourth.abort()
    hold.set()
    fourth.result()
    wait_until(lambda: engine.runner.lora._loader is None)


def test_wanted_while_another_is_added_in_its_room(build, adapters, expected, monkeypatch) -> None:
    """Nobody runs with the one that was added, so the end of its load is all that tells that it can go."""
    engine = build(adapter_memory=size_of(build(), adapters[0]) + 100)
    engine.register_adapter("a", adapters[0])
    lora, hold, storing = engine.runner.lora, threading.Event(), threading.Event()
    real = lora.store.store

    def slow(adapter):
        storing.set()
        hold.wait()
        return real(adapter)

    monkeypatch.setattr(lora.store, "store", slow)
    adding = threading.Thread(target=engine.add_adapter, args=("b", adapters[1]))
    adding.start()
    assert storing.wait(10)
    stream = engine.submit(PROMPTS[2], greedy(), adapter="a")
    wait_until(lambda: lora._freed._waiters)
    hold.set()
    adding.join()
    wait_until(lambda: stream.finished)
    assert stream.result().outputs[0].token_ids == expected[0]


def test_removed_adapters_leave_no_prefix_behind(build, adapters) -> None:
    engine = build()
    engine.add_adapter("a", adapters[0])
    engine.add_adapter("b", adapters[1])
    prompt = list(range(3, 60))
    engine.generate([prompt] * 3, greedy(), adapter=["a", "b", None])
    cached = engine.stats()["cached_blocks"]
    stream = engine.submit(prompt, greedy(40), adapter="a")
    engine.remove_adapter("a")
    stream.result()
    wait_until(lambda: engine.stats()["cached_blocks"] == cached * 2 / 3)
    engine.remove_adapter("b")
    wait_until(lambda: engine.stats()["cached_blocks"] == cached / 3)
    assert engine.generate(prompt, greedy())[0].num_cached_tokens == 48
    started = time.monotonic()
    engine.add_adapter("a", adapters[0])
    assert engine.generate(prompt, greedy(), adapter="a")[0].num_cached_tokens == 0 and time.monotonic() - started < 10


def test_unloaded_adapters_give_the_process_its_memory_back(build, model_dir, make_adapter) -> None:
    """What the system counts, after running with them: slots, buffers of files and tables; and nothing piles up."""
    paths = [make_adapter(model_dir, seed, rank=512) for seed in range(3)]
    engine = build()

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def round_() -> tuple[int, int, int]:
        before = resident()
        for index, path in enumerate(paths):
            engine.add_adapter(f"a{index}", path)
        engine.generate([PROMPTS[2]] * 3, greedy(), adapter=[f"a{index}" for index in range(3)])
        full, size = resident(), sum(info.nbytes for info in engine.adapters())
        for index in range(3):
            engine.remove_adapter(f"a{index}")
        wait_until(lambda: engine.adapters() == [])
        return full - before, full - resident(), size

    first = resident()
    round_()
    for _ in range(3):
        came, went, size = round_()
        assert size > 10e6 and came > 0.8 * size and went > 0.8 * size
    assert resident() - first < size


def test_everything_at_once(build, adapters, expected) -> None:
    """Names come, go and flip while requests for all of them run, end and are aborted, in memory for two: right tokens or a clear no."""
    probe = build()
    engine = build(adapter_memory=2 * size_of(probe, adapters[0]) + 100, max_num_seqs=6)
    stop, problems, answered = threading.Event(), [], []

    def change(seed: int) -> None:
        generator = random.Random(seed)
        while not stop.is_set():
            index = generator.randrange(COUNT)
            try:
                if generator.random() < 0.3:
                    engine.remove_adapter(f"a{index}")
                else:
                    generator.choice((engine.add_adapter, engine.register_adapter))(f"a{index}", adapters[index])
            except RequestError:
                continue
            time.sleep(0.002)

    def ask(seed: int) -> None:
        generator = random.Random(seed)
        while not stop.is_set():
            index = generator.choice([None, *range(COUNT)])
            try:
                stream = engine.submit(PROMPTS[2], greedy(), adapter=None if index is None else f"a{index}")
            except RequestError:
                continue
            if generator.random() < 0.2:
                stream.abort()
            output = stream.result().outputs[0]
            if output.finish_reason == "length":
                answered.append(index)
            if output.finish_reason not in ("length", "abort") or (
                index is not None and output.token_ids != expected[index][: len(output.token_ids)]
            ):
                problems.append((index, stream.result().error, output.token_ids))

    threads = [threading.Thread(target=change, args=(seed,)) for seed in range(2)]
    threads += [threading.Thread(target=ask, args=(seed,)) for seed in range(10, 18)]
    for thread in threads:
        thread.start()
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "somebody waits for ever"
    assert not problems and len(set(answered)) == COUNT + 1
    for name in [info.name for info in engine.adapters() if info.state == "ready"]:
        engine.remove_adapter(name)
    wait_until(lambda: engine.adapters() == [] and engine.runner.lora.store.stacks == {})
