"""Weighted losses: what weighs how much, from the text through the tokens to the gradient, and plain runs as before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swiftlite import cli
from swiftlite.chat import scales
from swiftlite.chat.conversation import Conversation
from swiftlite.chat.template import Template
from swiftlite.data.encoding import fit
from swiftlite.data.store import Sample, Samples, Writer, mapped
from swiftlite.errors import DataError, UsageError
from swiftlite.models.loading import load_model, load_tokenizer
from swiftlite.models.segments import register
from swiftlite.train.batches import collate
from swiftlite.train.loss import TargetLoss
from tests.test_sft import assert_close, trajectory

REACT = "Thought: I look\nAction: search\nAction Input: cats 猫\nObservation: 9 lives\nThought: done\nFinal Answer: nine"


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def template(model) -> Template:
    return Template.load(model, load_tokenizer(model))


def chat(*answers: str, **last) -> Conversation:
    messages = []
    for number, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]
    messages[-1].update(last)
    return Conversation(messages)


def test_react_weighs_keywords_and_what_follows():
    weights = scales.parse("react").weights(REACT)
    want = [1.0] * len(REACT)
    begin, middle, end = REACT.index("Action:"), REACT.index("Observation:"), REACT.index("Thought: done")
    want[begin:middle] = [2.0] * (middle - begin)
    want[middle:end] = [2.0] * len("Observation:") + [0.0] * (end - middle - len("Observation:"))
    assert weights == want


def test_expressions_files_and_products(tmp_path):
    text = "so <tool_call>\n{1}\n</tool_call> it is"
    inside = range(text.index("<tool_call>"), text.index(" it is"))
    assert scales.parse("hermes").weights(text) == [2.0 if i in inside else 1.0 for i in range(len(text))]
    (tmp_path / "own.json").write_text('{"so|it": [0.5]}')
    both = scales.parse(f"last_round+hermes+{tmp_path}/own.json")
    assert both.base == "last_round" and both.weights("so <tool_call>it</tool_call>")[:2] == [0.5, 0.5]
    assert both.weights("<tool_call>it</tool_call>")[11:13] == [1.0, 1.0]  # 2 x 0.5
    assert scales.parse("ignore_empty_think") == scales.LossScale("default", True, ())


@pytest.mark.parametrize("text", ["", "reakt", "agentflan", "all+react", "nowhere.json", "default+last_round"])
def test_unknown_ones_are_refused(text):
    with pytest.raises(UsageError, match="--loss_scale"):
        scales.parse(text)


@pytest.mark.parametrize("content", ["[]", "{}", '{"a": 1}', '{"a": [-1]}', '{"(": [1]}', '{"a": [1, 2], "b": [1]}', "nope"])
def test_files_that_are_no_weights_are_refused(content, tmp_path):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(UsageError):
        scales.parse(f"{tmp_path}/own.json")


@pytest.mark.parametrize("answer", [REACT, "Action: <|im_end|> is text\nObservation: gone\nThought: 好", "no keyword"])
def test_tokens_weigh_what_their_text_weighs(template, answer):
    (row,) = template.encode_training(chat("Action: early", answer), "react")
    (plain,) = template.encode_training(chat("Action: early", answer))
    assert row.ids == plain.ids and row.weights is not None
    assert all(not learnt or was for learnt, was in zip(row.mask, plain.mask, strict=True))
    assert row.mask == [weight > 0 for weight in row.weights]
    decode = template.tokenizer.decode
    for weight in (0.0, 2.0):  # each weight's tokens spell exactly that weight's text
        ids = [i for i, was, w in zip(row.ids, plain.mask, row.weights, strict=True) if was and w == weight]
        by_text = scales.parse("react").weights(answer)
        spelled = "".join(c for c, w in zip(answer, by_text, strict=True) if w == weight)
        spelled = ("Action: early" if weight == 2 else "") + spelled
        assert decode(ids, skip_special_tokens=False).replace("\n", "") == spelled.replace("\n", "")
    ends = [k for k, (i, was) in enumerate(zip(row.ids, plain.mask, strict=True)) if was and i == template.stop_ids[0]]
    assert len(ends) == 2 and all(row.weights[k] == 1 for k in ends)  # stopping is always learnt


def test_messages_have_weights_of_their_own(template):
    (row,) = template.encode_training(chat("one", "two", loss_scale=0.5))
    (plain,) = template.encode_training(chat("one", "two"))
    assert row.ids == plain.ids and row.mask == plain.mask and set(row.weights) == {0.0, 1.0, 0.5}
    (silent,) = template.encode_training(chat("one", "two", loss_scale=0))
    (left_out,) = template.encode_training(chat("one", "two", loss=False))
    assert silent.mask[: len(left_out.mask)] == left_out.mask and not any(silent.mask[len(left_out.mask) :])
    assert plain.weights is None  # the plain path carries none
    with pytest.raises(DataError, match="loss_scale"):
        template.encode_training(chat("one", loss_scale="much"))


@pytest.mark.parametrize("on_disk", [False, True])
def test_store_and_truncation_keep_them(tmp_path, on_disk):
    ids, mask, weights = list(range(10)), [False] * 2 + [True] * 8, [0.0] * 2 + [float(i) for i in range(8)]
    pieces, _ = fit(ids, mask, 6, "split", weights)
    assert [list(piece.weights) for piece in pieces] == [weights[:6], weights[5:]]
    writer = Writer(tmp_path if on_disk else None)
    for sample in (Sample(np.arange(3, dtype=np.int32), np.ones(3, bool)), *pieces, Sample(np.arange(2, dtype=np.int32), np.ones(2, bool))):
        writer.add(sample)
    arrays = writer.arrays()
    for samples in [Samples(arrays, np.arange(4)), *([Samples(mapped(tmp_path), np.arange(4))] if on_disk else [])]:
        assert [list(sample.weights) for sample in samples] == [[1] * 3, weights[:6], weights[5:], [1] * 2]


@pytest.mark.parametrize("known_head", [True, False])
def test_loss_and_gradient_equal_torch(model, known_head):
    loaded = load_model(model, torch.float32, torch.device("cpu"), register()).requires_grad_(True)
    loss = TargetLoss(loaded)
    if not known_head:
        loss.head = None
    rng = np.random.default_rng(0)
    given = ((12, None), (9, rng.random(9).astype(np.float32)))
    samples = [Sample(rng.integers(3, 200, n).astype(np.int32), np.arange(n) > 3, w) for n, w in given]
    batch = collate(samples, torch.device("cpu"))
    loss(batch)[0].backward()
    got = {name: p.grad.clone() for name, p in loaded.named_parameters()}
    loaded.zero_grad()
    total = torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
        positions = torch.arange(ids.shape[1])[None]
        logits = loaded(input_ids=ids, position_ids=positions, use_cache=False, swift_segments=(ids.shape[1],)).logits[0]
        each = F.cross_entropy(logits[3:-1], ids[0, 4:], reduction="none")
        total = total + (each * (1 if sample.weights is None else torch.from_numpy(sample.weights[4:]))).sum()
    total.backward()
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_through_the_command(tmp_path, model):
    """Weights of 1 change nothing; others do; packed equals unpacked."""
    rows = [{"query": f"what {i}?", "response": REACT.replace("nine", str(i))} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "ones.json").write_text('{"Thought:": [1, 1]}')

    def run(scale: str, *flags: str) -> list[tuple[float, float]]:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        given = ["--model", str(model), "--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(out), "--sample_answers", "0"]
        given += ["--split_dataset_ratio", "0", "--report_to", "none", "--logging_steps", "1", "--max_steps", "2", "--loss_scale", scale]
        assert cli.main(["sft", *given, "--gradient_accumulation_steps", "100", *flags]) == 0
        return trajectory(next(out.glob("*/v*")))

    plain, ones, react = run("default"), run(str(tmp_path / "ones.json")), run("react")
    assert_close(ones, plain, 1e-6)
    assert react[0][0] != pytest.approx(plain[0][0], rel=1e-2)
    assert_close(run("react", "--packing", "false"), react)
