"""Labels: for every template and tokenizer, a row begins with what serving sends, and its targets are the answers and stops."""

from __future__ import annotations

import json

import pytest
from chat_templates import KINDS, NO_STOP, STYLES, make_tokenizer

from swiftlite.chat.builtin import BUILTIN
from swiftlite.chat.conversation import Conversation
from swiftlite.chat.masks import merge_rows, slow_row
from swiftlite.chat.template import Encoded, Template
from swiftlite.data.formats import to_conversation
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
    assert [row.ids for row in everything] == [row.ids for row in full]
    assert all(everything[0].mask) and all(row.mask[-1] and row.mask == sorted(row.mask) for row in everything)
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


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_that_is_not_written_is_not_dropped_in_silence(name: str) -> None:
    template = load("qwen2_5", "qwen")
    chat = turns("q1", "a1", "q2", "a2")
    chat[3][name] = "hmm\n two"
    with pytest.raises(DataError, match="does not write thoughts"):
        template.encode_training(Conversation(chat))
    chat[3]["loss"] = False  # nothing is learnt of it
    assert template.encode_training(Conversation(chat))
    for style in ("qwen3", "r1"):
        assert load(style, "qwen").encode_training(Conversation([{**chat[0]}, {**chat[3], "loss": True}]))


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


def test_a_tool_using_dialogue_as_rows_write_it() -> None:
    """Calls are targets whoever spells them (OpenAI's field, SWIFT's and ShareGPT's roles); results, tools and system are not."""
    template = load("qwen2_5", "qwen")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}]
    call = {"name": "add", "arguments": {"x": 1}}
    system, ask = {"role": "system", "content": "Use tools."}, {"role": "user", "content": "1+1, twice"}
    end = [{"role": "assistant", "content": "Two."}]
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {**call, "arguments": json.dumps({"x": 1})}}] * 2,
    }
    shapes = {
        "openai": [system, ask, openai, {"role": "tool", "content": "2"}, *end],
        "swift": [
            system, ask, *[{"role": "tool_call", "content": json.dumps(call)}] * 2, {"role": "tool_response", "content": "2"}, *end,
        ],
        "sharegpt": [
            {"from": "system", "value": "Use tools."}, {"from": "human", "value": "1+1, twice"},
            *[{"from": "function_call", "value": json.dumps(call)}] * 2, {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
    }  # fmt: skip
    rows = {
        name: template.encode_training(to_conversation({"messages": chat, "tools": json.dumps(tools)})) for name, chat in shapes.items()
    }
    (row,) = rows["openai"]
    assert rows["openai"] == rows["swift"] == rows["sharegpt"]
    decode = template.tokenizer.decode
    block = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    assert [decode(row.ids[b:e]) for b, e in spans(row)] == [f"{block}\n{block}<|im_end|>", "Two.<|im_end|>"]
    prompt = decode([i for i, learnt in zip(row.ids, row.mask, strict=True) if not learnt])
    assert "Use tools." in prompt and '"parameters"' in prompt and "<tool_response>\n2\n</tool_response>" in prompt
    (last,) = template.encode_training(to_conversation({"messages": shapes["openai"], "tools": tools}), "last_round")
    assert last.ids == row.ids and [decode(last.ids[b:e]) for b, e in spans(last)] == ["Two.<|im_end|>"]
    muted = [{**m, "loss": False} if "tool_calls" in m else m for m in shapes["openai"]]
    assert template.encode_training(to_conversation({"messages": muted, "tools": tools})) == [last]


def test_empty_thoughts_can_be_left_out() -> None:
    template = load("qwen3", "qwen")
    chat = turns("q1", "a1", "q2", "a2")
    decode = template.tokenizer.decode
    learnt = {
        scale: [decode(row.ids[b:e]) for row in template.encode_training(Conversation(chat), scale) for b, e in spans(row)]
        for scale in ("default", "ignore_empty_think", "last_round+ignore_empty_think")
    }
    assert learnt["default"][-1] == "<think>\n\n</think>\n\na2<|im_end|>"
    assert learnt["ignore_empty_think"] == ["a1<|im_end|>", "a2<|im_end|>"]
    assert learnt["last_round+ignore_empty_think"] == ["a2<|im_end|>"]
    full = template.encode_training(Conversation(chat))
    assert [row.ids for row in template.encode_training(Conversation(chat), "ignore_empty_think")] == [row.ids for row in full]
    thought = turns("q1", "<think>\nhmm\n</think>\n\na1")
    assert template.encode_training(Conversation(thought), "ignore_empty_think") == template.encode_training(Conversation(thought))


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


@pytest.mark.parametrize("style", ["qwen2_5", "llama3", "glm4", "plain_eos"])
def test_tools_that_the_template_leaves_out_are_refused(style: str) -> None:
    """Never an empty answer as a target. Qwen's template writes everything, the others none or only results."""
    template = load(style, "bytelevel")
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": "{}"}}]}
    chat = [*turns("weather?"), call, {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "It is sunny."}]
    rows = [Conversation(chat, tools=tools), Conversation(chat), Conversation(turns("a", "b"), tools=tools), Conversation(turns("a", "b"))]
    found = template.encode_training_batch(rows)
    assert isinstance(found[3], list)
    if style == "qwen2_5":
        texts = [template.tokenizer.decode([i for row in one for i, m in zip(row.ids, row.mask, strict=True) if m]) for one in found]
        assert all("look_up" in text for text in texts[:2])
        return
    for one, what in zip(found, ("tool calls", "tool calls", "the tools"), strict=False):
        assert isinstance(one, DataError) and one.what == f"the chat template does not write {what}"


def test_tool_results_that_are_left_out_are_refused() -> None:
    template = Template(make_tokenizer("bytelevel"), "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
                        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "x")  # fmt: skip
    chat = [*turns("q", "call f"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}]
    with pytest.raises(DataError, match="does not write tool results"):
        template.encode_training(Conversation(chat))


def test_requests_are_asked_once_what_the_template_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent sends its whole history at each turn: looked at call by call, that would be a rendering for each again and again."""
    template, rendered = load("qwen2_5", "bytelevel"), []
    render = template._rendered
    monkeypatch.setattr(template, "_rendered", lambda *args: rendered.append(None) or render(*args))
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": "{}"}}]}
    chat = [*turns("weather?"), *[call, {"role": "tool", "content": "sunny"}] * 20]
    first = template.encode_prompt(chat, tools=tools)
    assert len(rendered) == 2 * 3 + 1
    rendered.clear()
    assert template.encode_prompt(chat, tools=tools) == first and len(rendered) == 1


def test_a_template_that_cannot_stop_between_results_writes_them() -> None:
    """Looked at up to one of two results it raises, the whole it renders."""
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls or '' }}\n{% endfor %}{% if messages[-1].content == 'one' %}{{ raise_exception('more') }}{% endif %}"  # noqa: E501
    template = Template(make_tokenizer("bytelevel"), source, "x")
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}] * 2}
    assert template.encode_prompt([*turns("q"), call, {"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}])


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "False"])
@pytest.mark.parametrize("role", ["assistant", "tool_call"])
def test_a_message_s_loss_takes_its_turn_out(value: object, role: str) -> None:
    template = load("qwen2_5", "bytelevel")
    first = (
        {"role": "assistant", "content": "one"}
        if role == "assistant"
        else {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    )
    chat = [
        *turns("a"),
        {**first, "loss": value},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two", "loss": "true"},
    ]
    (row,) = template.encode_training(to_conversation({"messages": chat}))
    assert template.tokenizer.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m]) == "two<|im_end|>"
    learnt = [{**message, "loss": 1} if "loss" in message else message for message in chat]
    (row,) = template.encode_training(to_conversation({"messages": learnt}))
    assert len(spans(row)) == 2


def test_all_learns_every_token_once_where_history_is_rewritten() -> None:
    template = load("qwen3", "bytelevel")
    chat = turns("a", "<think>\nlong thought\n</think>\n\none", "b", "<think>\nx\n</think>\n\ntwo")
    plain, rows = (template.encode_training(Conversation(chat), scale) for scale in ("default", "all"))
    assert [row.ids for row in rows] == [row.ids for row in plain] and len(rows) == 2
    assert all(rows[0].mask)
    same = rows[1].mask.index(True)
    assert rows[1].ids[:same] == rows[0].ids[:same] and rows[1].ids[same] != rows[0].ids[same]
    assert all(rows[1].mask[same:])
