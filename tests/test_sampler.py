"""Sampler: against a plain one-row reference, transformers' processors, and statistics; seeds do not depend on the company."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swiftlite.engine import sampler
from swiftlite.engine.draw import draw_cut_at_once
from swiftlite.engine.request import SamplingParams
from swiftlite.engine.sampler import Sampler, SamplingState, TokenTable, token_logprobs

V = 300
both = pytest.mark.parametrize("wait", [True, False], ids=["looking", "at once"])


def state(prompt=(1, 2, 3), output=(), seed=0, stops=(), **params) -> SamplingState:
    made = SamplingState(SamplingParams(**params), list(prompt), seed, frozenset(stops))
    for token in output:
        made.advance(token)
    return made


def reference(row: torch.Tensor, prompt: list[int], output: list[int], p: SamplingParams, stops: set[int], uniform: float) -> int:
    """One row, in plain Python over float64, in the order that the module's docstring states."""
    scores = row.double().tolist()
    for token, bias in (p.logit_bias or {}).items():
        scores[token] += bias
    if len(output) < p.min_tokens:
        for token in stops:
            scores[token] = -math.inf
    for token in {*prompt, *output}:
        scores[token] = scores[token] * p.repetition_penalty if scores[token] < 0 else scores[token] / p.repetition_penalty
    for token in set(output):
        scores[token] -= output.count(token) * p.frequency_penalty + p.presence_penalty
    if p.greedy:
        return max(range(len(scores)), key=scores.__getitem__)
    best = max(scores)
    weights = [math.exp((score - best) / p.temperature) for score in scores]
    weights = [weight if weight >= p.min_p else 0.0 for weight in weights]
    if 0 < p.top_k < len(weights):
        kth = sorted(weights, reverse=True)[p.top_k - 1]
        weights = [weight if weight >= kth else 0.0 for weight in weights]
    total, reached, last = sum(weights), 0.0, 0.0
    for weight in sorted(weights, reverse=True):
        if reached >= p.top_p * total and p.top_p < 1:
            break
        reached, last = reached + weight, weight
    weights = [weight if weight >= last else 0.0 for weight in weights]
    target, reached = uniform * sum(weights), 0.0
    for token, weight in enumerate(weights):
        reached += weight
        if reached > target:
            return token
    raise AssertionError


def random_params(rng: random.Random) -> dict:
    choose = rng.choice
    return {
        "temperature": choose([0, 0.3, 1.0, 1.7]),
        "top_k": choose([0, -1, 1, 5, 70, 1000]),
        "top_p": choose([1.0, 0.2, 0.9, 0.999]),
        "min_p": choose([0.0, 0.0, 0.05, 0.5]),
        "repetition_penalty": choose([1.0, 1.0, 1.3, 0.8]),
        "presence_penalty": choose([0.0, 0.0, 0.7, -1.0]),
        "frequency_penalty": choose([0.0, 0.0, 0.4, -0.5]),
        "logit_bias": choose([None, {7: 3.0, 9: -100.0}]),
        "min_tokens": choose([0, 6]),
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_mixed_batches_equal_the_plain_reference(seed, dtype, wait):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    states, rows = [], []
    for number in range(24):
        prompt = [rng.randrange(V) for _ in range(rng.randint(1, 30))]
        output = [rng.randrange(V) for _ in range(rng.randint(0, 12))]
        params = random_params(rng)
        states.append(state(prompt, output, seed=number, stops={2, 4}, **params))
        rows.append((prompt, output, SamplingParams(**params)))
    sampler = Sampler(wait=wait)
    for _ in range(5):
        logits = (torch.randn(len(rows), V, generator=generator) * 3).to(dtype)  # bfloat16 has many ties
        uniforms = [one.uniform() for one in states]
        expected = [reference(logits[i], *rows[i], {2, 4}, uniforms[i]) for i in range(len(rows))]
        found, _ = sampler.sample(logits.clone(), states)
        assert [(i, token) for i, token in enumerate(found)] == list(enumerate(expected))
        for (_, output, _), token in zip(rows, found, strict=True):
            output.append(token)


@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9}, {"temperature": 2.0}])
def test_frequencies_follow_transformers_warpers(params):
    torch.manual_seed(0)
    row = torch.randn(1, 50) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.get("temperature", 1.0))])
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    expected = warpers(torch.tensor([[0]]), row.clone()).softmax(-1)[0]
    draws = 4000
    found, _ = Sampler().sample(row.repeat(draws, 1), [state(seed=seed, **params) for seed in range(draws)])
    counts = torch.bincount(torch.tensor(found), minlength=50).double()
    assert counts[expected == 0].sum() == 0, "a token outside the kept set was drawn"
    likely = expected * draws >= 5
    chi = ((counts - expected * draws)[likely] ** 2 / (expected * draws)[likely]).sum()
    freedom = int(likely.sum())
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_draws_of_one_seed_are_uniform_over_steps():
    one = state(seed=3, temperature=1.0)
    values = []
    for _ in range(4000):
        values.append(one.uniform())
        one.advance(0)
    histogram = torch.histc(torch.tensor(values), 20, 0, 1)
    assert ((histogram - 200) ** 2 / 200).sum() < 50
    assert len({state(seed=seed).uniform() for seed in range(-500, 500)}) == 1000


def test_repetition_penalty_equals_transformers():
    torch.manual_seed(1)
    logits = torch.randn(4, V) * 3
    for penalty in (0.7, 1.5):
        states = [state(prompt=range(i * 10, i * 10 + 9), output=[5, 5, 200], temperature=0, repetition_penalty=penalty) for i in range(4)]
        ids = [torch.tensor([[*range(i * 10, i * 10 + 9), 5, 5, 200]]) for i in range(4)]
        expected = [RepetitionPenaltyLogitsProcessor(penalty)(one, row[None].clone()) for one, row in zip(ids, logits, strict=True)]
        changed = logits.clone()
        sampler = Sampler()
        found, _ = sampler.sample(changed, states)  # the sampler works in place on fp32
        torch.testing.assert_close(changed, torch.cat(expected))
        assert found == [int(row.argmax()) for row in expected]


def test_seeded_rows_do_not_depend_on_their_company():
    torch.manual_seed(2)
    wishes = [{"top_k": 7}, {"top_p": 0.8}, {}, {"min_p": 0.02, "temperature": 1.4}, {"top_k": 100, "top_p": 0.95}]
    logits = [(torch.randn(len(wishes), 2000) * 2).bfloat16() for _ in range(6)]
    alone = []
    for row, wish in enumerate(wishes):
        one, sampler = state(seed=row, **wish), Sampler()
        alone.append([sampler.sample(step[row : row + 1].clone(), [one])[0][0] for step in logits])
    order = [4, 2, 0, 3, 1]
    states = {row: state(seed=row, **wishes[row]) for row in order}
    others = [state(seed=99, top_k=1500, temperature=3.0), state(temperature=0), state(logit_bias={0: 5.0})]
    sampler, together = Sampler(), {row: [] for row in order}
    for number, step in enumerate(logits):
        company = others[: number % 4]
        batch = torch.cat([torch.randn(len(company), 2000).bfloat16(), step[order]])
        found, _ = sampler.sample(batch, company + [states[row] for row in order])
        for row, token in zip(order, found[len(company) :], strict=True):
            together[row].append(token)
    assert [together[row] for row in range(5)] == alone


@both
def test_flat_distributions_widen_the_candidates(wait):
    """top-p over a nearly flat distribution keeps more tokens than are sorted at first."""
    logits = torch.linspace(0, 0.1, 5000).repeat(64, 1)
    found, _ = Sampler(wait=wait).sample(logits, [state(seed=seed, top_p=0.9) for seed in range(64)])
    assert min(found) >= 450, "the least likely tenth must not be drawn"
    assert max(found) - min(found) > 3000, "the kept set is nearly everything"


def test_logprobs_are_of_the_raw_distribution():
    torch.manual_seed(3)
    logits = torch.randn(3, V)
    expected = logits.log_softmax(-1)
    states = [
        state(logprobs=3, temperature=0.5, top_k=2, repetition_penalty=2.0, logit_bias={4: 50.0}),
        state(temperature=0),
        state(logprobs=0, temperature=0),
    ]
    found, logprobs = Sampler().sample(logits.clone(), states)
    assert found[0] == 4 and logprobs[1] is None
    assert logprobs[0].token_id == 4 and math.isclose(logprobs[0].logprob, expected[0, 4], rel_tol=1e-5)
    best = expected[0].topk(3)
    assert list(logprobs[0].top) == best.indices.tolist()
    assert list(logprobs[0].top.values()) == pytest.approx(best.values.tolist(), rel=1e-5)
    assert logprobs[2].top == {} and math.isclose(logprobs[2].logprob, expected[2].max(), rel_tol=1e-5)
    assert token_logprobs(logits, [0, 1, 2], [0, 1, 999])[2].top.keys() == set(range(V))


@pytest.mark.parametrize(
    "wish", [{"temperature": 0}, {"temperature": 1}, {"top_k": 3}, {"top_p": 0.5, "logprobs": 2}, {"repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@both
def test_a_row_that_is_not_finite_fails_alone(wish, poison, wait):
    torch.manual_seed(4)
    clean = torch.randn(3, V)
    dirty = clean.clone()
    dirty[1, 17] = poison
    expected, _ = Sampler(wait=wait).sample(clean.clone(), [state(seed=i, **wish) for i in range(3)])
    found, _ = Sampler(wait=wait).sample(dirty, [state(seed=i, **wish) for i in range(3)])
    assert found == [expected[0], -1, expected[2]]


@both
def test_masked_entries_are_no_error(wait):
    logits = torch.full((3, V), -math.inf)
    logits[:, 5] = 1.0
    found, _ = Sampler(wait=wait).sample(logits, [state(temperature=0), state(top_p=0.9), state(top_k=3)])
    assert found == [5, 5, 5]


@both
@pytest.mark.parametrize("more", [{}, {"top_k": 2}, {"min_p": 0.1}])
def test_wishes_too_small_for_float32(more, wait):
    """A top-p of almost nothing keeps the best token; a masked one is never drawn, however hot."""
    torch.manual_seed(5)
    logits = torch.randn(4, V)
    states = [state(seed=i, top_p=1e-300, **more) for i in range(4)]
    assert Sampler(wait=wait).sample(logits.clone(), states)[0] == logits.argmax(-1).tolist()
    few = torch.full((50, V), -math.inf)
    few[:, 5:8] = 1.0
    for cut in ({}, {"top_p": 0.9}):
        hot = [state(seed=i, temperature=1e50, **more, **cut) for i in range(50)]
        assert set(Sampler(wait=wait).sample(few.clone(), hot)[0]) == {5, 6, 7}


def test_more_equals_of_the_kth_than_candidates():
    """Tokens with equal scores at top-k's cut are all kept, also those beyond the k best that are looked at; top-p shares them all."""
    logits = torch.zeros(200, 1000)
    logits[:, 500] = 2.0
    for wish in ({"top_k": 2}, {"top_k": 30, "top_p": 0.5}):
        tokens = [Sampler(wait=wait).sample(logits, [state(seed=i, **wish) for i in range(200)])[0] for wait in (True, False)]
        assert tokens[0] == tokens[1] and len(set(tokens[1])) > 150


def test_drawing_looks_at_no_number():
    """On the meta device there are none: what waits for the device, be it for one element, fails there."""
    rng = random.Random(1)
    states = [state(seed=number, stops={2}, logprobs=number % 3 or None, **random_params(rng)) for number in range(200)]
    for group in (states, [one for one in states if one.plain], [one for one in states if not one.biased and not one.penalised]):
        drawn = Sampler(wait=False).draw(torch.empty(len(group), V, device="meta"), group)
        assert drawn.tokens.shape == (len(group),) and drawn.tokens.dtype == torch.int64
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        Sampler().draw(torch.empty(2, V, device="meta"), [state(top_k=3), state(top_p=0.5)])


def test_many_rows_are_drawn_in_parts(monkeypatch):
    """On a GPU too, whose memory is the cache's: the same tokens, and never more in float32 at once than was said."""
    sizes: list[int] = []

    def cut(scores, limits, uniform, most):
        sizes.append(scores.numel())
        return draw_cut_at_once(scores, limits, uniform, most)

    monkeypatch.setattr(sampler, "draw_cut_at_once", cut)
    logits = torch.randn(9, 500, generator=torch.Generator().manual_seed(0)) * 3
    found = []
    for chunk in (500 * 2, 2**24):
        monkeypatch.setattr(sampler, "CHUNK", chunk)
        sizes.clear()
        found.append(Sampler(wait=False).sample(logits.clone(), [state(seed=i, top_p=0.9) for i in range(9)])[0])
        assert max(sizes) <= chunk and len(sizes) == (5 if chunk == 1000 else 1)
    assert found[0] == found[1]
    logits, states = torch.empty(300, 150_000, dtype=torch.bfloat16, device="meta"), [state(seed=i, top_p=0.9) for i in range(300)]
    sizes.clear()
    Sampler(wait=False)._draw(torch.empty(300, device="meta").long(), logits, logits[:, 0], states, Sampler._make_plan(states, logits))
    assert sum(sizes) == logits.numel() and max(sizes) <= 2**24


def test_what_is_drawn_can_be_read_later():
    """The next logits may be computed in the same memory before the tokens are read."""
    torch.manual_seed(5)
    wishes = [{"temperature": 0, "logprobs": 2}, {"top_k": 9}, {"repetition_penalty": 1.4, "logprobs": 0}]
    steps = [torch.randn(3, V) * 2 for _ in range(3)]
    expected, late = [], []
    states = [state(seed=i, **wish) for i, wish in enumerate(wishes)]
    for logits in steps:
        expected.append(Sampler().sample(logits.clone(), states))
    states, buffer, sampler = [state(seed=i, **wish) for i, wish in enumerate(wishes)], torch.empty(3, V), Sampler(wait=False)
    for logits in steps:
        drawn = sampler.draw(buffer.copy_(logits), states)
        buffer.fill_(math.nan)
        late.append(drawn.read())
    assert late == expected


def test_min_tokens_holds_back_stop_ids():
    logits = torch.zeros(1, V)
    logits[0, 2], logits[0, 8] = 10, 5
    one, sampler = state(temperature=0, min_tokens=2, stops={2}), Sampler()
    assert [sampler.sample(logits.clone(), [one])[0][0] for _ in range(4)] == [8, 8, 2, 2]


def test_plain_greedy_makes_no_copy(monkeypatch):
    logits = torch.randn(4, V)
    before = logits.clone()
    monkeypatch.setattr(torch.Tensor, "float", lambda *_: pytest.fail("converted"))
    found, logprobs = Sampler().sample(logits, [state(temperature=0) for _ in range(4)])
    assert found == before.argmax(-1).tolist() and logprobs == [] and torch.equal(logits, before)


def test_token_table_grows():
    rng = random.Random(0)
    prompt = [rng.randrange(40) for _ in range(30)]
    table, output = TokenTable(prompt), []
    for _ in range(500):
        token = rng.randrange(400)
        table.add(token)
        output.append(token)
    ids, counts = table.arrays()
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {token: output.count(token) for token in {*prompt, *output}}
