"""A GGUF file as a base: transformers gets the config, the parameters and the tokenizer of the model it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from base_files.errors import BaseMalformed
from base_files.gguf_base import GGUFBase
from base_files.stock_model import stock_config, stock_tokenizer
from tests.gguf_models import model_arrays, model_metadata, tokenizer_metadata, write_gguf_model
from tests.model.families import build
from tests.tiny_models import tiny_tokenizer

LLAMA = "llama"


def metadata_of(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    vocabulary = [f"t{token_id}" for token_id in range(model.config.vocab_size)]
    return model_metadata(model, architecture) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.merges": ["t1 t2"],
    }


def loaded(base: GGUFBase) -> PreTrainedModel:
    """The stock model of a base's config with all of its tensors, and nothing else."""
    config = stock_config(base)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    tensors = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in base.tensors().items()}
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    assert isinstance(model, PreTrainedModel)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    prompts = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=prompts, use_cache=False).logits
    return result


@pytest.mark.parametrize(("family", "architecture"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_a_file_in_float32_has_the_logits_of_its_model(family: str, architecture: str, tmp_path: Path) -> None:
    model = build(family)
    path = write_gguf_model(tmp_path / "a.gguf", model_arrays(model, architecture), metadata_of(model, architecture))
    assert torch.equal(logits(loaded(GGUFBase(path))), logits(model))


def test_a_tensor_that_is_not_understood_refuses_the_file(tmp_path: Path) -> None:
    model = build(LLAMA)
    arrays = model_arrays(model, LLAMA) | {"blk.0.attn_q_norm.weight": torch.ones(16)}
    base = GGUFBase(write_gguf_model(tmp_path / "a.gguf", arrays, metadata_of(model, LLAMA)))
    with pytest.raises(BaseMalformed, match=r"tensors that are not understood: blk\.0\.attn_q_norm\.weight"):
        base.tensors()


def test_the_tokenizer_cuts_text_as_its_folders_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = build(LLAMA)
    metadata = model_metadata(model, LLAMA) | tokenizer_metadata(tokenizer, 512, "gpt-2")
    arrays = model_arrays(model, LLAMA) | {"token_embd.weight": torch.zeros(512, 64)}
    ours = stock_tokenizer(GGUFBase(write_gguf_model(tmp_path / "a.gguf", arrays, metadata)))
    text = "What is the capital of France? 1234\n\n  Привет 😀 <|user|> it's"
    assert ours(text) == tokenizer(text)
    messages = [{"role": "user", "content": text}]
    assert ours.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert ours.special_tokens_map.items() <= tokenizer.special_tokens_map.items()
