"""How text is cut before byte-pair merges, by ``tokenizer.ggml.pre``.

llama.cpp recognizes a tokenizer by what it does and writes a name for it. Behind each name stand the rules of the
tokenizer.json that the name was given to. A wrong rule is silent: the ids are valid, and the model answers worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _SYMBOLS + _SPACES
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _SYMBOLS + _SPACES
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
)  # fmt: skip
_TEKKEN = f"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_O200K = (
    f"{_PREFIX}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_PREFIX}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    + _SPACES
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _SPACES,
)


@dataclass(frozen=True)
class PreTokenizerRule:
    """Text is cut by each of ``patterns`` in turn, or by GPT-2's where there are none.

    ``whole_words`` says that a word which is a token is not merged (``ignore_merges``), ``composed`` that text is
    brought to the normal form C first, ``begins`` that prompts begin with the bos token where the file does not say.
    """

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    whole_words: bool = False
    composed: bool = False
    begins: bool = False

    def build(self) -> PreTokenizer:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

        steps: list[PreTokenizer] = [Digits(individual_digits=True)] if self.single_digits else []
        steps += [Split(Regex(pattern), "isolated") for pattern in self.patterns]
        steps.append(ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return Sequence(steps)


_GPT2_RULE = PreTokenizerRule()
_DIGITS_RULE = PreTokenizerRule(single_digits=True)
_LLAMA3_RULE = PreTokenizerRule((_LLAMA3,), whole_words=True, begins=True)
_QWEN2_RULE = PreTokenizerRule((_QWEN2,), composed=True)
_O200K_RULE = PreTokenizerRule((_O200K,))

PRE_TOKENIZERS: Mapping[str, PreTokenizerRule] = {
    "gpt-2": _GPT2_RULE, "phi-2": _GPT2_RULE, "olmo": _GPT2_RULE,
    "smollm": _DIGITS_RULE, "starcoder": _DIGITS_RULE, "refact": _DIGITS_RULE, "codeshell": _DIGITS_RULE,
    "llama-bpe": _LLAMA3_RULE, "llama3": _LLAMA3_RULE, "llama-v3": _LLAMA3_RULE,
    "smaug-bpe": PreTokenizerRule((_LLAMA3,)), "dbrx": PreTokenizerRule((_LLAMA3,)),
    "qwen2": _QWEN2_RULE, "deepseek-r1-qwen": _QWEN2_RULE, "megrez": _QWEN2_RULE,
    "qwen35": PreTokenizerRule((_QWEN35,), composed=True),
    "tekken": PreTokenizerRule((_TEKKEN,), whole_words=True, begins=True),
    "gpt-4o": _O200K_RULE, "o200k": _O200K_RULE, "llama4": _O200K_RULE,
    "deepseek-coder": PreTokenizerRule(_DEEPSEEK_CODER), "deepseek-v3": PreTokenizerRule(_DEEPSEEK3),
}  # fmt: skip
"""By ``tokenizer.ggml.pre``."""


def pre_tokenizer_rule(name: str) -> PreTokenizerRule:
    """Raises ``ValueError`` with a sentence for a name that is not known."""
    if name == "default":
        raise ValueError(
            "tokenizer.ggml.pre is missing or 'default': the file does not say how its tokenizer cuts text, and a "
            "guess would make the model answer worse in silence. Convert the model again with a newer llama.cpp, or "
            "use its folder of safetensors"
        )
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r:.40}; {', '.join(PRE_TOKENIZERS)} are read. Use the model's folder of "
            "safetensors, or its hub id"
        )
    return PRE_TOKENIZERS[name]
