"""Beam search: tokens and scores of transformers' num_beams, whatever runs beside it, and blocks shared between beams."""

from __future__ import annotations

import random
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from swiftlite.engine.beam import BeamSearch
from swiftlite.engine.config import EngineConfig
from swiftlite.engine.engine import Engine
from swiftlite.engine.request import RequestOutput, SamplingParams
from swiftlite.errors import RequestError

PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 17, 40, 64)]
ENDS = [5, 9, 44, 101, 200, 301, 302, 303, 333, 350, 11, 12, 13, 14, 15, 16]  # end tokens: enough that beams end at many lengths


def beam(width: int, tokens: int = 14, **params) -> SamplingParams:
    settings = {"use_beam_search": True, "n": width, "max_tokens": tokens, "ignore_eos": True, **params}
    return SamplingParams(**settings)


@pytest.fixture(scope="module")
def model_dir(make_model):
    return make_model("llama")


@pytest.fixture(scope="module")
def oracle(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture
def build(model_dir):
    made: list[Engine] = []

    def make(directory=model_dir, adapters=None, **config) -> Engine:
        settings = {"num_blocks": 64, **config}
        made.append(Engine(directory, EngineConfig(**settings), device="cpu", dtype="float32", adapters=adapters))
        return made[-1]

    yield make
    for one in made:
        one.check()
        one.shutdown()


@torch.no_grad()
def hf(model, prompt: list[int], width: int, tokens: int = 14, ends: list[int] | None = None, **settings) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, max_new_tokens=tokens, do_sample=False,
        eos_token_id=ends, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **settings,
    )  # fmt: skip
    found = []
    for row, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((index + 1 for index, token in enumerate(row) if ends and token in ends), len(row))
        found.append((row[:end], score))
    return found


def assert_equal(output: RequestOutput, expected: list[tuple[list[int], float]], length_penalty: float = 1.0) -> None:
    assert output.finished and output.error is None
    assert [answer.token_ids for answer in output.outputs] == [tokens for tokens, _ in expected]
    for answer, (tokens, score) in zip(output.outputs, expected, strict=True):
        assert answer.cumulative_logprob / len(tokens) ** length_penalty == pytest.approx(score, rel=1e-6, abs=2e-5)


# -- as transformers


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("ends", [None, ENDS[:1], ENDS])
def test_equals_transformers(build, oracle, width, ends):
    one = build()
    if width == 1:  # transformers has no beam search of one beam; it is greedy, and ends alike
        for prompt in PROMPTS:
            greedy = one.generate(prompt, SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, stop_token_ids=ends or []))[0]
            found = one.generate(prompt, beam(1, stop_token_ids=ends or []))[0]
            assert found.outputs[0].token_ids == greedy.outputs[0].token_ids
        return
    ended = 0
    for prompt in PROMPTS:
        expected = hf(oracle, prompt, width, ends=ends)
        output = one.generate(prompt, beam(width, stop_token_ids=ends or []))[0]
        assert_equal(output, expected)
        for answer in output.outputs:
            stopped = bool(ends) and answer.token_ids[-1] in ends
            assert (answer.finish_reason, answer.stop_reason) == (("stop", answer.token_ids[-1]) if stopped else ("length", None))
            ended += len(answer.token_ids) < 14
    assert ended or ends != ENDS, "no beam ended early: the test proves little"
    one.check()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 2.0])
def test_length_penalty_and_early_stopping(build, oracle, length_penalty, early_stopping):
    one = build()
    for prompt in PROMPTS[:3]:
        expected = hf(oracle, prompt, 4, 20, ENDS, length_penalty=length_penalty, early_stopping=early_stopping)
        params = beam(4, 20, stop_token_ids=ENDS, length_penalty=length_penalty, early_stopping=early_stopping)
        assert_equal(one.generate(prompt, params)[0], expected, length_penalty)


def test_penalty_bias_and_least_length_as_transformers_processors(build, oracle):
    one = build()
    bias = {(7,): 3.0, (60,): -4.0}
    for prompt in PROMPTS[1:4]:
        expected = hf(oracle, prompt, 3, ends=ENDS, repetition_penalty=1.3, min_new_tokens=6)
        assert_equal(one.generate(prompt, beam(3, stop_token_ids=ENDS, repetition_penalty=1.3, min_tokens=6))[0], expected)
        expected = hf(oracle, prompt, 3, sequence_bias=bias)
        assert_equal(one.generate(prompt, beam(3, logit_bias={key[0]: value for key, value in bias.items()}))[0], expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral"])
def test_other_families(make_model, build, family):
    directory = make_model(family)
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for output, prompt in zip(build(directory).generate(PROMPTS[2:4], beam(4)), PROMPTS[2:4], strict=True):
        assert_equal(output, hf(oracle, prompt, 4))


def test_best_of_returns_the_n_best(build, oracle):
    expected = hf(oracle, PROMPTS[2], 5, ends=ENDS)
    assert_equal(build().generate(PROMPTS[2], beam(2, best_of=5, stop_token_ids=ENDS))[0], expected[:2])


# -- beside others, in any order of work


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_batched_tokens": 9},
        {"enable_prefix_caching": False},
        {"num_blocks": 9},
        {"num_blocks": 6, "enable_prefix_caching": False},
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "num_blocks": 12},
        {"block_size": 4, "num_blocks": 48},
        {"speculate_ngram": 4},
    ],
)
def test_mixed_with_others_and_short_of_memory(build, oracle, config):
    """Searches of several widths beside greedy and sampled requests; few blocks and seats make the beams take turns."""
    one = build(**config)
    prompts = PROMPTS[:4]
    expected = {(index, width): hf(oracle, prompt, width, ends=ENDS) for index, prompt in enumerate(prompts) for width in (2, 4)}
    with torch.no_grad():
        plain = [
            oracle.generate(torch.tensor([p]), max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)[0] for p in prompts
        ]
    sent = [(index, width) for index in range(len(prompts)) for width in (0, 2, 4)]
    greedy = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    outputs = one.generate([prompts[index] for index, _ in sent], [beam(w, stop_token_ids=ENDS) if w else greedy for _, w in sent])
    for (index, width), output in zip(sent, outputs, strict=True):
        if width:
            assert_equal(output, expected[index, width])
        else:
            assert output.outputs[0].token_ids == plain[index][len(prompts[index]) :].tolist()
    if config.get("num_blocks", 64) < 10:
        assert one.stats()["preemptions"] > 0
    one.check()


def test_adapters(model_dir, make_adapter, build):
    from peft import PeftModel

    adapter = make_adapter(model_dir, seed=3)
    one = build(adapters={"a": str(adapter)})
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    wanted = [hf(base, PROMPTS[2], 4)]
    wanted.append(hf(PeftModel.from_pretrained(base, adapter).eval(), PROMPTS[2], 4))
    assert wanted[0] != wanted[1]
    outputs = one.generate([PROMPTS[2]] * 2, beam(4), adapter=[None, "a"])
    for output, expected in zip(outputs, wanted, strict=True):
        assert_equal(output, expected)


def test_beams_share_blocks(build):
    one = build(block_size=4, num_blocks=200, enable_prefix_caching=False)
    prompt, most = list(range(3, 3 + 50)), 0
    stream = one.submit(prompt, beam(4, 30))
    while not stream.finished:
        most = max(most, one.stats()["total_blocks"] - one.stats()["free_blocks"])
        time.sleep(0.0005)
    separate = 4 * -(-(50 + 30) // 4)
    assert 0 < most <= 12 + 4 * 8 + 1 < 0.63 * separate
    one.check()


# -- what users see


def test_stream_shows_the_answers_at_the_end(build):
    one = build()
    snapshots = list(one.submit("Hello, how", beam(3)))
    assert all(answer.token_ids == [] and answer.text == "" for snapshot in snapshots[:-1] for answer in snapshot.outputs)
    last = snapshots[-1]
    assert last.finished and len(last.outputs) == 3 and len({tuple(answer.token_ids) for answer in last.outputs}) == 3
    for answer in last.outputs:
        assert answer.text == one.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    again = one.generate(list(range(3, 60)), beam(2))[0], one.generate(list(range(3, 60)), beam(2))[0]
    assert [output.num_cached_tokens for output in again] == [0, 48]


def test_stop_strings_end_beams(build):
    one = build()
    free = one.generate(PROMPTS[2], beam(4, 20))[0].outputs
    stop = free[0].text[1:3]
    for include in (False, True):
        output = one.generate(PROMPTS[2], beam(4, 20, stop=[stop], include_stop_str_in_output=include))[0]
        stopped = [answer for answer in output.outputs if answer.finish_reason == "stop"]
        assert stopped and all(answer.stop_reason == stop for answer in stopped)
        for answer in output.outputs:
            assert (stop in answer.text) == (include and answer in stopped)
            assert answer.finish_reason == "stop" or len(answer.token_ids) == 20


def test_logprobs_add_up(build, oracle):
    output = build().generate(PROMPTS[3], beam(3, logprobs=2, prompt_logprobs=1, stop_token_ids=ENDS))[0]
    assert len(output.prompt_logprobs) == len(PROMPTS[3])
    for answer in output.outputs:
        with torch.no_grad():
            expected = oracle(torch.tensor([PROMPTS[3] + answer.token_ids])).logits[0, len(PROMPTS[3]) - 1 : -1].log_softmax(-1)
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(
            expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0].tolist(), abs=2e-5
        )
        assert [list(entry.top) for entry in answer.logprobs] == expected.topk(2).indices.tolist()
        assert answer.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in answer.logprobs))


def test_no_tokens_or_one(build, oracle):
    one = build()
    nothing = one.generate(PROMPTS[1], beam(3, 0))[0]
    assert [(answer.token_ids, answer.finish_reason) for answer in nothing.outputs] == [([], "length")] * 3
    assert_equal(one.generate(PROMPTS[1], beam(3, 1))[0], hf(oracle, PROMPTS[1], 3, 1))


def test_fewer_continuations_than_beams(build):
    """A bias leaves two tokens: four answers of one token cannot be found."""
    one = build()
    bias = dict.fromkeys(range(one.vocab_size), -float("inf")) | {7: 0.0, 8: 0.0}
    output = one.generate(PROMPTS[1], beam(4, 1, logit_bias=bias))[0]
    assert sorted(answer.token_ids[0] for answer in output.outputs[:2]) == [7, 8]
    assert all(answer.finish_reason == "length" for answer in output.outputs)
    four = one.generate(PROMPTS[1], beam(4, 2, logit_bias=bias))[0]
    assert len({tuple(answer.token_ids) for answer in four.outputs}) == 4


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"use_beam_search": True, "n": 3, "best_of": 2}, "best_of must be at least n"),
        ({"use_beam_search": True, "early_stopping": "maybe"}, "early_stopping"),
        ({"best_of": 4}, "add use_beam_search"),
        ({"length_penalty": 2.0}, "add use_beam_search"),
        ({"early_stopping": True}, "add use_beam_search"),
        ({"use_beam_search": True, "length_penalty": float("nan")}, "length_penalty"),
        ({"use_beam_search": True, "length_penalty": 5000.0}, "length_penalty must lie"),
        ({"use_beam_search": True, "length_penalty": -5000}, "length_penalty must lie"),
    ],
)
def test_what_is_refused(params, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**params)


def test_width_is_limited(build):
    with pytest.raises(RequestError, match="best_of is 1000, at most 128"):
        build().submit([5], beam(1, best_of=1000))


# -- ends at any moment


def test_abort_at_every_stage_leaves_nothing(model_dir, make_adapter, build):
    one = build(adapters={"a": str(make_adapter(model_dir, seed=1))}, num_blocks=30, max_num_seqs=6, max_num_batched_tokens=16)
    rng = random.Random(0)
    for _ in range(25):
        streams = [
            one.submit(
                [rng.randrange(3, 90) for _ in range(rng.choice([2, 30, 60]))],
                beam(rng.choice([2, 5]), 30, stop=["zzz"] if rng.random() < 0.3 else [], stop_token_ids=ENDS[:3]),
                adapter=rng.choice([None, "a"]),
            )
            for _ in range(4)
        ]
        end = one.stats()["steps"] + rng.choice([0, 1, 2, 4, 8, 16])
        while one.stats()["steps"] < end and not all(stream.finished for stream in streams):
            time.sleep(0.0005)
        for stream in streams:
            stream.abort()
        for stream in streams:
            output = stream.result()
            assert output.finished and all(answer.finish_reason in ("abort", "length", "stop") for answer in output.outputs)
        one.check()
        assert one.stats()["free_blocks"] == 30 and one.stats()["running"] == one.stats()["waiting"] == 0


def test_an_aborted_search_shows_its_best_so_far(build):
    one = build()
    stream = one.submit(PROMPTS[3], beam(3, 400))
    while one.stats()["generated_tokens"] < 20:
        time.sleep(0.0005)
    stream.abort()
    answers = stream.result().outputs
    assert len(answers) == 3 and all(answer.finish_reason == "abort" and answer.token_ids and answer.text for answer in answers)
    assert answers[0].cumulative_logprob >= answers[-1].cumulative_logprob


def test_bad_logits_end_the_search_alone(build, oracle, monkeypatch):
    one = build()
    execute = one.runner.execute

    def poisoned(scheduled):
        logits = execute(scheduled)
        for row, item in enumerate(scheduled):
            if item.seq.token_ids[0] == 99 and len(item.seq.token_ids) >= 6:
                logits[row, 3] = float("nan")
        return logits

    monkeypatch.setattr(one.runner, "execute", poisoned)
    good, bad = one.generate([PROMPTS[1], [99, 4]], beam(3))
    assert_equal(good, hf(oracle, PROMPTS[1], 3))
    assert all(answer.finish_reason == "error" for answer in bad.outputs) and "not finite" in bad.error


def test_a_search_that_fails_leaves_the_engine_running(build, oracle, monkeypatch):
    one = build()
    with monkeypatch.context() as patch:
        patch.setattr(BeamSearch, "_score", lambda *_: 1 / 0)
        searched, plain = one.generate(PROMPTS[:2], [beam(2), SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)])
    assert "ZeroDivisionError" in searched.error and "ZeroDivisionError" in plain.error
    assert_equal(one.generate(PROMPTS[1], beam(2))[0], hf(oracle, PROMPTS[1], 2))


@pytest.mark.parametrize("overlap", [False, True])
def test_siblings_that_start_beside_a_beam_get_their_own_row(build, oracle, overlap):
    """As many tokens are sampled as the step has rows, but not one from each: the beam's row is nobody's, the prompt's is two's."""
    one = build(overlap=overlap)
    params = [beam(2, 4), SamplingParams(n=2, temperature=0, max_tokens=4, ignore_eos=True)]
    searched, plain = one.generate([PROMPTS[1], PROMPTS[2]], params)
    assert_equal(searched, hf(oracle, PROMPTS[1], 2, 4))
    alone = one.generate(PROMPTS[2], params[1])[0]
    assert [answer.token_ids for answer in plain.outputs] == [answer.token_ids for answer in alone.outputs]
