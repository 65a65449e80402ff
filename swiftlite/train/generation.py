"""Evaluation by answering: which held-out rows are asked, and how close the answers come to the rows' own.

Exact match, and ROUGE-L (Lin 2004): the F-measure of the longest common subsequence, here of words, or of characters where a
script has no spaces (the usual packages cut at spaces or drop Chinese). Both are shares from 0 to 1. A thought in <think> tags
is no part of an answer.

Does not know the engine: who answers is a function of its caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swiftlite.chat.conversation import Conversation
from swiftlite.chat.template import Template
from swiftlite.errors import SwiftError
from swiftlite.train.ranks import Ranks

EXACT, ROUGE = "eval_exact_match", "eval_rouge-l"  # SWIFT's name for the second
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_UNITS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

Stopped = Callable[[], bool]
Answer = Callable[[Sequence[list[int]], Stopped], list[str] | None]  # prompts' ids -> texts; None: it was stopped


@dataclass(frozen=True)
class Question:
    """A row to answer: the prompt's token ids, its last user text, and the answer that the row gives."""

    prompt: list[int]
    text: str
    reference: str


def questions(conversations: Sequence[Conversation], template: Template, count: int | None, room: int) -> list[Question]:
    """At most `count` (None: all) of the rows whose prompt is shorter than `room` tokens, spread evenly; their last answer
    is asked for. Rows of plain text and answers that are tool calls alone are passed over."""
    found = []
    for conversation in conversations:
        *before, last = conversation.messages or [{}]
        reference = last.get("content")
        if last.get("role") not in ("assistant", "gpt", "bot", "model") or not before or not isinstance(reference, str) or not reference:
            continue
        try:
            prompt = template.encode_prompt(before, tools=conversation.tools)
        except SwiftError:
            continue  # encoding the row has counted it as refused
        if len(prompt) < room:
            asked = next((m["content"] for m in reversed(before) if m.get("role") in ("user", "human")), before[-1].get("content"))
            found.append(Question(prompt, asked if isinstance(asked, str) else str(asked), reference))
    if count is None or len(found) <= count:
        return found
    return [found[i * len(found) // count] for i in range(count)]


def plain(text: str) -> str:
    """An answer without its thought and outer white space."""
    return _THOUGHT.sub("", text, count=1).strip()


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of both texts' units, from 0 to 1; 1 where neither has a unit."""
    a, b = (_UNITS.findall(text.lower()) for text in (answer, reference))
    if not a or not b:
        return float(a == b)
    return 2 * common(a, b) / (len(a) + len(b))


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer (Hyyrö 2004)."""
    where: dict[str, int] = {}
    for index, unit in enumerate(a):
        where[unit] = where.get(unit, 0) | 1 << index
    ones = row = (1 << len(a)) - 1
    for unit in b:
        hits = row & where.get(unit, 0)
        row = (row + hits | row - hits) & ones
    return len(a) - row.bit_count()


@dataclass(frozen=True)
class GenerationScore:
    """What the loop calls to evaluate by answering; each process asks its share of the questions."""

    questions: list[Question]
    answer: Answer
    ranks: Ranks

    def __call__(self, stopped: Stopped) -> dict[str, float] | None:
        """{eval_exact_match, eval_rouge-l} over all questions; None when `stopped` said so before all were answered.

        Empty, with a printed reason, where some could not be answered: what fits at the start may not fit beside an optimizer.
        """
        mine = self.questions[self.ranks.rank :: self.ranks.world]
        alone = self.ranks.world == 1  # of several processes none may leave by itself
        failure = ""
        answers: list[str] | None = []
        try:
            answers = self.answer([question.prompt for question in mine], stopped if alone else lambda: False) if mine else []
        except SwiftError as error:
            failure = f"{error.what} {error.why}"
        if answers is None:
            return None
        pairs = [(plain(answer), plain(question.reference)) for answer, question in zip(answers, mine, strict=not failure)]
        exact, rouge = sum(a == b for a, b in pairs), sum(rouge_l(a, b) for a, b in pairs)
        *sums, failures = zip(*self.ranks.gather((exact, rouge, failure)), strict=True)
        if any(failures):
            if self.ranks.first:
                print(f"note: this evaluation is the loss alone, as rows could not be answered: {next(filter(None, failures))}")
            return {}
        return {name: sum(parts) / len(self.questions) for name, parts in zip((EXACT, ROUGE), sums, strict=True)}
