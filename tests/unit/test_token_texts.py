"""Every piece of text comes with the tokens that it is made of, whose bytes end to end are its bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.sequence import SampledToken
from server.text.detokenizer import Detokenizer, TextPiece, TokenStart
from server.text.prompt import PromptRenderer
from tests.fakes import EOS, encode, small_tokenizer
from tests.tiny_models import tiny_tokenizer
from tests.unit.test_detokenizer import TEXTS, byte_level, ids_of, pieces, sentencepiece_like

BROKEN = "\ufffd"


def renderer(tokenizer: Tokenizer) -> PromptRenderer:
    """As the server has it."""
    return PromptRenderer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def metaspace() -> Tokenizer:
    """Words with a leading space mark that the first one loses, as in T5 and newer conversions of Llama 2."""
    words = ["<unk>", "▁", "▁hello", "▁there", "a", ",", "▁日本", "語"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def all_bytes(prompts: PromptRenderer, tokens: Iterable[TokenStart]) -> bytes:
    """The bytes of tokens end to end, the first of which is the first of an answer."""
    joined, first = b"", True
    for token, _ in tokens:
        joined += prompts.token_texts.get(token.id, first=first).data or b""
        first = first and prompts.token_texts.is_special(token.id)
    return joined


def check(prompts: PromptRenderer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[TextPiece]:
    """The pieces of a text, whose tokens are held against it after each one."""
    detokenizer = Detokenizer(prompts.decode, stop)
    found = pieces(detokenizer, ids)
    text, shown = "", ""
    tokens: list[TokenStart] = []
    for piece in found:
        before = all_bytes(prompts, tokens)
        text, tokens = text + piece.text, [*tokens, *piece.tokens]
        shown = all_bytes(prompts, tokens).decode(errors="replace")
        assert shown.startswith(text)
        if piece.text and piece.tokens:
            without_last = all_bytes(prompts, tokens[:-1])
            assert len(without_last.decode(errors="ignore")) < len(text) and without_last.startswith(before)
        assert piece.text or not piece.tokens or piece is found[-1]
    assert [token.id for token, _ in tokens] == list(ids[: len(tokens)])
    assert detokenizer.stopped or (len(tokens) == len(ids) and shown == text)
    return found


BASES: list[Callable[[], PromptRenderer]] = [
    lambda: renderer(byte_level()),
    lambda: renderer(byte_level(TEXTS, vocab_size=340)),
    lambda: PromptRenderer(tiny_tokenizer()),
    lambda: PromptRenderer(small_tokenizer()),
]


@pytest.mark.parametrize("base", BASES)
def test_bytes_of_any_tokens_at_all_are_the_bytes_of_their_text(base: Callable[[], PromptRenderer]) -> None:
    prompts, draw = base(), random.Random(0)
    for _ in range(150):
        ids = [draw.randrange(prompts.vocab_size) for _ in range(draw.randrange(1, 15))]
        if prompts.decode(ids).endswith(BROKEN * 2):  # what is cut off may be one character or several
            continue
        check(prompts, ids)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_text_are_those_of_its_tokens_and_each_says_where_it_begins(
    base: Callable[[], PromptRenderer], text: str
) -> None:
    prompts = base()
    found = check(prompts, prompts.completion(text))
    tokens = [token for piece in found for token in piece.tokens]
    assert all_bytes(prompts, tokens) == text.encode()
    for number, (_, start) in enumerate(tokens):
        assert start == len(all_bytes(prompts, tokens[:number]).decode(errors="ignore"))


def test_bytes_of_sentencepiece_are_those_of_its_text_from_the_first_token_on() -> None:
    """The first token loses its leading space, wherever special tokens are, and characters are bytes."""
    tokenizer, draw = sentencepiece_like(), random.Random(1)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["<tool>"])
    prompts = renderer(tokenizer)
    words = ids_of(tokenizer, "▁", "▁hello", "▁there", "h", ",", "<s>", "<tool>", "<0x20>", "<0x41>")
    japanese = ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in "日本語".encode()))
    for _ in range(300):
        ids = [token for _ in range(draw.randrange(1, 12)) for token in draw.choice([[draw.choice(words)], japanese])]
        found = check(prompts, ids)
        tokens = [token for piece in found for token in piece.tokens]
        assert all_bytes(prompts, tokens) == prompts.decode(ids).encode()


def test_bytes_of_words_with_space_marks_are_those_of_their_text() -> None:
    tokenizer, draw = metaspace(), random.Random(2)
    prompts = renderer(tokenizer)
    for _ in range(200):
        ids = [draw.randrange(1, prompts.vocab_size) for _ in range(draw.randrange(1, 12))]
        found = check(prompts, ids)
        assert all_bytes(prompts, [token for piece in found for token in piece.tokens]) == prompts.decode(ids).encode()


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_behind_a_stop_string_are_left_out_and_one_across_its_beginning_is_not(text: str) -> None:
    prompts, draw = renderer(byte_level([text], vocab_size=290)), random.Random(3)
    ids = prompts.completion(text)
    for _ in range(60):
        start = draw.randrange(len(text))
        found = check(prompts, ids, [text[start : start + draw.randrange(1, 8)], "not there"])
        shown, tokens = "".join(piece.text for piece in found), [token for piece in found for token in piece.tokens]
        assert all(start < len(shown) for _, start in tokens)
        assert all_bytes(prompts, tokens).startswith(shown.encode())
        assert len(all_bytes(prompts, tokens[:-1])) < max(len(shown.encode()), 1)


def test_text_held_back_comes_with_its_tokens() -> None:
    prompts = PromptRenderer(small_tokenizer())
    ids = encode("yes\nUs no")
    found = check(prompts, ids, ["\nUser:"])
    by_text = {piece.text: b"".join(prompts.token_texts.get(t.id, first=False).data or b"" for t, _ in piece.tokens)
               for piece in found if piece.text}  # fmt: skip
    assert by_text["\nUs "] == b"\nUs "
    assert all(text.encode() == data for text, data in by_text.items())


def test_a_character_of_several_tokens_comes_with_all_of_them() -> None:
    prompts = renderer(byte_level())
    ids = prompts.completion("x日")
    found = check(prompts, ids)
    assert [(piece.text, len(piece.tokens)) for piece in found] == [("x", 1), ("", 0), ("", 0), ("日", 3), ("", 0)]
    assert [prompts.token_texts.get(token, first=False).text for token in ids] == ["x", None, None, None]
    assert [start for piece in found for _, start in piece.tokens] == [0, 1, 1, 1]


def test_special_tokens_have_a_name_and_no_bytes_and_come_with_what_follows() -> None:
    prompts = PromptRenderer(small_tokenizer())
    found = check(prompts, [EOS, *encode("cat"), EOS])
    assert prompts.token_texts.get(EOS, first=False) == ("<|end|>", None)
    tokens = [(piece.text, [token.id for token, _ in piece.tokens]) for piece in found if piece.tokens]
    assert tokens[0][1][0] == EOS and tokens[0][0] and tokens[-1] == ("", [EOS])


def test_an_id_beyond_the_tokenizer_is_no_error() -> None:
    """Many bases have more rows in their embedding than their tokenizer has tokens."""
    prompts = PromptRenderer(small_tokenizer(), vocab_size=400)
    assert prompts.token_texts.get(399, first=False) == ("", b"")


def test_a_token_keeps_what_it_was_sampled_with() -> None:
    prompts = PromptRenderer(small_tokenizer())
    token = SampledToken(encode("cat")[0], -0.5, ((1, -0.5),))
    assert Detokenizer(prompts.decode, []).push(token).tokens == ((token, 0),)
