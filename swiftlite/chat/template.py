"""Conversation -> token ids, and which of them are targets: the same object for training and for serving.

Invariants:
- The template's own rendering is the truth; `encode_prompt` gives the plain tokenizer's ids of that rendering.
- For every assistant turn k, `encode_prompt(messages[:k])` is a prefix of the ids of the training row that teaches it.
- Text of users, systems, tools and assistants never becomes a control token.
- Every target turn ends in a stop token.

It does not know options, files of rows, or models beyond their tokenizer and generation_config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template  # the sandboxed, cached compiler of apply_chat_template

from swiftlite.chat import builtin
from swiftlite.chat.conversation import Conversation, Message, check_messages, learnt, weight
from swiftlite.chat.masks import (
    Encoded,
    NoStopToken,
    Round,
    Stops,
    chains,
    continuation,
    merge_fast,
    merge_rows,
    slow_row,
    weighted_row,
    whole_rows,
    without_empty_thought,
)
from swiftlite.chat.scales import parse as parse_scale
from swiftlite.chat.tokens import ControlTokens
from swiftlite.chat.tools import TOOLS, check_thought, check_written
from swiftlite.errors import DataError, RequestError, SwiftError, TemplateError

SAVED = "swift_template.json"
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_ASK, _ANSWER, _NEXT = "QuestionOne", "AnswerOne", "QuestionTwo"


def _row_error(what: str, fix: str) -> SwiftError:
    return DataError(what, fix=fix)


def _request_error(what: str, fix: str) -> SwiftError:
    return RequestError(what, fix=fix, param="messages")


def _whole(text: str, refuse: Callable[[str, str], SwiftError]) -> str:
    """The text, unless no tokenizer can take it: JSON's escapes can write half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(f"the text holds half a surrogate pair, {text[error.start]!a}", "write the whole character, or leave it out") from None
    return text


class Template:
    """A tokenizer with its chat template. Immutable after `load` and safe to use from several threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str | dict[str, str] | None,
        name: str,
        default_system: str | None = None,
        extra_stop_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.name, self.default_system = tokenizer, name, default_system
        self.sources = {"default": source} if isinstance(source, str) else dict(source or {})
        self.has_chat = bool(self.sources)
        self.tokens = ControlTokens(tokenizer, "\0".join(self.sources.values()))
        self._special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._tails: dict[str, list[int]] = {}
        self._written: set[str] = set()  # what of tools requests have shown the template to write
        plain, full = (self.tokens.backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        self._text_prefix: list[int] = full[:at]  # what the tokenizer puts before a text: bos, mostly
        self._header = ""  # generation prompt of templates that have none
        self._folds_system = False
        eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._stops = Stops(None, "", True, frozenset())
        if self.has_chat:
            self._probe()
        turn = [self._stops.turn_id] if self._stops.turn_id is not None else []
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*turn, *eos, *extra_stop_ids]))
        if turn:
            self._stops = Stops(self._stops.turn_id, self._stops.turn_text, self._stops.written, frozenset(self.stop_ids))

    @classmethod
    def load(
        cls, model_dir: str | Path, tokenizer: PreTrainedTokenizerBase, name: str | None = None, system: str | None = None
    ) -> Template:
        """The template of a model, adapter or checkpoint directory.

        The first that applies: `name` (a built-in), the one saved with a checkpoint (`swift_template.json`), the tokenizer's
        own, a built-in by the model's family. None of them: `has_chat` is False. `system` is the default system prompt.
        Raises TemplateError.
        """
        directory = Path(model_dir)
        saved = _read_saved(directory, tokenizer)
        if system is None and saved:
            system = saved["system"]
        extra = [*_generation_eos(directory), *(saved["stop_ids"] if saved else ())]
        if name is not None:
            return cls._from_builtin(tokenizer, name, system, extra)
        if saved:
            return cls(tokenizer, saved["chat_template"], saved["name"], system, extra)
        if tokenizer.chat_template:
            return cls(tokenizer, tokenizer.chat_template, "own", system, extra)
        family = builtin.for_family(directory)
        if family is not None:
            return cls._from_builtin(tokenizer, family, system, extra)
        return cls(tokenizer, None, "none", system, extra)

    @classmethod
    def _from_builtin(cls, tokenizer: PreTrainedTokenizerBase, name: str, system: str | None, extra: Sequence[int]) -> Template:
        name, found = builtin.find(name)
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        special = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
        missing = [need for need in found.needs if (not special[need] if need in special else need not in known)]
        if missing:
            raise TemplateError(
                f"the template {name!r} does not fit this tokenizer",
                f"the tokenizer has no control token {', '.join(missing)}",
                "use --template default, which needs no control token but end-of-text, or leave --template out",
            )
        return cls(tokenizer, found.source, name, system, extra)

    # rendering

    def _source(self, tools: list | None) -> str:
        return (
            self.sources["tool_use"]
            if tools and "tool_use" in self.sources
            else self.sources.get("default") or next(iter(self.sources.values()))
        )

    def _render(self, messages: list[Message], tools: list | None, prompt: bool, kwargs: dict[str, Any]) -> str:
        compiled = _compile_jinja_template(self._source(tools))
        text = compiled.render(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **{**self._special, **kwargs})
        return text + self._header if prompt and self._header else text

    def _rendered(
        self, messages: list[Message], tools: list | None, prompt: bool, kwargs: dict[str, Any], refuse: Callable[[str, str], SwiftError]
    ) -> str:
        """Any failure inside the template is the conversation's fault (unknown role, wrong order) or the template's own."""
        try:
            text = self._render(messages, tools, prompt, kwargs)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
            ArithmeticError,
            RecursionError,
        ) as error:
            roles = ", ".join(m["role"] for m in messages[:8]) + (", ..." if len(messages) > 8 else "")
            raise refuse(f"the chat template refused the conversation ({roles}): {error}", "") from None
        return _whole(text, refuse)

    def _prepared(self, messages: Sequence[Message], refuse: Callable[[str, str], SwiftError]) -> list[Message]:
        """Checked messages with the default system prompt, and the system folded into the user's turn where it must be."""
        checked = check_messages(messages, refuse)
        if self.default_system and checked[0]["role"] != "system":
            checked.insert(0, {"role": "system", "content": self.default_system})
        if self._folds_system and checked[0]["role"] == "system":
            system, *rest = checked
            if not rest or rest[0]["role"] != "user":
                raise refuse("this model takes a system prompt only before a user's message", "put a user message after the system message")
            checked = [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
        return checked

    def _probe(self) -> None:
        """Read off the template how it opens and closes an assistant turn, and whether it takes a system message."""
        ask, answer = {"role": "user", "content": _ASK}, {"role": "assistant", "content": _ANSWER}
        try:
            compiled_ok = self._render([ask], None, True, {})
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is not valid Jinja: {error}", fix="use --template with a built-in one") from None
        except Exception:  # it needs something that a plain question does not have; each conversation will say what
            return
        try:
            with_system = self._render([{"role": "system", "content": _NEXT}, ask], None, False, {})
            self._folds_system = _NEXT not in with_system
        except Exception:
            self._folds_system = True
        try:
            one = self._render([ask, answer], None, False, {})
            two = self._render([ask, answer, {"role": "user", "content": _NEXT}], None, False, {})
        except Exception:
            return
        begin = one.find(_ANSWER)
        if begin < 0:
            return
        if "add_generation_prompt" not in self._source(None) and one.startswith(compiled_ok):
            header = one[len(compiled_ok) : begin].rstrip(" ")
            self._header = header if header.strip() else ""
        after_one = one[begin + len(_ANSWER) :]
        after_two = two[two.find(_ANSWER) + len(_ANSWER) :].partition(_NEXT)[0]
        for written, after in ((True, after_one), (False, after_two)):
            found = self.tokens.pattern.search(after)
            if found and not after[: found.start()].strip():
                self._stops = Stops(self.tokens.ids[found[0]], found[0], written, frozenset())
                return

    # prompts

    def encode_prompt(
        self, messages: Sequence[Message], *, tools: list | None = None, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Prompt ids for the next assistant turn. Raises RequestError for messages that the template cannot write."""
        if not self.has_chat:
            raise RequestError(
                "this model has no chat template", "it is a base model", "use /v1/completions, or start with --template", "messages"
            )
        prepared = self._prepared(messages, _request_error)
        (prepared, tools, kwargs), mark = self.tokens.mark((prepared, tools or None, template_kwargs))
        if tools or any(message["role"] == "tool" or "tool_calls" in message for message in prepared):
            try:  # or the model would be asked without them, and nobody told
                check_written(
                    lambda part, offered: self._rendered(part, offered, False, kwargs, _row_error), prepared, tools, self._written
                )
            except DataError as error:
                param = "tools" if error.what.endswith(TOOLS) else "messages"
                raise RequestError(error.what, fix="use a model whose template does, or leave them out", param=param) from None
        return self.tokens.encode(self._rendered(prepared, tools, add_generation_prompt, kwargs, _request_error), mark)

    def encode_text(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a raw prompt, after the bos token if the tokenizer adds one. Control strings are text unless `parse_special`."""
        if parse_special:
            ids = self.tokens.encode(text)
            return ids if self._text_prefix and ids[: len(self._text_prefix)] == self._text_prefix else [*self._text_prefix, *ids]
        marked, mark = self.tokens.mark(text)
        return [*self._text_prefix, *self.tokens.encode(marked, mark)]

    # training rows

    def encode_training(self, conversation: Conversation, loss_scale: str = "default") -> list[Encoded]:
        """Rows with loss masks; usually one, several when the template rewrites history, none when no turn is to be learnt.

        loss_scale: `default` (every assistant turn), `last_round`, `all` (every token); `ignore_empty_think` (every turn, but
        not an empty <think> block before it); weights of parts (see `scales`), joined by `+`. A message's `loss: False` takes
        its turn out, its `loss_scale` is the turn's weight.
        Raises DataError for a bad conversation, TemplateError where no stop token ends a turn.
        """
        (rows,) = self.encode_training_batch([conversation], loss_scale)
        if isinstance(rows, SwiftError):
            raise rows
        return rows

    def encode_training_batch(self, conversations: Sequence[Conversation], loss_scale: str = "default") -> list[list[Encoded] | SwiftError]:
        """`encode_training` of many, with one call of the tokenizer; a bad conversation's error stands in its place."""
        scale = parse_scale(loss_scale)
        empty = self.tokens.encode(_EMPTY_THOUGHT) if scale.thoughtless else []
        results: list[list[Encoded] | SwiftError] = [[] for _ in conversations]
        planned: list[tuple[int, list[Round]]] = []
        for index, conversation in enumerate(conversations):
            try:
                if conversation.text is not None:
                    results[index] = self._text_row(conversation.text)
                else:
                    planned.append((index, self._rounds(conversation, scale.base)))
            except SwiftError as error:
                results[index] = error
        weighted = {index for index, rounds in planned if scale.weightings or any(turn.weight != 1 for turn in rounds)}
        planned_chains = [(index, chain) for index, rounds in planned for chain in chains(rounds)]
        plain = [chain for index, chain in planned_chains if not chain[-1].mark and index not in weighted]
        encoded = iter(self.tokens.encode_batch([chain[-1].prompt + chain[-1].answer for chain in plain]))
        rows: dict[int, list[Encoded]] = {}
        unstopped: set[int] = set()
        for index, chain in planned_chains:
            ids = None if chain[-1].mark or index in weighted else next(encoded)
            try:
                if index in weighted:
                    rows.setdefault(index, []).extend(weighted_row(self.tokens, self._stops, turn, scale) for turn in chain)
                    continue
                row = merge_fast(self.tokens, self._stops, chain, ids, self._tails) if ids is not None else None
                rows.setdefault(index, []).extend([row] if row else [slow_row(self.tokens, self._stops, turn) for turn in chain])
            except NoStopToken:
                unstopped.add(index)
        for index, found in rows.items():
            merged = merge_rows(found, self._stops.ids)
            results[index] = whole_rows(merged) if scale.base == "all" else merged
            if scale.thoughtless:
                results[index] = [without_empty_thought(row, empty) for row in merged]
        for index in unstopped:
            results[index] = self._no_stop_error()
        return results

    def _rounds(self, conversation: Conversation, loss_scale: str) -> list[Round]:
        """The assistant turns as texts."""
        if not self.has_chat:
            raise TemplateError(
                "this model has no chat template, so conversations cannot be trained on",
                "it is a base model",
                "choose one with --template (chatml, default, ...), or train on plain text rows",
            )
        messages = self._prepared(conversation.messages, _row_error)
        # each one as the row gives it; a default system prompt may have been added, or the system folded
        own: list[Message] = [{}, *conversation.messages][-len(messages) :]
        (marked, tools), mark = self.tokens.mark((messages, conversation.tools or None))
        check_written(lambda part, offered: self._rendered(part, offered, False, {}, _row_error), marked, tools)
        turns = [k for k, message in enumerate(marked) if message["role"] == "assistant"]
        if loss_scale == "last_round":
            turns = turns[-1:]
        rounds = []
        for k in turns:
            if k == 0:
                raise DataError("the conversation begins with the assistant", fix="put a user message first, or use a plain text row")
            prompt = self._rendered(marked[:k], tools, True, {}, _row_error)
            rendered = self._rendered(marked[: k + 1], tools, False, {}, _row_error)
            message = marked[k]
            answer = continuation(prompt, rendered, message["content"], message.get("reasoning_content", ""))
            if answer is None:
                raise DataError(
                    "the chat template writes the assistant's turn in a way that its own generation prompt cannot lead to",
                    f"the prompt ends in {prompt[-40:]!r}, the finished conversation in {rendered[-60:]!r}",
                    "use a built-in template with --template",
                )
            factor = 1.0 if loss_scale == "all" else weight(own[k])
            learn = loss_scale == "all" or (learnt(own[k]) and factor > 0)
            if learn:
                check_thought(message, answer)
            rounds.append(Round(prompt, answer, learn, mark, factor))
        return rounds

    def _text_row(self, text: str) -> list[Encoded]:
        """Pre-training: every token of the text and the end-of-text token."""
        eos = self.tokenizer.eos_token_id
        ids = self.encode_text(_whole(text, _row_error)) + ([eos] if eos is not None else [])
        return [Encoded(ids, [True] * len(ids))] if text else []

    def _no_stop_error(self) -> TemplateError:
        why = "the template writes no control token after an assistant turn, so the model would never learn to stop"
        if self._stops.turn_id is not None:
            why = f"this turn does not end in {self._stops.turn_text!r} as the template's other turns do"
        return TemplateError("no target ends in a stop token", why, "use a built-in template with --template, or correct the chat template")

    # saving

    def save(self, directory: str | Path) -> None:
        """The tokenizer with this template, and swift_template.json: what `load` needs to serve exactly as was trained."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        own = self.tokenizer.chat_template
        try:
            if self.sources:
                self.tokenizer.chat_template = self.sources if len(self.sources) > 1 else self.sources["default"]
            self.tokenizer.save_pretrained(directory)
        finally:
            self.tokenizer.chat_template = own
        stops = [{"id": i, "token": self.tokenizer.convert_ids_to_tokens(i)} for i in self.stop_ids]
        content = {"version": 1, "name": self.name, "system": self.default_system, "stop": stops, "chat_template": self.sources or None}
        temporary = directory / (SAVED + ".tmp")
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        os.replace(temporary, directory / SAVED)


def _read_saved(directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    path = directory / SAVED
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stops = [(int(stop["id"]), str(stop["token"])) for stop in content["stop"]]
        found = {key: content[key] for key in ("name", "system", "chat_template")}
    except (ValueError, KeyError, TypeError) as error:
        raise TemplateError(f"{path} is damaged", repr(error), "restore it, or delete it to use the tokenizer's own template") from None
    for token_id, token in stops:
        if tokenizer.convert_tokens_to_ids(token) != token_id:
            raise TemplateError(
                f"{path} was saved with another tokenizer",
                f"its stop token {token!r} had id {token_id}, here it is {tokenizer.convert_tokens_to_ids(token)}",
                "use the checkpoint with the base model that it was trained on",
            )
    return {**found, "stop_ids": [token_id for token_id, _ in stops]}


def _generation_eos(directory: Path) -> list[int]:
    """End-of-sequence ids of generation_config.json."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except ValueError as error:
        raise TemplateError(f"{path} is not valid JSON", str(error), "restore it, or delete it") from None
    return [eos] if isinstance(eos, int) else [i for i in eos or [] if isinstance(i, int)]
