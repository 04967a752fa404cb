"""The text shown token by token is the text of the whole, up to the first stop string."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from server.sequence import SampledToken
from server.text.detokenizer import Detokenizer, TextPiece
from tests.fakes import EOS, encode, small_tokenizer

Decode = Callable[[Sequence[int]], str]

TEXTS = [
    "hello there, how are you today?",
    "👩‍👩‍👧 family, 🇩🇪🇫🇷 flags and 🎉🎉🎉",
    "東京は日本の首都 and back",
    "  leading,\n\n  inner   and trailing  ",
    "é" * 50 + "日本" * 50,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9d1\U0001f3fd‍\U0001f52c" * 5,
]


def byte_level(texts: Sequence[str] = ("hello there",), vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE; trained on one text without pre-tokenization of words, its tokens cut through characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Unigram-style pieces with a leading space mark, and bytes for all other characters, as in Llama 2."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁hello",
        "▁there",
        "h",
        "e",
        "l",
        "o",
        "a",
        ",",
    ]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Token ids of pieces that are in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[piece] for piece in pieces]


def shown(decode: Decode, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """All that is shown, piece by piece."""
    detokenizer = Detokenizer(decode, stop)
    return "".join(piece.text for piece in pieces(detokenizer, ids))


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[TextPiece]:
    """All pieces of a text, the last one with what was held back."""
    return [*(detokenizer.push(SampledToken(token)) for token in ids), detokenizer.finish()]


def cut(text: str, stop: Sequence[str]) -> str:
    """The whole text up to the stop string that is complete first."""
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_add_up_to_the_whole(text: str) -> None:
    tokenizer = byte_level()
    assert shown(tokenizer.decode, tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_may_end_in_the_middle_of_characters(text: str) -> None:
    tokenizer = byte_level([text], vocab_size=290)
    assert shown(tokenizer.decode, tokenizer.encode(text).ids) == text


def test_a_character_is_never_shown_in_part() -> None:
    tokenizer = byte_level()
    for text in TEXTS:
        detokenizer = Detokenizer(tokenizer.decode, [])
        assert all("\ufffd" not in detokenizer.push(SampledToken(token)).text for token in tokenizer.encode(text).ids)


def test_any_bytes_at_all_come_out_as_in_the_whole() -> None:
    tokenizer, draw = byte_level(), random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(draw.randrange(1, 80))]
        assert shown(tokenizer.decode, ids) == tokenizer.decode(ids)


def test_leading_spaces_of_sentencepiece_are_kept_between_words() -> None:
    tokenizer, draw = sentencepiece_like(), random.Random(1)
    words = ids_of(tokenizer, "▁", "▁hello", "▁there", "h", ",")
    japanese = ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in "日本語".encode()))
    for _ in range(300):
        ids = [token for _ in range(draw.randrange(1, 20)) for token in draw.choice([[draw.choice(words)], japanese])]
        assert shown(tokenizer.decode, ids) == tokenizer.decode(ids)


def test_special_tokens_do_not_cost_the_next_word_its_space() -> None:
    """The window once began at a skipped token, so that the word behind it lost its leading space."""
    tokenizer = sentencepiece_like()
    tokenizer.add_special_tokens(["<s>"])
    ids = ids_of(tokenizer, "▁hello", "<s>", "<s>", "▁there")
    assert shown(tokenizer.decode, ids) == "hello there"


@pytest.mark.parametrize("text", TEXTS)
def test_the_first_stop_string_to_be_complete_ends_the_text(text: str) -> None:
    tokenizer, draw = byte_level([text], vocab_size=290), random.Random(2)
    ids = tokenizer.encode(text).ids
    for _ in range(100):
        starts = [draw.randrange(len(text)) for _ in range(3)]
        stop = [text[start : start + draw.randrange(1, 8)] for start in starts] + ["not there", text[:3] + "x"]
        assert shown(tokenizer.decode, ids, stop) == cut(text, stop)


def test_nothing_of_a_stop_string_is_shown_before_it_is_known() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.decode, ["\nUser:"])
    shown = [detokenizer.push(SampledToken(token)).text for token in tokenizer.encode("yes\nUser: no").ids]
    assert "".join(shown) == "yes"
    assert detokenizer.stopped
    assert detokenizer.finish() == TextPiece("")


def test_what_only_began_like_a_stop_string_is_shown_at_the_end() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.decode, ["\nUser:"])
    shown = [detokenizer.push(SampledToken(token)).text for token in tokenizer.encode("yes\nUse").ids]
    assert "".join(shown) == "yes"
    assert detokenizer.finish().text == "\nUse"
    assert not detokenizer.stopped


def test_the_work_for_a_token_does_not_grow_with_the_text() -> None:
    tokenizer, longest = byte_level(), 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return str(tokenizer.decode(ids))

    half_a_character = tokenizer.encode("é").ids[0]
    for ids in (tokenizer.encode("hello there 日本 " * 50).ids, [half_a_character] * 500):
        shown(decode, ids)
    assert longest <= 20


def test_special_tokens_are_not_shown() -> None:
    def decode(ids: Sequence[int]) -> str:
        return str(small_tokenizer().decode(list(ids), skip_special_tokens=True))

    assert shown(decode, [*encode("the cat"), EOS]) == "the cat"


def pushed(text: str, *stop: str, min_tokens: int) -> tuple[str, bool]:
    """What is shown of a text whose characters are tokens, and whether a stop string ended it."""
    detokenizer = Detokenizer(lambda ids: "".join(map(chr, ids)), stop, min_tokens=min_tokens)
    shown = "".join(piece.text for piece in pieces(detokenizer, [ord(character) for character in text]))
    return shown, detokenizer.stopped


def test_a_stop_string_among_the_first_tokens_is_text() -> None:
    """As vLLM has it: one that is complete behind them counts, even if it began before."""
    assert pushed("one stop and a stop here", "stop", min_tokens=0) == ("one ", True)
    assert pushed("one stop and a stop here", "stop", min_tokens=7) == ("one ", True)
    assert pushed("one stop and a stop here", "stop", min_tokens=8) == ("one stop and a ", True)
    assert pushed("one stop and a stop here", "stop", min_tokens=19) == ("one stop and a stop here", False)
    assert pushed("stop", "stop", min_tokens=99) == ("stop", False)


def test_a_stop_string_among_the_first_tokens_stays_text_while_a_longer_one_may_follow() -> None:
    """It was held back as the beginning of the longer one, and ended the answer at the next token."""
    assert pushed("abq", "ab", "abab!", min_tokens=2) == ("abq", False)
    assert pushed("ababq", "ab", "abab!", min_tokens=2) == ("ab", True)
    assert pushed("abab!q", "ab", "abab!", min_tokens=4) == ("", True)
    assert pushed("ab", "ab", "abab!", min_tokens=2) == ("ab", False)
    assert pushed("aaa", "aa", "aaaa", min_tokens=2) == ("a", True)
