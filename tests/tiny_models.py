"""Tiny random bases, built where a test needs one: no download, a second or less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trainer.micro.tokenizer import BEGIN, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS

VOCAB_SIZE = 512
TEXTS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps in the sun, and the fox runs away.",
    "What is the capital of France? The capital of France is Paris. What is the time? It is late.",
    "Hello! How are you? I am well, thank you. Write a story about a cat and a boat on the river.",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``TEXTS`` with the special tokens and the chat template of ``micro``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BEGIN, END, PAD)],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_tiny_base(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A random base of ``family`` with its tokenizer in ``folder``; the same seed gives the same weights."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = FAMILIES[family](tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


FAMILIES: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {"llama": _llama}
