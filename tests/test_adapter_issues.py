"""What other servers got wrong about adapters: each report of a wrong adapter or a wrong text is a test here, against PEFT.

Reports of captured graphs that kept an old adapter (sglang #29157, #26930) are in kernel_cases.py, where decode steps are fixed.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import greedy, hf, wait_until
from transformers import AutoModelForCausalLM

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.lora_ops import STACK_SLOTS
from swiftlite.errors import AdapterError

COUNT = 5
PROMPTS = [list(range(3, 40)), list(range(50, 61)), list(range(3, 36))]  # the third begins as the first does
LENGTH = 30
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model_dir(make_model) -> Path:
    return make_model("llama")


@pytest.fixture(scope="module")
def adapters(model_dir, make_adapter) -> list[Path]:
    return [make_adapter(model_dir, seed, rank=4 + seed % 2) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def expected(model_dir, adapters) -> dict[tuple[int | None, int], list[int]]:
    """(adapter or None, prompt) -> what PEFT answers."""
    from peft import PeftModel

    found = {}
    for index in (None, *range(COUNT)):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        model = model if index is None else PeftModel.from_pretrained(model, adapters[index]).eval()
        for number, prompt in enumerate(PROMPTS):
            found[index, number] = hf(model, prompt, LENGTH)
    assert len(set(map(tuple, found.values()))) == len(found)
    return found


@pytest.fixture
def build(model_dir):
    made: list[Engine] = []

    def make(**config) -> Engine:
        made.append(Engine(model_dir, EngineConfig(**{"num_blocks": 128, "block_size": 4, **config}), device="cpu", dtype="float32"))
        return made[-1]

    yield make
    for engine in made:
        wait_until(lambda engine=engine: not engine.stats()["running"] and not engine.stats()["waiting"])
        engine.check()
        engine.shutdown()


def ask(engine: Engine, name: str | None, number: int) -> list[int]:
    output = engine.generate(PROMPTS[number], greedy(LENGTH), adapter=name)[0]
    assert output.error is None
    return output.outputs[0].token_ids


def test_adapters_added_at_run_time_leave_requests_in_flight_alone(build, adapters, expected) -> None:
    """vLLM #47724: the request went on with another adapter's weights. Here every slot around it changes hands, again and again."""
    engine = build()
    for index in (0, 1):
        engine.add_adapter(f"a{index}", adapters[index])
    for _ in range(3):
        streams = [(index, engine.submit(PROMPTS[0], greedy(LENGTH), adapter=f"a{index}")) for index in (0, 1, 0)]
        for stream in streams:
            next(iter(stream[1]))
        for turn in range(2 * STACK_SLOTS):
            engine.add_adapter(f"new{turn}", adapters[2 + turn % 3])
        engine.add_adapter("a0", adapters[4])  # and its own name means another one now
        assert [stream.result().outputs[0].token_ids for _, stream in streams] == [expected[index, 0] for index, _ in streams]
        assert ask(engine, "a0", 0) == expected[4, 0] and ask(engine, "new3", 1) == expected[2, 1]
        for turn in range(2 * STACK_SLOTS):
            engine.remove_adapter(f"new{turn}")
        engine.add_adapter("a0", adapters[0])


@pytest.mark.parametrize(
    "change", [("model.layers", "language_model.layers"), ("base_model.model.", "base_model.model.model."), ("q_proj", "query")]
)
def test_names_that_do_not_fit_are_never_the_bases_answer(build, adapters, tmp_path, change: tuple[str, str]) -> None:
    """vLLM #34186: a prefix differed, nothing was adapted, and the base answered under the adapter's name."""
    shutil.copytree(adapters[0], tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({key.replace(*change): tensor for key, tensor in tensors.items()}, tmp_path / "a" / WEIGHTS)
    engine = build()
    for load in (engine.add_adapter, engine.register_adapter):
        with pytest.raises(AdapterError, match=r"(?s)belongs to another base model.*the nearest is model\.layers"):
            load("a", tmp_path / "a")
    assert engine.adapters() == []


def test_an_adapter_with_some_keys_missing_is_not_half_an_adapter(build, adapters, tmp_path) -> None:
    """The same, seen from the other side: what the configuration announces must be in the file, A and B both."""
    shutil.copytree(adapters[0], tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    del tensors[next(key for key in tensors if "lora_B" in key)]
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="has no lora_B"):
        build().add_adapter("a", tmp_path / "a")


def test_chunks_siblings_and_preemption_give_no_garbage(build, adapters, expected) -> None:
    """vLLM #14392, #14232: garbage once adapters met the rest of the scheduler. Tiny chunks, shared prefixes, blocks that run out."""
    engine = build(max_num_batched_tokens=8, num_blocks=48, max_num_seqs=5)
    for index, path in enumerate(adapters):
        engine.add_adapter(f"a{index}", path)
    work = [(index, number) for index, number in itertools.product((None, *range(COUNT)), range(len(PROMPTS)))]
    names = [None if index is None else f"a{index}" for index, _ in work]
    params = [greedy(LENGTH, n=2) if number == 1 else greedy(LENGTH) for _, number in work]
    outputs = engine.generate([PROMPTS[number] for _, number in work], params, adapter=names)
    for key, output in zip(work, outputs, strict=True):
        assert output.error is None and all(answer.token_ids == expected[key] for answer in output.outputs), key
    assert engine.stats()["preemptions"] > 0


def test_pushed_out_and_read_again_is_the_same_adapter(build, adapters, expected) -> None:
    """vLLM #20873: after the least recently used went, slots and weights no longer belonged together."""
    probe = build()
    size = max(probe.add_adapter(f"a{index}", path).nbytes for index, path in enumerate(adapters))
    engine = build(adapter_memory=2 * size + 100)
    for index, path in enumerate(adapters):
        engine.register_adapter(f"a{index}", path)
    for index in (0, 1, 2, 0, 3, 1, 4, 4, 0, 2, 1):
        assert ask(engine, f"a{index}", 1) == expected[index, 1]
        assert sum(info.tier == "device" for info in engine.adapters()) <= 2


def test_rapid_alternation_corrupts_no_cache(build, adapters, expected) -> None:
    """vLLM #38606: K/V of one adapter in the blocks of another. Few blocks, one prompt for all, a new adapter with every request."""
    engine = build(num_blocks=40, max_num_seqs=4)
    for index, path in enumerate(adapters):
        engine.add_adapter(f"a{index}", path)
    wrong: list[tuple[int | None, int]] = []

    def client(first: int) -> None:
        for turn in range(8):
            index = (first + turn) % (COUNT + 1)
            key = (None if index == COUNT else index, turn % 3)
            if ask(engine, None if key[0] is None else f"a{key[0]}", key[1]) != expected[key]:
                wrong.append(key)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_cached_prefix_belongs_to_the_weights_that_made_it(build, adapters, expected, tmp_path) -> None:
    """vLLM #30931, #42125, llama.cpp #26207: blocks were found by the adapter's name or path, or by the tokens alone."""
    engine = build()
    path = tmp_path / "a"
    shutil.copytree(adapters[0], path)
    engine.add_adapter("a", path)
    engine.add_adapter("other", adapters[1])

    def cached(name: str | None, index: int | None) -> int:
        output = engine.generate(PROMPTS[0], greedy(LENGTH), adapter=name)[0]
        assert output.outputs[0].token_ids == expected[index, 0]
        return output.num_cached_tokens

    assert [cached("a", 0), cached("other", 1), cached(None, None)] == [0, 0, 0]
    assert [cached("a", 0), cached("other", 1), cached(None, None)] == [36, 36, 36]
    engine.add_adapter("twin", adapters[0])  # the same weights under another name and path: the same blocks
    assert cached("twin", 0) == 36
    for file in adapters[2].iterdir():
        shutil.copy(file, path)
    engine.add_adapter("a", path)  # other weights, the same name and path
    assert cached("a", 2) == 0 and cached("twin", 0) == 36
    engine.add_adapter("a", adapters[1])
    assert cached("a", 1) == 36
