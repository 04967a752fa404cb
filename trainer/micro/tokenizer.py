"""The tokenizer of ``micro``: byte-level BPE, digits one by one, special tokens for turns and for what comes later.

The tool, thinking and spare tokens are reserved from the first day, because a changed vocabulary is a changed base, and
a changed base invalidates every adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PAD, BEGIN, END_OF_TEXT, END = "<|pad|>", "<|begin|>", "<|endoftext|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tools|>", "<|tool|>")
TOOLS_AND_THINKING = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
NUM_SPARE = 64
SPECIAL_TOKENS = (
    PAD,
    BEGIN,
    END_OF_TEXT,
    END,
    *ROLES,
    *TOOLS_AND_THINKING,
    *(f"<|spare_{i}|>" for i in range(NUM_SPARE)),
)
VOCAB_SIZE = 4096

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{ '<|tools|>' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for message in messages %}
{%- if message.role in ('system', 'developer') %}{{ '<|system|>' + (message.content | trim) + '<|end|>' }}
{%- elif message.role == 'user' %}{{ '<|user|>' + (message.content | trim) + '<|end|>' }}
{%- elif message.role == 'tool' %}{{ '<|tool|><tool_response>' + (message.content | trim) + '</tool_response><|end|>' }}
{%- elif message.role == 'assistant' %}{{ '<|assistant|>' }}
{%- generation %}{{ (message.content or '') | trim }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + ({'name': call.function.name, 'arguments': \
call.function.arguments} | tojson) + '</tool_call>' }}{% endfor %}{{ '<|end|>' }}{% endgeneration %}
{%- else %}{{ raise_exception('unknown role: ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of ``VOCAB_SIZE`` tokens learned from ``texts``, with the chat template set."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BEGIN, END, PAD)],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files, the chat template as its own ``chat_template.jinja``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that ``save_tokenizer`` wrote."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
