"""n-gram speculation: the tokens of plain greedy decoding, in fewer steps, and nothing of a rejected draft left behind."""

from __future__ import annotations

import random
import shutil
import time

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoModelForCausalLM

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.request import SamplingParams
from swiftlite.engine.spec import NgramIndex, count_accepted

REPEATED = [11, 52, 93, 14, 75, 36, 27] * 6
PROMPTS = [REPEATED, list(range(3, 20)), [5], [7, 8] * 20, REPEATED + list(range(40, 60))]


def greedy(tokens: int = 40, **params) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, **params})


@pytest.fixture(scope="module")
def model_dir(make_model, tmp_path_factory):
    """A model that repeats itself now and then: it says twelve tokens only, and weak attention makes the last ones decide."""
    path = tmp_path_factory.mktemp("repeating")
    shutil.copytree(make_model("llama"), path, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.lm_head.weight.data[12:] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.3
    model.save_pretrained(path)
    return path


@pytest.fixture
def build(model_dir):
    made: list[Engine] = []

    def make(directory=model_dir, adapters=None, **config) -> Engine:
        settings = {"num_blocks": 64, "speculate_ngram": 5, **config}
        made.append(Engine(directory, EngineConfig(**settings), device="cpu", dtype="float32", adapters=adapters))
        return made[-1]

    yield make
    for one in made:
        one.check()
        one.shutdown()


@pytest.fixture(scope="module")
def oracle(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def hf(model, prompt: list[int], tokens: int = 40, ends: list[int] | None = None) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def answers(outputs) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


# -- drafts


def test_the_last_occurrence_of_the_longest_match_goes_on():
    index = NgramIndex([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 8)
    assert index.propose([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 3) == [4, 9, 2], "1 2 3 matches before 2 3, which came later"
    assert index.propose([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3, 9, 2], 2) == [3, 5]
    assert index.propose([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3, 9, 2, 6], 2) == []
    assert NgramIndex([], 4).propose([7], 4) == NgramIndex([7], 4).propose([7, 7], 4) == []


def test_a_cycle_goes_on_repeating():
    tokens = [1, 2, 3, 1, 2, 3]
    assert NgramIndex(tokens, 8).propose(tokens, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert NgramIndex([4] * 5, 8).propose([4] * 5, 3) == [4, 4, 4]


def test_index_grown_in_pieces_is_the_index_of_the_whole():
    rng = random.Random(0)
    tokens = [rng.randrange(4) for _ in range(200)]
    grown = NgramIndex(tokens[:3], 9)
    for length in range(3, 200, 7):
        assert grown.propose(tokens[:length], 9) == NgramIndex(tokens[:length], 9).propose(tokens[:length], 9)


def test_drafts_shrink_and_grow_with_their_success():
    index = NgramIndex([4] * 5, 8)
    index.learn(8, 2, 8)
    assert index.limit == 3
    index.learn(3, 3, 8)
    index.learn(6, 6, 8)
    assert index.limit == 8
    index.learn(8, 0, 8)
    assert index.limit == 1


def test_acceptance_ends_at_the_first_difference():
    assert count_accepted([1, 2, 3], [1, 2, 3, 4]) == 3
    assert count_accepted([1, 9, 3], [1, 2, 3, 4]) == 1
    assert count_accepted([9, 2, 3], [-1, 2, 3, 4]) == 0


# -- in the engine


def test_equals_transformers_in_fewer_steps(build, oracle):
    one = build()
    expected = [hf(oracle, prompt) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        assert answers(one.generate(prompt, greedy())) == [answer]
    stats = one.stats()
    assert stats["steps"] < 0.7 * 40 * len(PROMPTS) and stats["generated_tokens"] == 40 * len(PROMPTS)
    assert 0 < stats["accepted_tokens"] < stats["draft_tokens"], "both kinds must happen or the test proves little"
    assert answers(one.generate(PROMPTS, greedy())) == expected
    one.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, make_model, build):
    directory = make_model(family)
    attention = "eager" if family == "gemma2" else "sdpa"  # sdpa has no soft cap
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()
    one = build(directory)
    assert answers(one.generate(PROMPTS[:4], greedy(30))) == [hf(oracle, prompt, 30) for prompt in PROMPTS[:4]]


@pytest.mark.parametrize(
    "config",
    [
        {"max_num_batched_tokens": 7},
        {"num_blocks": 7},
        {"num_blocks": 12, "enable_prefix_caching": False},
        {"block_size": 4, "num_blocks": 60},
        {"max_num_seqs": 2, "speculate_ngram": 16},
        {"speculate_ngram": 1},
    ],
)
def test_short_of_budget_blocks_and_seats(build, oracle, config):
    one = build(**config)
    for _ in range(2):  # the second time with a warm prefix cache
        assert answers(one.generate(PROMPTS, greedy())) == [hf(oracle, prompt) for prompt in PROMPTS]
    assert one.stats()["accepted_tokens"] > 0
    if config.get("num_blocks", 64) < 10:
        assert one.stats()["preemptions"] > 0


def test_only_accepted_tokens_are_found_again(build, oracle):
    """A second turn over the answer hits the cache and goes on as without it: no rejected token's K/V is in a cached block."""
    one = build(block_size=4, num_blocks=200)
    for prompt in PROMPTS:
        turn = prompt + one.generate(prompt, greedy())[0].outputs[0].token_ids
        again = one.generate(turn, greedy(10))[0]
        assert again.num_cached_tokens >= (len(turn) - 1) // 4 * 4 - 4
        assert again.outputs[0].token_ids == hf(oracle, turn, 10)
    assert one.stats()["accepted_tokens"] < one.stats()["draft_tokens"]


def test_stops_inside_a_draft(build, oracle):
    """End tokens, stop strings and the length limit end the answer where plain decoding does, though the draft went further."""
    one = build()
    plain = build(speculate_ngram=0)
    whole = hf(oracle, REPEATED)
    for token in sorted(set(whole)):
        found = one.generate(REPEATED, greedy(stop_token_ids=[token]))[0].outputs[0]
        assert found.token_ids == hf(oracle, REPEATED, 40, [token]) and found.stop_reason == token
    for tokens in range(1, 24):
        assert answers(one.generate(REPEATED, greedy(tokens))) == [whole[:tokens]]
    text = plain.generate(REPEATED, greedy())[0].outputs[0].text
    for start in range(0, min(len(text), 30), 3):
        params = greedy(stop=[text[start : start + 2]])
        expected, found = (engine.generate(REPEATED, params)[0].outputs[0] for engine in (plain, one))
        assert (found.text, found.token_ids, found.stop_reason) == (expected.text, expected.token_ids, expected.stop_reason)
    assert one.stats()["accepted_tokens"] > 100


def test_others_in_the_batch_are_not_speculated(build, oracle):
    one, plain = build(), build(speculate_ngram=0)
    wishes = [
        greedy(), greedy(repetition_penalty=1.3), greedy(logit_bias={9: 2.0}), greedy(min_tokens=5, stop_token_ids=[9]),
        SamplingParams(seed=3, max_tokens=40, ignore_eos=True), SamplingParams(seed=4, top_p=0.7, n=2, max_tokens=40, ignore_eos=True),
        SamplingParams(use_beam_search=True, n=3, max_tokens=20, ignore_eos=True),
    ]  # fmt: skip
    assert answers(one.generate([REPEATED] * len(wishes), wishes)) == answers(plain.generate([REPEATED] * len(wishes), wishes))
    assert one.stats()["draft_tokens"] <= 5 * 40, "one request of eight was speculated"
    before = one.stats()["draft_tokens"]
    assert before > 0
    one.generate([REPEATED] * (len(wishes) - 1), wishes[1:])
    assert one.stats()["draft_tokens"] == before


def test_logprobs_siblings_and_prompt_logprobs(build, oracle):
    one, plain = build(), build(speculate_ngram=0)
    params = greedy(20, logprobs=2, prompt_logprobs=1, n=2)
    expected, found = (engine.generate(REPEATED, params)[0] for engine in (plain, one))
    for want, got in zip(expected.outputs, found.outputs, strict=True):
        assert got.token_ids == want.token_ids and len(got.logprobs) == 20
        assert [entry.logprob for entry in got.logprobs] == pytest.approx([entry.logprob for entry in want.logprobs], abs=2e-5)
        assert [list(entry.top) for entry in got.logprobs] == [list(entry.top) for entry in want.logprobs]
        assert got.cumulative_logprob == pytest.approx(want.cumulative_logprob, abs=1e-4)
    assert len(found.prompt_logprobs) == len(REPEATED) and one.stats()["accepted_tokens"] > 0


def test_adapters(model_dir, make_adapter, build):
    paths = {name: str(make_adapter(model_dir, seed=seed)) for seed, name in enumerate("ab")}
    one, plain = build(adapters=paths), build(adapters=paths, speculate_ngram=0)
    jobs = ([REPEATED] * 3 + [PROMPTS[3]] * 3, greedy(), [None, "a", "b"] * 2)
    assert answers(one.generate(*jobs)) == answers(plain.generate(*jobs))


def test_streams_never_show_a_draft(build, oracle):
    one = build()
    expected = hf(oracle, REPEATED, 200)
    for snapshot in one.submit(REPEATED, greedy(200)):
        assert snapshot.outputs[0].token_ids == expected[: len(snapshot.outputs[0].token_ids)]
    assert len(snapshot.outputs[0].token_ids) == 200


def test_aborts_leave_nothing(build):
    one = build(num_blocks=24, max_num_seqs=4, max_num_batched_tokens=32)
    rng = random.Random(0)
    for _ in range(25):
        streams = [one.submit(rng.choice(PROMPTS), greedy(100, n=rng.choice([1, 2]))) for _ in range(4)]
        end = one.stats()["steps"] + rng.choice([1, 4, 12])
        while one.stats()["steps"] < end and not all(stream.finished for stream in streams):
            time.sleep(0.0005)
        for stream in streams:
            stream.abort()
        assert all(stream.result().finished for stream in streams)
        one.check()
        assert one.stats()["free_blocks"] == 24


def test_bad_logits_after_an_accepted_draft_end_the_request(build, monkeypatch):
    one = build()
    execute = one.runner.execute

    def poisoned(scheduled):
        logits = execute(scheduled)
        if any(item.draft for item in scheduled):
            logits[-1, 3] = float("nan")
        return logits

    monkeypatch.setattr(one.runner, "execute", poisoned)
    output = one.generate(REPEATED, greedy(300))[0]
    assert output.outputs[0].finish_reason == "error" and "not finite" in output.error
