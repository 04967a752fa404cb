"""A random GPT-OSS as its makers publish it: experts in MXFP4, everything else in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from benchmarks.parts.random_tokenizer import save_tokenizer
from tests.model.families import build_from

EXPERT_WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")
_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def save_gpt_oss(
    folder: Path, *, vocab_size: int = 320, hidden: int = 64, units: int = 96, layers: int = 2, experts: int = 4
) -> None:
    """Save a base with a tokenizer; every sum of sizes is a multiple of a block's 32."""
    config = GptOssConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=units,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        pad_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 3,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    build_from(config, dtype=torch.bfloat16).save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(EXPERT_WEIGHTS)]:
        count, inputs, outputs = tensors.pop(name).shape
        shape = count, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_CONVERTED}
    (folder / "config.json").write_text(json.dumps(fields))
    save_tokenizer(folder, vocab_size)


def dequantized_by_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model, whose experts transformers dequantizes."""
    load: Any = AutoModelForCausalLM.from_pretrained
    dequantized = Mxfp4Config(dequantize=True)
    model: PreTrainedModel = load(folder, dtype=dtype, quantization_config=dequantized, attn_implementation="eager")
    model.eval().requires_grad_(False)
    return model
