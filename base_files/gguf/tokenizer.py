"""The tokenizer and the chat template of a GGUF, made from its metadata.

Two kinds of tokenizer are read: byte-level BPE with merges (``gpt2``) and SentencePiece's BPE with scores (``llama``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from base_files.gguf.header import Value
from base_files.gguf.metadata import MetadataReader, listed
from base_files.gguf.pretokenizers import PreTokenizerRule, pre_tokenizer_rule

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

END_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "<EOT>", "<end_of_utterance>", "<eos>", "</s>",
)  # fmt: skip
"""Added tokens that end an answer whatever the file says, as llama.cpp has it: files name only one of them."""
_HARMONY = {"<|return|>", "<|call|>", "<|end|>"}
"""Where all three are, <|end|> ends a message and not the answer."""
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
"""Behind Phi-3's other control tokens white space is dropped, which is not in the file."""
_KINDS = ("gpt2", "llama")
_SPACE = "▁"
_NO_EFFECT = (
    "seperator_token_id", "mask_token_id", "cls_token_id", "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id",
    "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id", "prefix_token_id", "suffix_token_id",
    "middle_token_id", "add_sep_token", "remove_extra_whitespaces", "token_type_count",
)  # fmt: skip
"""Keys that change no prompt of a language model: names of tokens, and settings of other kinds of tokenizers."""


class TokenType(IntEnum):
    """llama.cpp's numbers in ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GGUFTokenizer:
    """What the metadata says; ``build`` makes the tokenizer of it.

    ``end_ids`` end an answer, the file's eos first. ``chat_template`` is None for a model without one, and by name
    where there are several.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    kind: str
    rule: PreTokenizerRule
    merges: Sequence[str] | None
    scores: Sequence[float]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    pad_id: int | None
    end_ids: list[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strips_after_control: bool
    chat_template: str | dict[str, str] | None

    def build(self) -> Tokenizer:
        """Takes a second or two for 150,000 tokens. Raises ``ValueError`` where tokens and merges do not fit."""
        try:
            tokenizer = self._byte_level() if self.kind == "gpt2" else self._sentence_piece()
        except ValueError:
            raise
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ValueError(f"its tokenizer cannot be made: {error}") from error
        added = list(self._added())
        tokenizer.add_special_tokens([token for token in added if token.special])
        tokenizer.add_tokens([token for token in added if not token.special])
        self._frame(tokenizer)
        return tokenizer

    def special_tokens(self) -> dict[str, str]:
        """Texts by transformers' names, such as ``eos_token``."""
        ids = {
            "bos_token": self.bos_id,
            "eos_token": self.eos_id,
            "unk_token": self.unknown_id,
            "pad_token": self.pad_id,
        }
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    def _vocabulary(self) -> dict[str, int]:
        """Without the placeholders that fill the embedding's rows up."""
        placeholder = TokenType.UNUSED
        return {
            token: token_id
            for token_id, token in enumerate(self.tokens)
            if self.types[token_id] != placeholder or token != f"[PAD{token_id}]"
        }

    def _byte_level(self) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models, normalizers

        merges = [_halves(merge) for merge in self.merges or ()]
        tokenizer = Tokenizer(models.BPE(self._vocabulary(), merges, ignore_merges=self.rule.whole_words))
        if self.rule.composed:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = self.rule.build()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_piece(self) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models, normalizers

        vocabulary = self._vocabulary()
        merges = [_halves(merge) for merge in self.merges] if self.merges else self._merges_by_score(vocabulary)
        unknown = None if self.unknown_id is None else self.tokens[self.unknown_id]
        model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        prefix = [normalizers.Prepend(_SPACE)] if self.add_space_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.add_space_prefix:
            steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence(steps)
        return tokenizer

    def _merges_by_score(self, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
        """Every way to make a piece of two others, by its score: SentencePiece merges what makes the best piece."""
        pieces = [
            token_id for token_id, kind in enumerate(self.types) if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
        ]
        mergeable = {self.tokens[token_id]: token_id for token_id in pieces}
        found: list[tuple[float, int, int, int]] = []
        for token_id in pieces:
            token, score = self.tokens[token_id], self.scores[token_id]
            for cut in range(1, len(token)):
                left, right = mergeable.get(token[:cut]), mergeable.get(token[cut:])
                if left is not None and right is not None:
                    found.append((-score, token_id, left, right))
        found.sort()
        return [(self.tokens[left], self.tokens[right]) for _, _, left, right in found]

    def _added(self) -> Iterator[AddedToken]:
        from tokenizers import AddedToken

        for token_id, kind in enumerate(self.types):
            special = kind in (TokenType.CONTROL, TokenType.UNKNOWN)
            if special or kind == TokenType.USER_DEFINED:
                strips = special and self.strips_after_control and self.tokens[token_id] not in _PHI3_PLAIN
                yield AddedToken(self.tokens[token_id], special=special, normalized=False, rstrip=strips)

    def _frame(self, tokenizer: Tokenizer) -> None:
        """Put bos before and eos behind every prompt, where the file asks for it."""
        from tokenizers.processors import TemplateProcessing

        before = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        after = [self.eos_id] if self.add_eos and self.eos_id is not None else []
        if before or after:
            texts = [self.tokens[token_id] for token_id in before], [self.tokens[token_id] for token_id in after]
            single = [*texts[0], "$A", *texts[1]]
            pair = [*single, *(f"{piece}:1" for piece in [*texts[0], "$B", *texts[1]])]
            special = {self.tokens[token_id]: token_id for token_id in [*before, *after]}
            tokenizer.post_processor = TemplateProcessing(
                single=single, pair=pair, special_tokens=list(special.items())
            )


def read_tokenizer(metadata: Mapping[str, Value], *, vocab_size: int) -> GGUFTokenizer:
    """Check what the metadata says of the tokenizer. Raises ``ValueError`` with a sentence."""
    reader = MetadataReader(metadata, "tokenizer.ggml.")
    kind = reader.text("model")
    if kind not in _KINDS:
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r:.40}; {' and '.join(_KINDS)} are read. Use the model's folder of "
            "safetensors, or its hub id"
        )
    tokens, types = _tokens(reader, vocab_size)
    by_scores = kind == "llama"
    rule = _rule(reader, kind)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if by_scores else {}
    ids = {name: _token_id(reader, name, len(tokens), defaults.get(name)) for name in _ROLES}
    tokenizer = GGUFTokenizer(
        tokens=tokens,
        types=types,
        kind=kind,
        rule=rule,
        merges=reader.texts("merges") if reader.has("merges") or not by_scores else None,
        scores=reader.numbers("scores", len(tokens)) if reader.has("scores") or by_scores else (),
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unknown_id=ids["unknown"],
        pad_id=ids["padding"],
        end_ids=_end_ids(tokens, types, [ids["eos"], ids["eot"], ids["eom"]]),
        add_bos=reader.flag("add_bos_token", by_scores or rule.begins),
        add_eos=reader.flag("add_eos_token", False),
        add_space_prefix=reader.flag("add_space_prefix", by_scores),
        strips_after_control=by_scores and metadata.get("general.architecture") == "phi3",
        chat_template=_chat_template(MetadataReader(metadata, "tokenizer.")),
    )
    for key in _NO_EFFECT:
        reader.skip(key)
    if unread := reader.unread():
        names = listed([reader.prefix + key for key in unread])
        raise ValueError(f"this file has keys of its tokenizer that are not understood: {names}")
    return tokenizer


_ROLES = ("bos", "eos", "unknown", "padding", "eot", "eom")


def _tokens(reader: MetadataReader, vocab_size: int) -> tuple[Sequence[str], Sequence[int]]:
    tokens = reader.texts("tokens")
    if len(tokens) > vocab_size or not tokens:
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens)} tokens, and token_embd.weight {vocab_size} rows")
    if len(set(tokens)) != len(tokens):
        ((twice, _),) = Counter(tokens).most_common(1)
        raise ValueError(f"tokenizer.ggml.tokens has {twice!r:.60} twice")
    if not reader.has("token_type"):
        return tokens, [int(TokenType.NORMAL)] * len(tokens)
    return tokens, reader.numbers("token_type", len(tokens))


def _rule(reader: MetadataReader, kind: str) -> PreTokenizerRule:
    """SentencePiece cuts nothing before it merges."""
    name = reader.text("pre", "default")
    return PreTokenizerRule() if kind == "llama" else pre_tokenizer_rule(name)


def _token_id(reader: MetadataReader, role: str, count: int, default: int | None) -> int | None:
    key = f"{role}_token_id"
    if not reader.has(key):
        return default if default is not None and default < count else None
    token_id = reader.integer(key)
    if token_id >= count:
        raise ValueError(f"tokenizer.ggml.{key} is {token_id}, and there are {count} tokens")
    return token_id


def _end_ids(tokens: Sequence[str], types: Sequence[int], named: Sequence[int | None]) -> list[int]:
    """Converters of 2023 wrote every added token as user-defined."""
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    added = {tokens[token_id]: token_id for token_id, kind in enumerate(types) if kind in kinds}
    ends = [text for text in END_TOKENS if text in added]
    if added.keys() >= _HARMONY:
        ends.remove("<|end|>")
    found = [token_id for token_id in named if token_id is not None]
    return list(dict.fromkeys([*found, *(added[text] for text in ends)]))


def _chat_template(reader: MetadataReader) -> str | dict[str, str] | None:
    """The template, or all of them by name."""
    named = {name: reader.text(f"chat_template.{name}") for name in reader.names_under("chat_template.")}
    default = reader.text("chat_template") if reader.has("chat_template") else None
    if not named:
        return default
    return ({} if default is None else {"default": default}) | named


def _halves(merge: str) -> tuple[str, str]:
    """The two tokens of a merge. A token may begin with a space but hold no other."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise ValueError(f"tokenizer.ggml.merges has {merge!r:.60}, which is not two tokens")
    return merge[:cut], merge[cut + 1 :]
