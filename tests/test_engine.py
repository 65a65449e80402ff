"""The engine on real tiny models: every way to run a request gives the tokens of transformers.generate, and nothing is left behind.

Everything is run twice: step by step, and with steps that overlap, as on a GPU.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import threading
import time

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoModelForCausalLM

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.request import SamplingParams
from swiftlite.errors import ModelError, OverloadError, RequestError, SwiftError, UsageError

PROMPTS = [list(range(3, 3 + length)) for length in (1, 4, 17, 40, 64)]


def greedy(tokens: int = 12, **params) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **params})


@pytest.fixture(scope="module")
def model_dir(make_model):
    return make_model("llama")


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlap"])
def overlap(request):
    return request.param


@pytest.fixture(scope="module")
def engine(model_dir, overlap):
    with Engine(model_dir, EngineConfig(num_blocks=128, overlap=overlap), device="cpu", dtype="float32") as made:
        yield made


@pytest.fixture
def build(model_dir, overlap):
    """build(**EngineConfig fields) -> engine that is shut down, and checked, at the end of the test."""
    made: list[Engine] = []

    def make(directory=model_dir, adapters=None, **config) -> Engine:
        settings = {"num_blocks": 64, "enable_prefix_caching": False, "overlap": overlap, **config}
        made.append(Engine(directory, EngineConfig(**settings), device="cpu", dtype="float32", adapters=adapters))
        return made[-1]

    yield make
    for one in made:
        if one.healthy:
            one.check()
        one.shutdown()


@pytest.fixture(scope="module")
def oracle(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def hf(model, prompt: list[int], tokens: int = 12) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def answers(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


# -- the same tokens, whatever the way


def test_alone_and_together_equal_transformers(engine, oracle):
    expected = [hf(oracle, prompt) for prompt in PROMPTS]
    assert [answers(engine.generate(prompt, greedy()))[0] for prompt in PROMPTS] == expected
    assert answers(engine.generate(PROMPTS, greedy())) == expected
    engine.check()


def test_chunked_prefill_equals_whole(build, oracle):
    chunked = build(max_num_batched_tokens=7)
    assert answers(chunked.generate(PROMPTS, greedy())) == [hf(oracle, prompt) for prompt in PROMPTS]


def test_a_chunk_of_one_token_is_no_answer(build, oracle):
    """Three answers leave one token of the budget to the prompt that arrives."""
    one = build(max_num_batched_tokens=4)
    running = [one.submit([5 + i], greedy(60)) for i in range(3)]
    wait_until(lambda: one.stats()["running"] == 3)
    assert answers(one.generate(PROMPTS[2], greedy())) == [hf(oracle, PROMPTS[2])]
    assert [stream.result().outputs[0].token_ids for stream in running] == [hf(oracle, [5 + i], 60) for i in range(3)]


def test_prefix_cache_hits_change_nothing(build, oracle):
    warm = build(enable_prefix_caching=True)
    prompt = list(range(3, 60))
    cold = warm.generate(prompt, greedy(logprobs=0))[0]
    again = warm.generate(prompt, greedy(logprobs=0))[0]
    assert (cold.num_cached_tokens, again.num_cached_tokens) == (0, 48)
    assert cold.outputs[0].token_ids == again.outputs[0].token_ids == hf(oracle, prompt)
    for one, two in zip(cold.outputs[0].logprobs, again.outputs[0].logprobs, strict=True):
        assert math.isclose(one.logprob, two.logprob, abs_tol=1e-5)
    turn = prompt + cold.outputs[0].token_ids + [7, 8, 9]  # a second turn finds the first one's answer too
    second = warm.generate(turn, greedy())[0]
    assert second.num_cached_tokens == 64 and second.outputs[0].token_ids == hf(oracle, turn)


def test_preempted_equals_undisturbed(build, oracle):
    tight = build(num_blocks=9)
    prompts = [[i + 5] * 20 for i in range(5)]
    outputs = tight.generate(prompts, greedy(60))
    assert tight.stats()["preemptions"] > 0
    assert answers(outputs) == [hf(oracle, prompt, 60) for prompt in prompts]
    seeded = SamplingParams(seed=5, max_tokens=60, ignore_eos=True)
    disturbed = answers(tight.generate(prompts, seeded))
    assert disturbed == [answers(tight.generate(prompt, seeded))[0] for prompt in prompts]


def test_siblings_equal_separate_requests(build):
    for config in ({"num_blocks": 64}, {"num_blocks": 7}, {"max_num_seqs": 2}):
        one = build(**config)
        for params in ({"temperature": 0}, {"seed": 11}, {"seed": 3, "top_p": 0.8, "presence_penalty": 1.0}):
            prompt = list(range(3, 24))
            together = one.generate(prompt, SamplingParams(n=3, max_tokens=20, ignore_eos=True, **params))[0]
            separate = [
                one.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True, **{**params, "seed": params.get("seed", 0) + index}))[0]
                for index in range(3)
            ]
            assert [output.index for output in together.outputs] == [0, 1, 2]
            assert [output.token_ids for output in together.outputs] == answers(separate)
        one.check()


def test_seeded_requests_do_not_depend_on_their_company(engine):
    params = SamplingParams(seed=42, temperature=1.2, top_k=50, max_tokens=15, ignore_eos=True)
    alone = answers(engine.generate(PROMPTS[2], params))[0]
    crowd = engine.generate([*PROMPTS, PROMPTS[2]], [*[SamplingParams(max_tokens=15) for _ in PROMPTS], params])
    assert answers(crowd)[-1] == alone
    assert answers(engine.generate([PROMPTS[2]] * 2, SamplingParams(max_tokens=15, ignore_eos=True)))[0] != alone


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_cold_and_warm_in_mixed_chunked_batches(family, make_model, build):
    directory = make_model(family)
    attention = "eager" if family == "gemma2" else "sdpa"  # sdpa has no soft cap
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()
    prompts = [PROMPTS[1], PROMPTS[3], PROMPTS[4]]
    expected = [hf(oracle, prompt) for prompt in prompts]
    one = build(directory, max_num_batched_tokens=20, enable_prefix_caching=True)
    for cached in ([0, 0, 0], [0, 32, 48]):
        outputs = one.generate(prompts, greedy())
        assert answers(outputs) == expected
        if cached[1]:
            assert [output.num_cached_tokens for output in outputs] == cached


def test_base_and_three_adapters_in_one_batch_equal_peft(model_dir, make_adapter, build):
    from peft import PeftModel

    paths = {f"a{seed}": make_adapter(model_dir, seed=seed, rank=2 + seed) for seed in range(3)}
    one = build(adapters={name: str(path) for name, path in paths.items()}, enable_prefix_caching=True, max_num_batched_tokens=50)
    names = [None, "a0", "a1", "a2", None, "a1"]
    prompts = [list(range(3, 40))] * 4 + [[9, 8, 7], [9, 8, 7]]
    expected = []
    for name, prompt in zip(names, prompts, strict=True):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        expected.append(hf(PeftModel.from_pretrained(model, paths[name]).eval() if name else model.eval(), prompt))
    assert len({tuple(tokens) for tokens in expected[:4]}) == 4, "the adapters must differ for the test to mean anything"
    for _ in range(2):  # cold, then with everything cached
        outputs = one.generate(prompts, greedy(), adapter=names)
        assert answers(outputs) == expected
    assert all(output.num_cached_tokens == 32 for output in outputs[:4])
    one.check()


def test_adapters_come_and_go_while_requests_run(model_dir, make_adapter, build):
    one = build(num_blocks=128, enable_prefix_caching=True)
    first, second = make_adapter(model_dir, seed=1), make_adapter(model_dir, seed=2)
    one.add_adapter("x", first)
    before = answers(one.generate(PROMPTS[3], greedy(40), adapter="x"))[0]
    stream = one.submit(PROMPTS[3], greedy(40), adapter="x")
    next(iter(stream))
    one.add_adapter("x", second)  # same name, other weights
    other = answers(one.generate(PROMPTS[3], greedy(40), adapter="x"))[0]
    assert stream.result().outputs[0].token_ids == before, "a running request keeps its version"
    assert other != before, "cached prefixes of the old weights are not the new ones"
    one.add_adapter("y", second)
    assert answers(one.generate(PROMPTS[3], greedy(40), adapter="y"))[0] == other
    running = one.submit(PROMPTS[3], greedy(40), adapter="x")
    one.remove_adapter("x")
    with pytest.raises(RequestError, match="unknown adapter"):
        one.submit([1, 2], greedy(), adapter="x")
    assert running.result().outputs[0].token_ids == other
    assert [info.name for info in one.adapters()] == ["y"]
    one.check()


# -- ends


def test_stop_ids_and_reasons(engine, oracle):
    tokens = hf(oracle, PROMPTS[1], 12)
    third = tokens[2]
    cut = tokens.index(third) + 1
    output = engine.generate(PROMPTS[1], greedy(stop_token_ids=[third]))[0].outputs[0]
    assert (output.finish_reason, output.stop_reason, output.token_ids) == ("stop", third, tokens[:cut])
    assert output.text == engine.tokenizer.decode(tokens[: cut - 1])
    shown = engine.generate(PROMPTS[1], greedy(stop_token_ids=[third], include_stop_str_in_output=True))[0].outputs[0]
    assert shown.text == engine.tokenizer.decode(tokens[:cut])
    length = engine.generate(PROMPTS[1], greedy(5))[0].outputs[0]
    assert (length.finish_reason, length.stop_reason, len(length.token_ids)) == ("length", None, 5)
    bias = {2: 100.0}  # <|im_end|>, the tokenizer's and the config's eos
    ended = engine.generate(PROMPTS[1], greedy(ignore_eos=False, logit_bias=bias))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason, ended.token_ids, ended.text) == ("stop", None, [2], "")
    late = engine.generate(PROMPTS[1], greedy(ignore_eos=False, logit_bias=bias, min_tokens=4))[0].outputs[0]
    assert len(late.token_ids) == 5 and late.token_ids[-1] == 2 and 2 not in late.token_ids[:-1]


def test_stop_strings_and_streamed_text(engine):
    whole = engine.generate(PROMPTS[2], greedy(40))[0].outputs[0]
    stop = whole.text[8:11]
    cut = whole.text.index(stop)
    for include in (False, True):
        params = greedy(40, stop=[stop], include_stop_str_in_output=include)
        shown, pieces = "", []
        for snapshot in engine.submit(PROMPTS[2], params):
            text = snapshot.outputs[0].text
            assert text.startswith(shown)
            pieces.append(text[len(shown) :])
            shown = text
        expected = whole.text[: cut + (len(stop) if include else 0)]
        assert "".join(pieces) == expected and snapshot.finished
        assert (snapshot.outputs[0].finish_reason, snapshot.outputs[0].stop_reason) == ("stop", stop)
        assert engine.generate(PROMPTS[2], params)[0].outputs[0].text == expected


def test_streaming_shows_every_token_and_ends_with_the_whole(engine):
    texts, counts = [], []
    for snapshot in engine.submit(PROMPTS[2], greedy(400)):
        texts.append(snapshot.outputs[0].text)
        counts.append(len(snapshot.outputs[0].token_ids))
    assert counts == sorted(counts) and counts[-1] == 400 and len(counts) > 5
    assert all(texts[-1].startswith(text) for text in texts)
    assert texts[-1] == engine.tokenizer.decode(snapshot.outputs[0].token_ids, skip_special_tokens=True)
    assert snapshot.metrics["arrival"] <= snapshot.metrics["first_token"] <= snapshot.metrics["finished"]


def test_context_end_is_length(build):
    short = build(max_model_len=40)
    output = short.generate(list(range(3, 33)), greedy(1000))[0].outputs[0]
    assert output.finish_reason == "length" and len(output.token_ids) == 10
    nothing = short.generate([5, 6], greedy(0))[0]
    assert nothing.outputs[0].token_ids == [] and nothing.outputs[0].finish_reason == "length"


# -- log-probabilities


@torch.no_grad()
def test_logprobs_equal_transformers(build, oracle):
    for budget in (2048, 9):
        one = build(max_num_batched_tokens=budget, enable_prefix_caching=True)
        for _ in range(2):
            output = one.generate(PROMPTS[3], greedy(6, logprobs=3, prompt_logprobs=2))[0]
            answer = output.outputs[0]
            expected = oracle(torch.tensor([PROMPTS[3] + answer.token_ids])).logits[0].log_softmax(-1)
            start = len(PROMPTS[3]) - 1
            for step, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
                best = expected[start + step].topk(3)
                assert entry.token_id == token and list(entry.top) == best.indices.tolist()
                assert entry.logprob == pytest.approx(float(expected[start + step, token]), abs=2e-5)
                assert list(entry.top.values()) == pytest.approx(best.values.tolist(), abs=2e-5)
            assert answer.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in answer.logprobs))
            assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(PROMPTS[3])
            for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
                assert entry.token_id == PROMPTS[3][position] and len(entry.top) == 2
                assert entry.logprob == pytest.approx(float(expected[position - 1, entry.token_id]), abs=2e-5)


def test_scoring_a_prompt_without_an_answer(engine, oracle):
    output = engine.generate([PROMPTS[1], PROMPTS[2]], greedy(0, prompt_logprobs=0))[1]
    assert output.outputs[0].token_ids == [] and len(output.prompt_logprobs) == len(PROMPTS[2])
    engine.check()


# -- what is refused


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "empty"),
        (list(range(3, 60)), {}, "57 tokens, at most 47 fit"),
        ([1, 10**6], {}, "1000000"),
        ([1, -1], {}, "-1"),
        ([1, 2], {"logit_bias": {10**6: 1.0}}, "1000000"),
        ([1, 2], {"n": 1000}, "n is 1000, at most 128"),
        ([1, 2], {"logprobs": 21}, "logprobs is 21"),
    ],
)
def test_what_can_never_run_is_refused_with_numbers(build, prompt, params, words):
    one = build(num_blocks=3)
    with pytest.raises(RequestError, match=words):
        one.submit(prompt, greedy(**params))
    with pytest.raises(RequestError):
        one.generate([[1, 2], prompt], greedy(**params))
    one.check()
    assert one.stats()["requests"] == 0


@pytest.mark.parametrize(
    "setting", [{"block_size": 0}, {"max_num_seqs": 0}, {"max_model_len": -5}, {"speculate_ngram": -2}, {"gpu_memory_utilization": 7.0}]
)
def test_sizes_that_make_no_sense_are_refused(setting):
    [(name, value)] = setting.items()
    with pytest.raises(UsageError, match=f"{name} must .*{value}"):
        EngineConfig(**setting)


def test_a_full_queue_and_a_used_id_are_refused(build):
    one = build(max_waiting=2, max_num_seqs=1)
    streams = [one.submit([5, 6], greedy(300), request_id=str(i)) for i in range(3)]
    with pytest.raises(RequestError, match="running already"):
        one.submit([5, 6], greedy(), request_id="1")
    with pytest.raises(OverloadError, match="2 requests"):
        one.submit([5, 6], greedy())
    for stream in streams:
        stream.abort()
    assert len(one.generate([[5]] * 10, greedy(2))) == 10, "offline runs are not limited"


def test_broken_generation_config_is_an_error(model_dir, tmp_path):
    import shutil

    shutil.copytree(model_dir, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config"):
        Engine(tmp_path / "m", device="cpu")


def test_eos_ids_come_from_all_files(model_dir, tmp_path):
    import json
    import shutil

    shutil.copytree(model_dir, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [77, 78]}))
    with Engine(tmp_path / "m", EngineConfig(num_blocks=8), device="cpu") as one:
        assert one.eos_ids == {2, 77, 78}


# -- ends at any moment


def test_abort_at_every_stage_leaves_nothing(model_dir, make_adapter, build):
    one = build(
        adapters={"a": str(make_adapter(model_dir, seed=1))},
        num_blocks=40,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        enable_prefix_caching=True,
    )
    rng = random.Random(0)
    for _ in range(40):
        streams = [
            one.submit(
                [rng.randrange(3, 90) for _ in range(rng.choice([2, 30, 90]))],
                SamplingParams(max_tokens=30, n=rng.choice([1, 3]), stop=["zzz"] if rng.random() < 0.3 else []),
                adapter=rng.choice([None, "a"]),
            )
            for _ in range(5)
        ]
        steps = one.stats()["steps"] + rng.choice([0, 1, 2, 4, 8])
        wait_until(lambda steps=steps, streams=streams: one.stats()["steps"] >= steps or all(s.finished for s in streams))
        for stream in streams:
            stream.abort()
        for stream in streams:
            output = stream.result()
            assert output.finished and all(answer.finish_reason in ("abort", "length", "stop") for answer in output.outputs)
        one.check()
        assert one.stats()["free_blocks"] == 40 and one.stats()["running"] == one.stats()["waiting"] == 0
    assert one.generate([5, 6], greedy(3))[0].finished


def test_a_dropped_stream_aborts_its_request(build):
    one = build(num_blocks=64)
    stream = one.submit([5, 6], greedy(480))
    next(iter(stream))
    del stream
    gc.collect()
    wait_until(lambda: one.stats()["running"] == 0)
    assert one.stats()["generated_tokens"] < 480


def test_shutdown_ends_everything_and_refuses_more(build):
    one = build()
    streams = [one.submit([5, 6], greedy(400)) for _ in range(3)]
    one.shutdown()
    assert all(stream.result().outputs[0].finish_reason in ("abort", "length") for stream in streams)
    with pytest.raises(SwiftError, match="shut down"):
        one.submit([1], greedy())
    assert not one.healthy
    one.shutdown()


# -- failures


def test_a_request_with_bad_logits_fails_alone(build, oracle, monkeypatch):
    one = build()
    execute = one.runner.execute

    def poisoned(scheduled, *drawn):
        logits = execute(scheduled, *drawn)
        for row, item in enumerate(scheduled):
            if item.seq.token_ids[0] == 99 and item.start >= 5:
                logits[row, 3] = math.nan
        return logits

    monkeypatch.setattr(one.runner, "execute", poisoned)
    good, bad = one.generate([PROMPTS[1], [99, 4]], greedy())
    assert good.outputs[0].token_ids == hf(oracle, PROMPTS[1]) and good.error is None
    assert bad.outputs[0].finish_reason == "error" and "not finite" in bad.error and len(bad.outputs[0].token_ids) == 4
    assert one.healthy


@pytest.mark.parametrize("params", [{}, {"max_tokens": 1}, {"n": 3}, {"use_beam_search": True, "n": 2}], ids=str)
def test_a_token_without_numbers_spoils_no_prefix(params, build, oracle):
    """An embedding of NaN: whoever shares the prompt up to there is answered as ever, also where it was computed in one chunk with it."""
    one = build(enable_prefix_caching=True, block_size=8)
    one.runner.model.get_input_embeddings().weight.data[99] = math.nan
    [bad] = one.generate([*PROMPTS[4][:60], 99, 7], greedy(**params))
    assert "not finite" in bad.error
    [good] = one.generate(PROMPTS[4], greedy())
    assert good.error is None and good.outputs[0].token_ids == hf(oracle, PROMPTS[4])


def test_a_failing_step_ends_its_batch_and_the_loop_goes_on(build, oracle, monkeypatch):
    one = build()
    execute, fail = one.runner.execute, [True]

    def sometimes(scheduled, *drawn):
        if fail[0]:
            raise RuntimeError("out of luck")
        return execute(scheduled, *drawn)

    monkeypatch.setattr(one.runner, "execute", sometimes)
    outputs = one.generate([PROMPTS[1], PROMPTS[2]], greedy())
    assert all("out of luck" in output.error and output.outputs[0].finish_reason == "error" for output in outputs)
    one.check()
    one.generate([5], greedy()), one.generate([5], greedy())
    assert not one.healthy, "three failed steps in a row"
    fail[0] = False
    assert answers(one.generate(PROMPTS[1], greedy()))[0] == hf(oracle, PROMPTS[1])
    assert one.healthy and one.stats()["failed_steps"] == 3


def test_a_bug_in_the_loop_does_not_kill_it(build, oracle, monkeypatch):
    one = build()
    with monkeypatch.context() as patch:
        patch.setattr(type(one._loop.scheduler), "schedule", lambda self: 1 / 0)
        output = one.generate([5, 6], greedy())[0]
        assert output.outputs[0].finish_reason == "error" and "ZeroDivisionError" in output.error
    assert answers(one.generate(PROMPTS[1], greedy()))[0] == hf(oracle, PROMPTS[1])
    one.check()


# -- many readers


def test_threads_submit_at_once(engine, oracle):
    expected = [hf(oracle, prompt) for prompt in PROMPTS]
    failures: list[str] = []

    def worker(number: int) -> None:
        for turn in range(4):
            index = (number + turn) % len(PROMPTS)
            snapshots = list(engine.submit(PROMPTS[index], greedy()))
            if snapshots[-1].outputs[0].token_ids != expected[index]:
                failures.append(f"worker {number}, prompt {index}")

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    engine.check()


def test_asyncio_streams(engine, oracle):
    async def read(index: int) -> list[int]:
        last, seen = None, 0
        async for snapshot in engine.submit(PROMPTS[index], greedy()):
            assert len(snapshot.outputs[0].token_ids) >= seen
            last, seen = snapshot, len(snapshot.outputs[0].token_ids)
            if index == 3:
                await asyncio.sleep(0.02)  # a slow reader gets fewer snapshots, not late ones
        return last.outputs[0].token_ids

    async def everything():
        results = await asyncio.gather(*(read(index) for index in range(len(PROMPTS))))
        final = await engine.submit(PROMPTS[0], greedy()).aresult()
        stream = engine.submit([5, 6], greedy(400))
        async for snapshot in stream:
            if len(snapshot.outputs[0].token_ids) > 3:
                stream.abort()
        return results, final, snapshot

    results, final, aborted = asyncio.run(everything())
    assert results == [hf(oracle, prompt) for prompt in PROMPTS]
    assert final.finished and aborted.outputs[0].finish_reason == "abort" and len(aborted.outputs[0].token_ids) < 400
    engine.check()


def test_threads_that_read_drop_and_abort_at_random(build, oracle):
    one = build(num_blocks=30, max_num_seqs=5, max_num_batched_tokens=24, enable_prefix_caching=True)
    expected = {length: hf(oracle, list(range(3, 3 + length)), 25) for length in (2, 20, 50)}
    failures: list[str] = []

    def worker(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            length = rng.choice(list(expected))
            stream = one.submit(list(range(3, 3 + length)), greedy(25, n=rng.choice([1, 1, 2]), stop=rng.choice([[], ["zzz"]])))
            way = rng.randrange(4)
            if way == 0:
                del stream
            elif way == 1:
                stream.abort()
                stream.result()
            else:
                output = stream.result() if way == 2 else list(stream)[-1]
                if any(answer.token_ids != expected[length] for answer in output.outputs):
                    failures.append(f"{seed}: {output}")

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    wait_until(lambda: one.stats()["running"] + one.stats()["waiting"] == 0)
    one.check()


def test_a_dead_event_loop_does_not_disturb_the_others(engine, oracle):
    async def leave():
        stream = engine.submit([5, 6], greedy(200))
        await stream.__anext__()
        return stream

    stream = asyncio.run(leave())  # its event loop is closed while the request runs
    assert answers(engine.generate(PROMPTS[1], greedy()))[0] == hf(oracle, PROMPTS[1])
    stream.abort()
    assert stream.result().finished


def test_stats_count(build):
    one = build(enable_prefix_caching=True)
    one.generate([list(range(3, 40))] * 1, greedy(5))
    one.generate([list(range(3, 40))] * 1, greedy(5))
    stats = one.stats()
    assert (stats["prompt_tokens"], stats["cached_tokens"], stats["generated_tokens"], stats["finished_requests"]) == (74, 32, 10, 2)
    assert stats["total_blocks"] == stats["free_blocks"] == 64 and stats["cached_blocks"] == 2


def test_llm(model_dir, oracle):
    from swiftlite import LLM

    llm = LLM(str(model_dir), dtype="float32", device="cpu", num_blocks=64)
    outputs = llm.generate(["Hello, how are", "你好"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert [output.prompt for output in outputs] == ["Hello, how are", "你好"]
    assert answers(outputs) == [hf(oracle, output.prompt_token_ids, 8) for output in outputs]
    chat = llm.chat([{"role": "user", "content": "你好"}], SamplingParams(max_tokens=3))
    assert "<|im_start|>user" in llm.engine.tokenizer.decode(chat[0].prompt_token_ids)
    with pytest.raises(SwiftError, match="max_model_len"):
        LLM(str(model_dir), max_model_length=5)
