"""Which tokens of a conversation are targets: found on the rendering of any template, checked on token ids.

A *round* is one assistant turn: the prompt that serving would send to the model (`prompt`, its generation prompt included)
and what the model must then write (`answer`, up to and including the stop token). Both come from the template's own
rendering, so a row's ids always begin with exactly the ids that serving sends.

Rounds of one conversation are merged into one row as long as each prompt repeats what came before token by token. Where a
template rewrites history (drops old reasoning, moves the system text), it does not, and the round gets a row of its own.
This module does not render; it knows texts, tokens and the stop ids.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, replace

from swiftlite.chat.scales import LossScale
from swiftlite.chat.tokens import ControlTokens


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids, for each whether it is a target, and how much it weighs where that is not 1 for all."""

    ids: list[int]
    mask: list[bool]
    weights: list[float] | None = None


@dataclass(frozen=True)
class Round:
    """One assistant turn as text: `prompt` is what serving renders, `answer` continues it. `mark`: see ControlTokens.mark."""

    prompt: str
    answer: str
    learn: bool
    mark: str = ""
    weight: float = 1.0  # of the whole turn


@dataclass(frozen=True)
class Stops:
    """The tokens that end an assistant turn. `written` is False for templates that leave the last turn open (GLM-4: the next
    turn's header is the stop token); then `turn_id` is appended."""

    turn_id: int | None
    turn_text: str
    written: bool
    ids: frozenset[int]


class NoStopToken(Exception):
    """An assistant turn that no stop token ends."""


def continuation(prompt: str, rendered: str, content: str, reasoning: str) -> str | None:
    """What follows `prompt` when the template writes the answered conversation as `rendered`; None when that cannot be told.

    Usually `rendered` begins with `prompt`. It does not when the generation prompt holds text that the template leaves out of
    finished turns: an opened <think> block (R1 and its kin), or white space.
    """
    if rendered.startswith(prompt):
        return rendered[len(prompt) :]
    bare = prompt.rstrip()
    if rendered.startswith(bare):  # only white space differs
        extra, rest = prompt[len(bare) :], rendered[len(bare) :]
        while extra and rest and extra[0] == rest[0]:
            extra, rest = extra[1:], rest[1:]
        return rest
    head, opened, written = prompt.rpartition("<think>")
    closed = written.strip() == "</think>"
    if opened and rendered.startswith(head) and (closed or not written.strip()):
        rest = rendered[len(head) :]
        if closed:
            return rest
        if rest.startswith("<think>"):  # the template kept the thought, in its own spacing
            return rest.removeprefix("<think>").lstrip("\n")
        thought = reasoning or (content.partition("</think>")[0].rpartition("<think>")[2] if "</think>" in content else "")
        return thought.strip("\n") + "\n</think>\n\n" + rest.lstrip("\n")
    return None


def encode_round(tokens: ControlTokens, stops: Stops, turn: Round) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids with the stop token at the end). Raises NoStopToken."""
    prompt = tokens.encode(turn.prompt, turn.mark)
    whole = tokens.encode(turn.prompt + turn.answer, turn.mark)
    if whole[: len(prompt)] == prompt:
        answer = whole[len(prompt) :]
    elif stops.turn_text:  # the prompt's last token would swallow the answer's first letters: serving never sees that token
        answer = tokens.encode_after(stops.turn_text, turn.answer, turn.mark)
    else:
        answer = tokens.encode(turn.answer, turn.mark)
    return prompt, _closed(answer, stops)


def _closed(answer: list[int], stops: Stops) -> list[int]:
    """The answer cut after its first stop token (serving stops there), or one appended where the template leaves turns open."""
    for index, token in enumerate(answer):
        if token in stops.ids:
            return answer[: index + 1]
    if stops.written or stops.turn_id is None:
        raise NoStopToken
    return [*answer, stops.turn_id]


def slow_row(tokens: ControlTokens, stops: Stops, turn: Round) -> Encoded:
    """The row of one round alone: the reference that `merge_fast` equals."""
    prompt, answer = encode_round(tokens, stops, turn)
    return Encoded(prompt + answer, [False] * len(prompt) + [turn.learn] * len(answer))


def weighted_row(tokens: ControlTokens, stops: Stops, turn: Round, scale: LossScale) -> Encoded:
    """`slow_row` with the answer's weights. A token weighs what its last character weighs, the stop token what the turn does."""
    plain = slow_row(tokens, stops, turn)
    begin = len(tokens.encode(turn.prompt, turn.mark))
    answer = plain.ids[begin:]
    for before in (turn.prompt, stops.turn_text):  # as encode_round: after the prompt, or after the token that came before it
        ids, places, text = tokens.encode_spans(before, turn.answer, turn.mark)
        first = next((i for i, place in enumerate(places) if place >= 0), len(places))
        if ids[first : first + len(answer) - 1] == answer[:-1]:
            break
    by_character = [weight * turn.weight for weight in scale.weights(text)]
    found = [by_character[place] for place in places[first : first + len(answer) - 1]]
    weights = [0.0] * begin + [*found, turn.weight] if turn.learn else [0.0] * len(plain.ids)
    return Encoded(plain.ids, [weight > 0 for weight in weights], weights)


def chains(rounds: list[Round]) -> list[list[Round]]:
    """Runs of rounds in which each text begins with the one before: a candidate row each."""
    found: list[list[Round]] = []
    for turn in rounds:
        if found and turn.prompt.startswith(found[-1][-1].prompt + found[-1][-1].answer):
            found[-1].append(turn)
        else:
            found.append([turn])
    return found


def merge_rows(rows: list[Encoded], stop_ids: Collection[int]) -> list[Encoded]:
    """Rows of a conversation's rounds in order -> as few rows as keep every prompt exact; rows without a target go."""
    merged: list[Encoded] = []
    for row in rows:
        if merged:
            last = merged[-1]
            end = len(last.ids)
            # an open turn is closed by whichever header follows, so its last token may be another stop token
            same = len(row.ids) > end and row.ids[: end - 1] == last.ids[:-1]
            if same and (row.ids[end - 1] == last.ids[-1] or row.ids[end - 1] in stop_ids):
                weights = None if row.weights is None or last.weights is None else [*last.weights, *row.weights[end:]]
                row = Encoded(row.ids, [*last.mask, *row.mask[end:]], weights)
                merged.pop()
        merged.append(row)
    return [row for row in merged if any(row.mask)]


def whole_rows(rows: list[Encoded]) -> list[Encoded]:
    """The rows of one conversation with every token a target, but what a row repeats of the one before only once."""
    found, before = [], list[int]()
    for row in rows:
        same = next((i for i, (a, b) in enumerate(zip(row.ids, before, strict=False)) if a != b), min(len(row.ids), len(before)))
        found.append(Encoded(row.ids, [False] * same + [True] * (len(row.ids) - same)))
        before = row.ids
    return found


def without_empty_thought(row: Encoded, block: list[int]) -> Encoded:
    """The row with the ids of an empty thought (`block`) at the beginning of an answer taken out of the targets."""
    mask = list(row.mask)
    for index, target in enumerate(row.mask):
        if target and (index == 0 or not row.mask[index - 1]) and row.ids[index : index + len(block)] == block:
            mask[index : index + len(block)] = [False] * len(block)
    return replace(row, mask=mask)


def merge_fast(tokens: ControlTokens, stops: Stops, rounds: list[Round], ids: list[int], tails: dict[str, list[int]]) -> Encoded | None:
    """The one row of a chain of rounds from the ids of its longest text alone, or None where `slow_row` must decide.

    Control tokens cut a text into runs that are tokenized independently, so a prompt's ids are a prefix of the row's when
    its last run is (`tails` remembers the ids of such runs, mostly "<|im_start|>assistant\\n"). Equal to the slow way by test.
    """
    text = rounds[-1].prompt + rounds[-1].answer
    where = tokens.positions(ids)
    found = list(tokens.pattern.finditer(text))
    if len(where) != len(found):
        return None
    ends = [match.end() for match in found]
    mask = [False] * len(ids)
    stop_index = -1
    for turn in rounds:
        begin, end = len(turn.prompt), len(turn.prompt) + len(turn.answer)
        number = bisect_left(ends, begin + 1) - 1  # the last control token that ends at or before the prompt's end
        if number < 0 or (number + 1 < len(found) and found[number + 1].start() < begin):
            return None
        tail = text[found[number].start() : begin]
        known = tails.get(tail)
        if known is None:
            known = tokens.encode(tail)
            if len(tail) <= 64 and len(tails) < 256:
                tails[tail] = known
        first = where[number] + len(known)
        if ids[where[number] : first] != known:
            return None
        last_number = bisect_left(ends, end + 1) - 1
        stop = next((i for i in where[number + 1 : last_number + 1] if ids[i] in stops.ids), None)
        if stop is not None:
            stop_index = stop
        elif stops.written or stops.turn_id is None:
            raise NoStopToken
        elif turn is rounds[-1]:
            ids, mask, stop_index = [*ids, stops.turn_id], [*mask, False], len(ids)
        elif last_number + 1 < len(found) and found[last_number + 1].start() == end and ids[where[last_number + 1]] in stops.ids:
            stop_index = where[last_number + 1]
        else:
            return None
        if turn.learn:
            mask[first : stop_index + 1] = [True] * (stop_index + 1 - first)
    return Encoded(ids[: stop_index + 1], mask[: stop_index + 1])
