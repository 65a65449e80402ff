"""Text with control tokens -> ids, such that only the template's own control tokens become control tokens.

Invariants:
- A control string inside marked text is encoded exactly as a tokenizer without that control token would encode it.
- Without marks the ids are those of the plain tokenizer.

How: `mark` breaks control strings in user text with a character that no text holds. After rendering, what is still whole was
written by the template. Only when something was marked, the text goes to a twin of the tokenizer whose control tokens are
called by secret names: the template's are renamed to those, the user's stay ordinary text. It does not know templates.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from swiftlite.errors import TemplateError

# Added tokens without the `special` flag that are turn markers all the same (DeepSeek's <｜User｜>); others without the flag,
# such as <think> or <tool_call>, are words that users and assistants may write.
_MARKER = re.compile(r"<[|｜].+[|｜]>|</?s>|\[/?[A-Z_]+\]|</?(start|end|turn|bos|eos)\w*>")
_MARKS = [chr(point) for point in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters


class ControlTokens:
    """A tokenizer's control tokens, and encoding that keeps them apart from text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_source: str = "") -> None:
        if not tokenizer.is_fast:
            raise TemplateError(
                f"{type(tokenizer).__name__} has no fast tokenizer", "swiftlite encodes with tokenizer.json", "convert the tokenizer first"
            )
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self.ids: dict[str, int] = {}
        for token_id, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            if len(text) > 1 and (token.special or (text in template_source and _MARKER.fullmatch(text))):
                self.ids[text] = token_id
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.id_set = frozenset(self.ids.values())
        self._twin: tuple[Tokenizer, dict[str, str]] | None = None

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer proper. It is shared with transformers' wrapper, whose calls leave their settings in it."""
        shared = self._backend
        if shared.truncation is not None:
            shared.no_truncation()
        if shared.padding is not None:
            shared.no_padding()
        if shared.encode_special_tokens:
            shared.encode_special_tokens = False
        return shared

    def mark(self, value: Any) -> tuple[Any, str]:
        """(value with every control string in its strings broken, the mark used; "" when there was none to break).

        Walks lists and dicts.
        """
        if not self._holds_control(value):
            return value, ""
        used = json.dumps(value, ensure_ascii=False, default=str)
        mark = next((m for m in _MARKS if m not in used), None)
        if mark is None:
            raise TemplateError("the text holds every Unicode noncharacter and control tokens", fix="remove the noncharacters")
        return self._marked(value, mark), mark

    def _holds_control(self, value: Any) -> bool:
        if isinstance(value, str):
            return self.pattern.search(value) is not None
        if isinstance(value, dict):
            return any(self._holds_control(k) or self._holds_control(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return any(map(self._holds_control, value))
        return False

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            # after the first character, so that a template's strip() or split() sees what it would see without the mark
            return self.pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, dict):
            return {self._marked(k, mark): self._marked(v, mark) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked(item, mark) for item in value]
        return value

    def encode(self, text: str, mark: str = "") -> list[int]:
        """Ids of rendered text; no token is added before or after."""
        if not mark:
            return self.backend.encode(text, add_special_tokens=False).ids
        twin, names = self._twin_tokenizer()
        renamed = self.pattern.sub(lambda found: names[found[0]], text).replace(mark, "")
        return twin.encode(renamed, add_special_tokens=False).ids

    def encode_spans(self, before: str, text: str, mark: str = "") -> tuple[list[int], list[int], str]:
        """(ids of `before + text`, for each the index in `text` of its last character, negative within `before`; `text` as it
        was encoded, its marks gone)."""
        encoder = self.backend
        if mark:
            encoder, names = self._twin_tokenizer()
            before, text = (self.pattern.sub(lambda found: names[found[0]], part).replace(mark, "") for part in (before, text))
        encoding = encoder.encode(before + text, add_special_tokens=False)
        return encoding.ids, [end - 1 - len(before) for _, end in encoding.offsets], text

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several rendered texts without marks."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_after(self, anchor: str, text: str, mark: str = "") -> list[int]:
        """Ids of `text` where it follows the control token `anchor`: no start-of-text prefix space as sentencepiece adds."""
        ids = self.encode(anchor + text, mark)
        return ids[1:] if ids[:1] == [self.ids[anchor]] else self.encode(text, mark)

    def positions(self, ids: Iterable[int]) -> list[int]:
        """Indices of the control tokens in `ids`."""
        control = self.id_set
        return [index for index, token in enumerate(ids) if token in control]

    def _twin_tokenizer(self) -> tuple[Tokenizer, dict[str, str]]:
        if self._twin is None:
            secret = secrets.token_hex(8)  # nobody can write a control token's name
            names = {text: f"<{secret}-{number}>" for number, text in enumerate(self.ids)}
            twin = _renamed(self.backend, names)
            assert all(twin.token_to_id(names[text]) == token_id for text, token_id in self.ids.items())
            self._twin = twin, names
        return self._twin


def _renamed(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy of `backend` with the same ids, in which the tokens of `names` have other texts."""
    spec = json.loads(backend.to_str())
    spec["post_processor"] = None  # it only adds special tokens, which we never ask for
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:  # Unigram: [piece, score] by id
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # a merge that would make a control token's text out of ordinary text
        pairs = ((merge, tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)) for merge in model["merges"])
        model["merges"] = [merge for merge, (a, b) in pairs if a + b not in names and a not in names and b not in names]
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
