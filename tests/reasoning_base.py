"""A tiny random copy of a reasoning base, file by file as the Qwen2 distilled from DeepSeek-R1 is published.

Its template opens the answer with ``<think>`` and cuts the thoughts of earlier answers. The tokens of turns and
thoughts are added tokens that are not special, and the files name ``LlamaTokenizerFast``, which it is not.
https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from tests.tiny_models import TEXTS

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
CONTEXT = 256

TEMPLATE = """\
{% if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set state = namespace(system='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set state.system = message['content'] %}\
{%- endif %}{%- endfor %}\
{{ bos_token }}{{ state.system }}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{% set answer = message['content'] %}\
{% if '</think>' in answer %}{% set answer = answer.split('</think>')[-1] %}{% endif %}\
{{ '<｜Assistant｜>' + answer + '<｜end▁of▁sentence｜>' }}{%- endif %}\
{%- endfor -%}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
"""Of the shape of the published one, without its tools: the last system turn stands first, without a token."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VOCAB_SIZE = 400


def reasoning_tokenizer() -> Tokenizer:
    """Byte-level BPE as Qwen2's; begin and end are special tokens, those of turns and thoughts are not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(END, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (USER, ASSISTANT)])
    tokenizer.add_tokens([AddedToken(BEGIN, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (THINK, END_THINK)])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


def build_reasoning_base(folder: Path) -> Path:
    """A random base of two layers in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = reasoning_tokenizer()
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size() + 16,  # the published one has unused rows too
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=begin,
        eos_token_id=end,
    )
    model = Qwen2ForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=end, do_sample=True, temperature=0.6, top_p=0.95
    )
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config()), encoding="utf-8")
    return folder


def _tokenizer_config() -> dict[str, object]:
    def token(content: str) -> dict[str, object]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token(BEGIN),
        "clean_up_tokenization_spaces": False,
        "eos_token": token(END),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": token(END),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": TEMPLATE,
    }
