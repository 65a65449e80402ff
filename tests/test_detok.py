"""Detokenizer: streamed text equals decoding at once, whatever the tokens; no part of a stop string ever shows."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swiftlite.engine.detok import Decoder, Detokenizer

TEXTS = [
    "Hello, how are you?",
    "你好！浙江的省会在哪？",
    "mixed 中文 and English — 𝕏 👩‍👩‍👧‍👦 emoji 🙂🙃",
    "é ü ñ z̀ ยินดี नमस्ते",
    "  spaces\n\n\ttabs  ",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return Decoder(tokenizer)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_pieces_add_up_and_never_show_half_a_character(tokenizer, decoder, text, chunk):
    ids = tokenizer(text)["input_ids"]
    detok, shown = Detokenizer(decoder, [1, 5, 6]), ""
    for start in range(0, len(ids), chunk):
        detok.feed(ids[start : start + chunk])
        assert detok.text.startswith(shown) and "\ufffd" not in detok.text
        shown = detok.text
    detok.finish()
    assert detok.text == text


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_end_equal_to_one_decoding(tokenizer, decoder, seed):
    """Random models emit invalid UTF-8 all the time."""
    rng = random.Random(seed)
    ids = [rng.randrange(3, len(tokenizer)) for _ in range(120)]
    for chunk in (1, 7):
        detok = Detokenizer(decoder, [])
        for start in range(0, len(ids), chunk):
            before = detok.text
            detok.feed(ids[start : start + chunk])
            assert detok.text.startswith(before)
        detok.finish()
        assert detok.text == tokenizer.decode(ids)


def test_the_first_word_keeps_its_space_after_a_prompt():
    """Metaspace decoders (Llama 2, Mistral) strip a space at the start of what they decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "▁The": 1, "▁capital": 2, "▁is": 3, "▁Paris": 4, "!": 5}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    decode = Decoder(PreTrainedTokenizerFast(tokenizer_object=raw))
    for feeds in ([[3], [4], [5]], [[3, 4, 5]]):
        detok = Detokenizer(decode, [1, 2])
        for ids in feeds:
            detok.feed(ids)
        detok.finish()
        assert detok.text == " is Paris!"


def test_special_tokens_are_skipped_or_shown(tokenizer, decoder):
    ids = [1, *tokenizer("Hello")["input_ids"], 2]
    for skip, expected in ((True, "Hello"), (False, "<|im_start|>Hello<|im_end|>")):
        detok = Detokenizer(decoder, [], skip_special=skip)
        detok.feed(ids)
        detok.finish()
        assert detok.text == expected


def test_endless_garbage_stays_fast_and_unknown_ids_are_silent(tokenizer, decoder):
    lone = tokenizer.convert_tokens_to_ids("å")  # the byte 0xE5 alone: never a character
    detok = Detokenizer(decoder, [])
    for _ in range(500):
        detok.feed([lone])
        assert len(detok._ids) < 32, "the window must not grow"
    for _ in range(50):
        detok.feed([10**6])
    detok.feed(tokenizer("end")["input_ids"])
    detok.finish()
    assert detok.text == "\ufffd" * 500 + "end"


def run(decoder, tokenizer, text, stops, include=False, check_from=0):
    detok, seen = Detokenizer(decoder, [], stops, include), []
    for token in tokenizer(text)["input_ids"]:
        done = detok.feed([token], check_from)
        seen.append(detok.text)
        if done:
            break
    detok.finish()
    return detok, seen


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stops", "cut"),
    [
        ("one two three four", ["three"], "one two "),
        ("one two three four", ["four", "two"], "one "),
        ("aaab aab", ["aab"], "a"),
        ("你好！浙江的省会在哪？", ["省会"], "你好！浙江的"),
        ("abc def", ["xyz"], None),
        ("almost ENDE", ["ENDED"], None),
    ],
)
def test_stop_strings(decoder, tokenizer, text, stops, cut, include):
    detok, seen = run(decoder, tokenizer, text, stops, include)
    expected = text if cut is None else cut
    if cut is not None:
        assert detok.matched in stops
        if include:
            expected += detok.matched
    assert detok.text == expected
    for shown in seen:  # what a reader saw is always the beginning of the final text
        assert expected.startswith(shown)


@pytest.mark.parametrize("seed", range(10))
def test_stop_strings_against_a_search_in_the_whole_text(decoder, tokenizer, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(3, 7))) for _ in range(3)]
    detok, seen = run(decoder, tokenizer, text, stops)
    # the first position at which some stop string is complete decides; the earliest start among those found then
    ends = [(end, stop) for end in range(1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    if ends:
        assert detok.matched is not None and detok.text + detok.matched in text
        assert len(detok.text) <= ends[0][0] - len(ends[0][1]), "text goes past a complete stop string"
    else:
        assert detok.text == text
    assert all(detok.text.startswith(shown) for shown in seen)


def test_min_tokens_lets_early_stop_strings_pass(decoder, tokenizer):
    text = "stop here and stop there"
    ids = tokenizer(text)["input_ids"]
    first = next(n for n in range(1, len(ids) + 1) if "stop" in tokenizer.decode(ids[:n]))
    detok, _ = run(decoder, tokenizer, text, ["stop"], check_from=first)
    assert detok.text == "stop here and "
