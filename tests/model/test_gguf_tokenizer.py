"""The tokenizer of a GGUF gives the ids of the tokenizer that the file was made of."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

from base_files.gguf.pretokenizers import PRE_TOKENIZERS
from base_files.gguf.tokenizer import GGUFTokenizer, TokenType, read_tokenizer
from tests.gguf_models import Metadata, tokenizer_metadata
from tests.serving import ROOT
from tests.tiny_models import TEXTS, tiny_tokenizer

HARD = (
    "Hello world 123 4567   89", "a\n\n\n  b\t\tc\r\nd", "It's I'LL don't we'Ve", "Привет, мир! Ёж", "日本語 漢字",
    "😀🎉 emoji 👩‍👩‍👧 é e\u0301", "  12", "\n1", " ", "", " leading", "trailing  ", "▁ literal ▁▁", "<0x41> <s>",
    "x = f(10**-3); // ½ ²³", "<|user|>\nhi<|end|>\n<|assistant|>", "<|endoftext|><|endoftext|> <|system|>x<|tool|>",
    "The quick brown fox jumps over the lazy dog. What is the capital of France?",
)  # fmt: skip


def read(metadata: Mapping[str, Any], vocab_size: int | None = None) -> GGUFTokenizer:
    """Lists of numbers are numpy's, as the container reads them."""
    values = {
        key: np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value
        for key, value in metadata.items()
    }
    return read_tokenizer(values, vocab_size=vocab_size or len(metadata["tokenizer.ggml.tokens"]))


def ids_of(tokenizer: Tokenizer, texts: Sequence[str] = HARD, *, special: bool = True) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=special).ids for text in texts]


@pytest.fixture(scope="module")
def micro() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "micro_base")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def test_a_byte_level_tokenizer_comes_back(micro: PreTrainedTokenizerFast) -> None:
    """micro cuts text as SmolLM2 does: digits one by one, then GPT-2's rule."""
    ours = read(tokenizer_metadata(micro, 4096, "smollm"))
    built = ours.build()
    assert ids_of(built) == ids_of(micro.backend_tokenizer)
    assert [built.decode(ids) for ids in ids_of(built)] == [
        micro.decode(ids, skip_special_tokens=True) for ids in ids_of(built)
    ]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (micro.bos_token_id, micro.eos_token_id, micro.pad_token_id)
    assert ours.chat_template == micro.chat_template


@pytest.mark.parametrize(("name", "pattern"), [("qwen2", QWEN2), ("deepseek-r1-qwen", QWEN2), ("qwen35", QWEN35)])
def test_qwens_rules_are_those_of_transformers(name: str, pattern: str) -> None:
    assert PRE_TOKENIZERS[name].patterns == (pattern,) and PRE_TOKENIZERS[name].composed


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġ", "ĠI", "'", "LL", "Ġgo", "ĊĊ"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠI", "'", "LL", "Ġgo", "ĊĊ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġ", "ĠI", "'LL", "Ġgo", "ĊĊ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠI", "'LL", "Ġgo", "ĊĊ"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠI", "'LL", "Ġgo", "ĊĊ"]),
        ("gpt-4o", ["It's", "Ġ", "123", "4", "Ġ", "ĠI'LL", "Ġgo", "ĊĊ"]),
        ("deepseek-coder", ["It", "'", "s", "Ġ", "1", "2", "3", "4", "Ġ", "ĠI", "'", "LL", "Ġgo", "Ċ", "Ċ"]),
        ("deepseek-v3", ["It", "'s", "Ġ", "123", "4", "Ġ", "ĠI", "'LL", "Ġgo", "ĊĊ"]),
    ],
)
def test_text_is_cut_by_the_rule_of_the_name(name: str, pieces: list[str]) -> None:
    cut = PRE_TOKENIZERS[name].build().pre_tokenize_str("It's 1234  I'LL go\n\n")
    assert [piece for piece, _ in cut] == pieces


@pytest.mark.parametrize("pre", ["unheard-of", "default", None])
def test_a_rule_that_is_not_known_refuses_the_file(pre: str | None, micro: PreTrainedTokenizerFast) -> None:
    metadata = tokenizer_metadata(micro, 4096, pre or "")
    if pre is None:
        del metadata["tokenizer.ggml.pre"]
    with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.pre is (missing or )?'{pre or 'default'}'"):
        read(metadata)


def sentence_piece(*, prefix: bool) -> tuple[Tokenizer, Metadata]:
    """A tokenizer as those of Llama 2 and Gemma in tokenizer.json, and what a GGUF says of it: scores, no merges."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *HARD[:5]] * 4, trainer)
    described = json.loads(tokenizer.to_str())
    described["pre_tokenizer"] = None
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokens = [ids[token_id] for token_id in range(len(ids))]
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(described["model"]["merges"])))}
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * (len(tokens) - len(types))
    return tokenizer, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-ranks.get(token, 1000)) for token in tokens],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_of_sentence_piece_comes_back(prefix: bool) -> None:
    """Merges are found by the scores, unknown characters become bytes, and the prompt begins with bos by default."""
    theirs, metadata = sentence_piece(prefix=prefix)
    ours = read(metadata)
    built = ours.build()
    for special in (True, False):
        assert ids_of(built, special=special) == ids_of(theirs, special=special)
    assert [built.decode(ids) for ids in ids_of(built)] == [theirs.decode(ids) for ids in ids_of(built)]
    assert (ours.bos_id, ours.eos_id, ours.unknown_id, ours.end_ids) == (1, 2, 0, [2])


def test_phi3_drops_white_space_behind_its_control_tokens() -> None:
    _, metadata = sentence_piece(prefix=True)
    metadata["tokenizer.ggml.tokens"] += ["<|end|>", "<|endoftext|>"]
    metadata["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] += [int(TokenType.CONTROL)] * 2
    phi3 = read({**metadata, "general.architecture": "phi3"}).build()
    other = read(metadata).build()
    same = ids_of(other, ["<|end|>a", "<|endoftext|>\na"], special=False)
    assert ids_of(phi3, ["<|end|>\n  a", "<|endoftext|>\na"], special=False) == same


def byte_level(**changes: Any) -> Metadata:
    return tokenizer_metadata(tiny_tokenizer(), 512, "gpt-2") | {
        f"tokenizer.{key}": value for key, value in changes.items()
    }


def with_tokens(*texts: str, **changes: Any) -> Metadata:
    """The tiny tokenizer with more control tokens behind its own."""
    metadata = byte_level()
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += texts
    metadata["tokenizer.ggml.token_type"] += [int(TokenType.CONTROL)] * len(texts)
    return metadata | {f"tokenizer.ggml.{role}_token_id": count + index for role, index in changes.items()}


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        (with_tokens("<a>", "<b>", "<c>", eos=0, eot=1, eom=2), ["<a>", "<b>", "<c>"]),
        (
            with_tokens("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", eos=1),
            ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"],
        ),
        (with_tokens("<eos>", "<end_of_turn>", eos=0), ["<eos>", "<end_of_turn>"]),
        (with_tokens("<|return|>", "<|call|>", eos=0), ["<|return|>", "<|call|>"]),
    ],
)
def test_every_end_token_of_the_file_ends_answers(metadata: Metadata, ends: list[str]) -> None:
    """Llama 3 ends turns by <|eot_id|>, and files name <|end_of_text|>: answers went on for ever.

    The tiny tokenizer has <|endoftext|>, and <|end|>, which ends only messages where <|return|> and <|call|> are.
    """
    tokenizer = read(metadata)
    found = [tokenizer.tokens[token_id] for token_id in tokenizer.end_ids]
    assert found[0] == ends[0] and set(ends) <= set(found)
    assert ("<|end|>" in found) == ("<|return|>" not in ends)


def test_a_user_defined_end_token_ends_answers_too() -> None:
    """So older converters wrote <|im_end|>, and named </s> as the end: answers went on."""
    metadata = with_tokens("</s>", "<|im_end|>", "<|turn|>", eos=0)
    metadata["tokenizer.ggml.token_type"][-2:] = [int(TokenType.USER_DEFINED)] * 2
    tokenizer = read(metadata)
    ends = [tokenizer.tokens[token_id] for token_id in tokenizer.end_ids]
    assert ends[0] == "</s>" and "<|im_end|>" in ends and "<|turn|>" not in ends


def test_templates_are_known_by_name() -> None:
    assert read(byte_level()).chat_template == tiny_tokenizer().chat_template
    named = read(byte_level(**{"chat_template.tool_use": "T"})).chat_template
    assert named == {"default": tiny_tokenizer().chat_template, "tool_use": "T"}
    without = {key: value for key, value in byte_level().items() if key != "tokenizer.chat_template"}
    assert read(without).chat_template is None


def test_bos_and_eos_frame_prompts_where_the_file_asks_for_it() -> None:
    framed = read(byte_level(**{"ggml.add_bos_token": True, "ggml.add_eos_token": True}))
    plain = ids_of(read(byte_level()).build(), ["hello"])[0]
    assert ids_of(framed.build(), ["hello"]) == [[framed.bos_id, *plain, framed.eos_id]]
    assert ids_of(framed.build(), ["hello"], special=False) == [plain]


def test_words_that_are_tokens_are_not_merged_where_the_rule_says_so() -> None:
    """Llama 3 and Tekken have tokens that no merges lead to."""
    metadata = byte_level(**{"ggml.pre": "llama-bpe"})
    del metadata["tokenizer.ggml.merges"][1:]
    word = next(token for token in metadata["tokenizer.ggml.tokens"] if token.startswith("Ġ") and len(token) > 3)
    ids = read(metadata).build().encode(word.replace("Ġ", " "), add_special_tokens=False).ids
    assert ids == [metadata["tokenizer.ggml.tokens"].index(word)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ggml.model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; gpt2 and llama are read"),
        ({"ggml.tokens": ["a", "b", "a"]}, r"tokenizer\.ggml\.tokens has 'a' twice"),
        ({"ggml.tokens": ["a"] * 600}, r"has 600 tokens, and token_embd\.weight 512 rows"),
        ({"ggml.token_type": [1, 2]}, r"tokenizer\.ggml\.token_type is .* a list of \d+ numbers"),
        ({"ggml.eos_token_id": 512}, r"tokenizer\.ggml\.eos_token_id is 512, and there are \d+ tokens"),
        ({"ggml.add_bos_token": 1}, r"tokenizer\.ggml\.add_bos_token is 1: it must be true or false"),
        ({"ggml.precompiled_charsmap": [1]}, r"not understood: tokenizer\.ggml\.precompiled_charsmap"),
        ({"chat_template": 3}, r"tokenizer\.chat_template is 3: it must be a string"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_with_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read(byte_level(**changes), 512)


@pytest.mark.parametrize("merge", ["ab", "unknown token"])
def test_merges_that_do_not_fit_are_refused_with_a_sentence(merge: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer"):
        read(byte_level(**{"ggml.merges": [merge]})).build()


def test_a_large_vocabulary_is_built_in_seconds() -> None:
    """150,000 tokens and as many merges, as Qwen has them; and by scores, as Gemma has 262,000."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs = [(left, right) for left in sorted(alphabet) for right in sorted(alphabet)]
    pairs += [(left + right, third) for left, right in pairs[:500] for third in sorted(alphabet)]
    tokens = list(dict.fromkeys([*alphabet, *("".join(pair) for pair in pairs)]))[:150_000]
    known = set(tokens)
    metadata = byte_level(
        **{
            "ggml.tokens": tokens,
            "ggml.merges": [" ".join(pair) for pair in pairs if "".join(pair) in known],
            "ggml.token_type": [int(TokenType.NORMAL)] * len(tokens),
            "ggml.scores": [float(-rank) for rank in range(len(tokens))],
        }
    )
    for kind in ("gpt2", "llama"):
        begin = time.perf_counter()
        read(metadata | {"tokenizer.ggml.model": kind}).build()
        assert time.perf_counter() - begin < 20


def test_placeholders_of_the_embeddings_last_rows_are_no_tokens(micro: PreTrainedTokenizerFast) -> None:
    tokenizer = read(tokenizer_metadata(micro, 4200, "smollm")).build()
    assert tokenizer.get_vocab_size() == len(micro)
    assert tokenizer.token_to_id("[PAD4199]") is None
