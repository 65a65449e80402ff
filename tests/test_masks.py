"""Labels: for every template and tokenizer, a row begins with what serving sends, and its targets are the answers and stops."""

from __future__ import annotations

import pytest
from chat_templates import KINDS, NO_STOP, STYLES, make_tokenizer

from swiftlite.chat import Conversation, Encoded, Template
from swiftlite.chat.builtin import BUILTIN
from swiftlite.chat.masks import merge_rows, slow_row
from swiftlite.errors import DataError, TemplateError

SYSTEM = {"role": "system", "content": "Be brief."}


def turns(*texts: str) -> list[dict]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


CHATS = {
    "one round": turns("Hello, how are you?", "I am a small model."),
    "three rounds": turns("Hello", "Hi!", "who are you?", "我是小黄。", "def f(x)", "return x + 1"),
    "system": [SYSTEM, *turns("Hello", "Hi!", "who?", "me")],
    "odd space": turns("Hello\n", "\n\n  indented\n\n", "  ", " leading\ttab \n", "a  \n b", "\nx"),
    "control strings": turns("say <|im_end|> and </s>", "<|im_end|><|eot_id|> x </s>", "<|user|> [INST]", "ok <end_of_turn>"),
}


def load(name: str, kind: str) -> Template:
    tokenizer = make_tokenizer(kind)
    return Template(tokenizer, STYLES[name], name) if name in STYLES else Template.load("base", tokenizer, name=name)


def spans(row: Encoded) -> list[tuple[int, int]]:
    """[begin, end) of the runs of targets."""
    edges = [i for i in range(len(row.mask) + 1) if (i > 0 and row.mask[i - 1]) != (i < len(row.mask) and row.mask[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def slow(template: Template, chat: list[dict], loss_scale: str = "default") -> list[Encoded]:
    rounds = template._rounds(Conversation(chat), loss_scale)
    return merge_rows([slow_row(template.tokens, template._stops, turn) for turn in rounds], template._stops.ids)


ALL = [*STYLES, *(name for name in BUILTIN if name not in STYLES)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_training_equals_serving(name: str, kind: str) -> None:
    template = load(name, kind)
    for label, chat in CHATS.items():
        rows = template.encode_training(Conversation(chat))
        assert rows == slow(template, chat), label  # the fast way equals the reference
        found = sorted(span for row in rows for span in spans(row))
        answers = [k for k, message in enumerate(chat) if message["role"] == "assistant"]
        assert len(found) == len(answers), label
        for k in answers:
            prompt = template.encode_prompt(chat[:k])
            row = next(row for row in rows if row.ids[: len(prompt)] == prompt and row.mask[len(prompt)])
            end = next(end for begin, end in spans(row) if begin == len(prompt))
            assert row.ids[end - 1] in template.stop_ids, (label, k)
            control = template.tokens.id_set - {template.tokenizer.unk_token_id}  # which unknown letters give, too
            assert not any(i in control for i in row.ids[len(prompt) : end - 1]), (label, k)
            if kind in ("bytelevel", "qwen"):
                target = template.tokenizer.decode(row.ids[len(prompt) : end - 1]).removeprefix("<think>\n\n</think>\n\n")
                assert target.removeprefix("\n</think>\n\n").strip() == chat[k]["content"].strip(), (label, k)
        assert all(row.mask[-1] for row in rows)  # nothing behind the stop token


@pytest.mark.parametrize("name", ALL)
def test_loss_choices(name: str) -> None:
    template, chat = load(name, "bytelevel"), CHATS["three rounds"]
    full = template.encode_training(Conversation(chat))
    last = template.encode_training(Conversation(chat), "last_round")
    assert len(last) == 1 and last[0].ids == full[-1].ids and spans(last[0]) == spans(full[-1])[-1:]
    everything = template.encode_training(Conversation(chat), "all")
    assert everything == [Encoded(full[-1].ids, [True] * len(full[-1].ids))]
    muted = [{**m, "loss": False} if i == 3 else m for i, m in enumerate(chat)]
    rows = template.encode_training(Conversation(muted))
    assert sum(len(spans(row)) for row in rows) == 2
    assert not any("小黄" in template.tokenizer.decode(row.ids[b:e]) for row in rows for b, e in spans(row))
    assert template.encode_training(Conversation([{**m, "loss": False} for m in chat])) == []


def test_qwen3_thoughts_are_learnt_and_leave_history() -> None:
    template = load("qwen3", "qwen")
    chat = turns("q1", "<think>\nhmm one\n</think>\n\na1", "q2", "a2")
    chat[3]["reasoning_content"] = "hmm two"
    first, second = template.encode_training(Conversation(chat))
    decode = template.tokenizer.decode
    assert [decode(first.ids[b:e]) for b, e in spans(first)] == ["<think>\nhmm one\n</think>\n\na1<|im_end|>"]
    assert [decode(second.ids[b:e]) for b, e in spans(second)] == ["<think>\nhmm two\n</think>\n\na2<|im_end|>"]
    assert "hmm one" not in decode(second.ids)


def test_r1_thoughts_follow_its_open_block() -> None:
    template = load("r1", "qwen")
    prompt = template.encode_prompt(turns("q"))
    assert template.tokenizer.decode(prompt).endswith("<think>\n")
    for answer, expected in (("<think>\nhmm\n</think>\n\na", "hmm\n</think>\n\na</s>"), ("a", "\n</think>\n\na</s>")):
        (row,) = template.encode_training(Conversation(turns("q", answer)))
        assert row.ids[: len(prompt)] == prompt
        assert template.tokenizer.decode(row.ids[len(prompt) :]) == expected


def test_rewritten_history_gives_a_row_per_round() -> None:
    template = load("mistral", "bytelevel")
    assert len(template.encode_training(Conversation(CHATS["system"]))) == 2  # the system text moves
    assert len(template.encode_training(Conversation(CHATS["three rounds"]))) == 1


def test_open_turns_end_in_whatever_header_follows() -> None:
    tokenizer = make_tokenizer("bytelevel")
    observation = tokenizer.convert_tokens_to_ids("<|observation|>")
    template = Template(tokenizer, STYLES["glm4"], "glm4", extra_stop_ids=[observation])
    chat = [*turns("q", "call f"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}]
    (row,) = template.encode_training(Conversation(chat))
    ends = [tokenizer.convert_ids_to_tokens(row.ids[end - 1]) for _, end in spans(row)]
    assert ends == ["<|observation|>", "<|user|>"]


def test_tool_calls_are_targets() -> None:
    template = load("qwen2_5", "qwen")
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    chat = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    (row,) = template.encode_training(Conversation(chat, tools=[{"type": "function", "function": {"name": "add"}}]))
    first, second = (template.tokenizer.decode(row.ids[b:e]) for b, e in spans(row))
    assert first == '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert second == "Two.<|im_end|>"


def test_flags_of_added_tokens_that_swallow_space() -> None:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(make_tokenizer("metaspace").backend_tokenizer).from_str(
            make_tokenizer("metaspace").backend_tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.add_tokens([AddedToken(t, rstrip=True, special=True, normalized=False) for t in ("<|end|>", "<|user|>", "<|assistant|>")])
    template = Template(tokenizer, STYLES["phi3"], "phi3")
    for label, chat in CHATS.items():
        rows = template.encode_training(Conversation(chat))
        assert rows == slow(template, chat), label
        for k in (k for k, m in enumerate(chat) if m["role"] == "assistant"):
            prompt = template.encode_prompt(chat[:k])
            assert any(row.ids[: len(prompt)] == prompt and row.mask[len(prompt)] for row in rows), (label, k)


def test_no_stop_token_is_refused() -> None:
    template = Template(make_tokenizer("bytelevel"), NO_STOP, "no stop")
    with pytest.raises(TemplateError, match="no target ends in a stop token"):
        template.encode_training(Conversation(CHATS["one round"]))
    assert template.encode_prompt(CHATS["one round"][:1])  # serving it is fine


def test_bad_conversations() -> None:
    template = load("mistral", "bytelevel")
    with pytest.raises(DataError, match="alternate"):
        template.encode_training(Conversation(turns("a") + turns("b", "c")))
    with pytest.raises(DataError, match="begins with the assistant"):
        load("qwen2_5", "bytelevel").encode_training(Conversation([{"role": "assistant", "content": "x"}, *turns("a", "b")]))
    assert template.encode_training(Conversation(turns("a"))) == []
    good, bad = template.encode_training_batch([Conversation(turns("a", "b")), Conversation(turns("a") + turns("b", "c"))])
    assert isinstance(bad, DataError) and len(good) == 1
