"""Random models and tokenizers of transformers as GGUF files, by gguf's own writer, as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.model.foreign_adapters import permuted

PERMUTED, SHIFTED = ("llama", "smollm3"), ("gemma", "gemma2", "gemma3")
Arrays = dict[str, torch.Tensor]
Metadata = dict[str, Any]


def model_arrays(model: PreTrainedModel, architecture: str) -> Arrays:
    """The model's parameters under llama.cpp's names and in its layout; a tied head is left out."""
    config = model.config.get_text_config()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found: Arrays = {}
    for parameter, tensor in model.named_parameters():
        for stored, value in _stored(parameter, tensor.detach().float(), architecture):
            name = names.get_name(stored, try_suffixes=(".weight", ".bias"))
            assert name is not None, stored
            leaf = stored.split(".")[-2]
            if architecture in PERMUTED and leaf in heads:
                value = permuted(value, heads[leaf])
            if architecture in SHIFTED and stored.endswith("norm.weight"):
                value = value + 1
            found[name] = value
    return found


def _stored(parameter: str, tensor: torch.Tensor, architecture: str) -> list[tuple[str, torch.Tensor]]:
    """The tensors that llama.cpp's converter makes of a parameter, still under names of transformers."""
    if parameter.endswith("sinks"):
        return [(f"{parameter}.weight", tensor)]
    module, _, leaf = parameter.rpartition(".")
    if not module.endswith("experts"):
        return [(parameter, tensor)]
    suffix = "bias" if leaf.endswith("_bias") else "weight"
    if architecture == "gpt-oss" and suffix == "weight":
        tensor = tensor.transpose(1, 2)
    if leaf.startswith("down_proj"):
        return [(f"{module}.down_proj.{suffix}", tensor)]
    halves = (tensor[:, ::2], tensor[:, 1::2]) if architecture == "gpt-oss" else tensor.chunk(2, dim=1)
    return [(f"{module}.gate_proj.{suffix}", halves[0]), (f"{module}.up_proj.{suffix}", halves[1])]


def model_metadata(model: PreTrainedModel, architecture: str) -> Metadata:
    """What llama.cpp's converter writes of a config, without a scaling of its rotations."""
    config = model.config.get_text_config()
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys: Metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def plain_vocabulary(size: int) -> Metadata:
    """A tokenizer that nobody uses."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [f"t{token_id}" for token_id in range(size)],
        "tokenizer.ggml.merges": ["t1 t2"],
    }


def tokenizer_metadata(tokenizer: PreTrainedTokenizerFast, vocab_size: int, pre: str) -> Metadata:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    ids = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = [gguf.TokenType.NORMAL if token_id in ids else gguf.TokenType.UNUSED for token_id in range(vocab_size)]
    for token_id, token in added.items():
        types[token_id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [ids.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges_of(tokenizer)],
        "tokenizer.ggml.add_bos_token": False,
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        if (token_id := getattr(tokenizer, f"{name}_token_id")) is not None:
            metadata[f"tokenizer.ggml.{role}_token_id"] = token_id
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def merges_of(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges


def write_gguf_model(
    path: Path,
    architecture: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    *,
    quantization: str = "F32",
) -> Path:
    """A file of these tensors, matrices quantized where their rows divide into blocks, and of this metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _ADD[type(value)](writer, key, value)
    wanted = gguf.GGMLQuantizationType[quantization]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.float().numpy())
        kind = wanted if array.ndim > 1 and array.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_ADD: dict[type, Any] = {
    int: gguf.GGUFWriter.add_uint32, float: gguf.GGUFWriter.add_float32, bool: gguf.GGUFWriter.add_bool,
    str: gguf.GGUFWriter.add_string, list: gguf.GGUFWriter.add_array,
}  # fmt: skip
