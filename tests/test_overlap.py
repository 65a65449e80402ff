"""Steps that overlap, as on a GPU: the same answers as step by step, whatever is asked, and what happens in which order."""

from __future__ import annotations

import random
import time

import pytest

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.request import CompletionOutput, RequestOutput, SamplingParams
from swiftlite.engine.sampler import Drawn

WORDS = [5, 9, 44, 101, 200, 301, 302, 303, 333, 350]  # ids that end some answers


@pytest.fixture(scope="module")
def model_dir(make_model):
    return make_model("llama")


@pytest.fixture
def build(model_dir):
    """build(**EngineConfig fields) -> engine that is checked and shut down at the end of the test."""
    made: list[Engine] = []

    def make(adapters=None, **config) -> Engine:
        settings = {"num_blocks": 64, "overlap": True, **config}
        made.append(Engine(model_dir, EngineConfig(**settings), device="cpu", dtype="float32", adapters=adapters))
        return made[-1]

    yield make
    for one in made:
        one.check()
        stats = one.stats()
        assert stats["free_blocks"] == stats["total_blocks"] and one._loop._steps.idle
        one.shutdown()


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def greedy(tokens: int, **params) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **params})


# -- the same answers


def random_params(rng: random.Random, number: int) -> SamplingParams:
    choose, tokens = rng.choice, rng.choice([1, 1, 2, 7, 30, 60])
    if rng.random() < 0.15:
        return SamplingParams(use_beam_search=True, n=choose([1, 2]), best_of=3, max_tokens=min(tokens, 9), stop_token_ids=WORDS)
    sampled = {"top_k": choose([0, 3, 40, 90]), "top_p": choose([1.0, 1.0, 0.8]), "min_p": choose([0.0, 0.0, 0.1])}
    counted = {"presence_penalty": 0.8, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    return SamplingParams(
        seed=number, max_tokens=tokens, temperature=choose([0, 0, 0.7, 1.3]), n=choose([1, 1, 1, 2, 3]),
        stop_token_ids=choose([[], WORDS, [number % 500]]), stop=choose([[], [], ["e"], ["th", "zzz"], ["1"]]),
        min_tokens=choose([0, 0, 1]), ignore_eos=choose([True, False]), include_stop_str_in_output=choose([True, False]),
        logit_bias=choose([None, None, {5: 2.0}]), logprobs=choose([None, None, 0, 3]), prompt_logprobs=choose([None, None, None, 1]),
        **sampled, **(counted if rng.random() < 0.3 else {}),
    )  # fmt: skip


def assert_same(one: RequestOutput, other: RequestOutput) -> None:
    def facts(answer: CompletionOutput) -> tuple:
        return answer.index, answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason

    assert one.finished and other.finished and one.error is other.error is None
    assert list(map(facts, one.outputs)) == list(map(facts, other.outputs))
    pairs = [(one.prompt_logprobs, other.prompt_logprobs)]
    for mine, theirs in zip(one.outputs, other.outputs, strict=True):
        assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
        pairs.append((mine.logprobs, theirs.logprobs))
        assert mine.logprobs is None or len(mine.logprobs) == len(mine.token_ids)
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        for entry, wanted in zip(mine or [], theirs or [], strict=True):
            if entry is None or wanted is None:  # the first prompt token's
                assert entry is wanted
                continue
            assert entry.token_id == wanted.token_id and entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert list(entry.top.values()) == pytest.approx(list(wanted.top.values()), abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_gets_the_same_answers(build, model_dir, make_adapter, seed):
    """Greedy, seeded, cut, penalised and biased answers, stops, siblings, beams, log-probabilities and adapters, with few blocks."""
    rng = random.Random(seed)
    settings = {
        "num_blocks": rng.choice([10, 14, 40]), "max_num_seqs": rng.choice([3, 8, 32]), "max_num_batched_tokens": rng.choice([9, 40, 512]),
        "enable_prefix_caching": rng.random() < 0.7, "adapters": {"a": str(make_adapter(model_dir, seed=1))},
    }  # fmt: skip
    late, wanted = build(**settings), build(**settings, overlap=False)
    stems = [[rng.randrange(3, 90) for _ in range(40)] for _ in range(3)]
    prompts = [rng.choice(stems)[: rng.randint(0, 40)] + [rng.randrange(3, 90) for _ in range(rng.randint(1, 9))] for _ in range(40)]
    params = [random_params(rng, number) for number in range(len(prompts))]
    names = [rng.choice([None, None, "a"]) for _ in prompts]
    for one, other in zip(late.generate(prompts, params, names), wanted.generate(prompts, params, names), strict=True):
        assert_same(one, other)
    counters = [(engine.stats()["generated_tokens"], engine.stats()["prompt_tokens"]) for engine in (late, wanted)]
    assert counters[0] == counters[1]
    if settings["num_blocks"] == 10:
        assert late.stats()["preemptions"] > 0


def test_prefixes_are_found_as_step_by_step(build):
    """Up to the last block: prompts and answers that end on its edge, and one token before and after it; stops and lengths."""
    late, wanted = build(num_blocks=128), build(num_blocks=128, overlap=False)
    for length in range(28, 37):
        prompt = [length] * length
        [stop, _] = [engine.generate(prompt, greedy(12))[0].outputs[0].token_ids[5:6] for engine in (wanted, late)]
        for params in (greedy(12), greedy(12, stop_token_ids=stop)):
            found = []
            for engine in (late, wanted):
                first = engine.generate(prompt, params)[0]
                second = engine.generate(prompt + first.outputs[0].token_ids + [7], greedy(1))[0]
                found.append((first.num_cached_tokens, second.num_cached_tokens))
            assert found[0] == found[1] and found[0][1] >= 16


def test_streams_show_known_tokens_only(build):
    one = build()
    params = greedy(60, n=2, logprobs=1)
    whole = one.generate([3, 4, 5], params)[0].outputs[0]
    for snapshot in one.submit([3, 4, 5], params):
        for answer in snapshot.outputs:
            count = len(answer.token_ids)
            assert answer.token_ids == whole.token_ids[:count] and whole.text.startswith(answer.text)
            assert [entry.token_id for entry in answer.logprobs] == answer.token_ids[: len(answer.logprobs)]


def test_aborts_at_any_time_leave_nothing(build):
    one = build(num_blocks=14, max_num_seqs=5, max_num_batched_tokens=24)
    expected = one.generate([7] * 20, greedy(40))[0].outputs[0].token_ids
    rng = random.Random(0)
    for _ in range(40):
        streams = [one.submit([7] * 20, greedy(40, n=rng.choice([1, 2]))) for _ in range(4)]
        steps = one.stats()["steps"] + rng.randrange(12)
        wait_until(lambda steps=steps, streams=streams: one.stats()["steps"] >= steps or all(s.finished for s in streams))
        for stream in streams[1:]:
            stream.abort()
        for stream in streams[1:]:
            for answer in stream.result().outputs:
                assert answer.token_ids == expected[: len(answer.token_ids)] and answer.finish_reason in ("abort", "length")
        one.check()
        assert all(answer.token_ids == expected for answer in streams[0].result().outputs)
    streams = [one.submit([7] * 20, greedy(40)) for _ in range(3)]
    wait_until(lambda: one.stats()["running"] > 0)
    for stream in streams:
        stream.abort()
    wait_until(lambda: one._loop._steps.idle)  # what the aborted left on the device is let go


# -- the order of things


@pytest.fixture
def journal(monkeypatch):
    """journal(engine) -> string that grows by E for each forward that is launched and by r for each reading of tokens."""
    written: list[str] = []
    read = Drawn.read
    monkeypatch.setattr(Drawn, "read", lambda self: (written.append("r"), read(self))[1])

    def watch(engine: Engine):
        execute = engine.runner.execute
        monkeypatch.setattr(engine.runner, "execute", lambda *arguments: (written.append("E"), execute(*arguments))[1])
        written.clear()
        return lambda: "".join(written)

    return watch


def test_tokens_are_read_while_the_next_step_runs(build, journal):
    one = build()
    seen = journal(one)
    one.generate([3, 4, 5], greedy(4))
    assert seen() == "E" + "Er" * 3 + "r", "the last token by length is foreseen: no forward is wasted"


def test_a_stop_costs_one_forward(build, journal):
    one = build()
    third = one.generate([3, 4, 5], greedy(9))[0].outputs[0].token_ids[2]
    seen = journal(one)
    answer = one.generate([3, 4, 5], greedy(9, stop_token_ids=[third]))[0].outputs[0]
    assert seen() == "E" + "Er" * len(answer.token_ids) and answer.finish_reason == "stop"


def test_what_cannot_overlap_does_not(build, journal):
    drafting = build(speculate_ngram=4)
    seen = journal(drafting)
    drafting.generate([3, 4, 5], greedy(4))
    assert seen().startswith("ErEr") and not drafting._loop._steps.overlap
    default = build(overlap=None)
    default.generate([3], greedy(1))
    assert default.config.overlap is False, "a CPU that runs the next step has no time for the last one"


# -- failures


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
def test_a_step_that_cannot_be_launched_takes_only_its_own(build, monkeypatch, overlap):
    """The tokens of the step before are still given out: one answer has its last one among them."""
    one = build(overlap=overlap)
    wanted = [output.outputs[0].token_ids for output in one.generate([[3, 4], [5]], greedy(9))]
    execute, calls = one.runner.execute, []

    def fourth_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return execute(*arguments)

    monkeypatch.setattr(one.runner, "execute", fourth_fails)
    whole, broken = one.generate([[3, 4], [5]], [greedy(3), greedy(9)])
    assert whole.error is None and whole.outputs[0].finish_reason == "length" and whole.outputs[0].token_ids == wanted[0][:3]
    assert "out of luck" in broken.error and broken.outputs[0].token_ids == wanted[1][:3]
    one.check()
    assert one.healthy and one.generate([5], greedy(9))[0].outputs[0].token_ids == wanted[1]


def test_a_step_that_fails_on_the_device_ends_its_batch(build, monkeypatch):
    """A GPU reports it when the tokens are read; the step that was launched meanwhile goes on for those who came with it."""
    one = build()
    wanted = one.generate([5], greedy(9))[0].outputs[0].token_ids
    read, fail = Drawn.read, [True]

    def fails(drawn):
        if fail[0]:
            raise RuntimeError("device-side assert")
        return read(drawn)

    with monkeypatch.context() as patch:
        patch.setattr(Drawn, "read", fails)
        for _ in range(3):
            assert one.healthy
            output = one.generate([5], greedy(9))[0]
            assert "device-side assert" in output.error and output.outputs[0].token_ids == []
            one.check()
    assert not one.healthy, "three failed steps in a row"
    assert one.generate([5], greedy(9))[0].outputs[0].token_ids == wanted
    assert one.healthy and one.stats()["failed_steps"] == 3


def test_a_bug_while_tokens_are_unread_does_not_kill_the_loop(build, monkeypatch):
    one = build()
    wanted = one.generate([5], greedy(9))[0].outputs[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(type(one._loop._steps), "_append", lambda *_: 1 / 0)
        output = one.generate([5], greedy(9))[0]
        assert output.outputs[0].finish_reason == "error" and "ZeroDivisionError" in output.error
    one.check()
    assert one.generate([5], greedy(9))[0].outputs[0].token_ids == wanted
