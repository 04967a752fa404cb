"""Small random models of every family the engine is proved on, with everything that family is special for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 200
CONTEXT = 128
WINDOW = 8
LONGROPE_BORDER = 32
"""Length up to which Phi-3 was trained: beyond it the stock code takes the long factors."""

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, **_SPECIAL,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LONGROPE_BORDER,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _config(name: str, **fields: Any) -> PretrainedConfig:
    config = getattr(transformers, name)(**fields)
    assert isinstance(config, PretrainedConfig)
    return config


FAMILIES: Mapping[str, PretrainedConfig] = {
    "llama": _config("LlamaConfig", **_COMMON),
    "llama3_rope": _config("LlamaConfig", **_COMMON, rope_parameters=_LLAMA3_ROPE),
    "llama_dynamic_rope": _config(
        "LlamaConfig", **_COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "qwen2": _config("Qwen2Config", **_COMMON, tie_word_embeddings=True),
    "qwen3": _config("Qwen3Config", **_COMMON, head_dim=16),
    "mistral": _config("MistralConfig", **_COMMON, sliding_window=WINDOW),
    "gemma2": _config(
        "Gemma2Config", **{**_COMMON, "num_hidden_layers": 4}, head_dim=16, sliding_window=WINDOW,
        query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=30.0,
        layer_types=_ALTERNATING, tie_word_embeddings=False,
    ),
    "gemma3": _config(
        "Gemma3TextConfig", **{**_COMMON, "num_hidden_layers": 4}, head_dim=16, sliding_window=WINDOW,
        query_pre_attn_scalar=16, layer_types=_ALTERNATING, tie_word_embeddings=False,
    ),
    "phi3": _config("Phi3Config", **_COMMON),
    "phi3_longrope": _config(
        "Phi3Config", **_COMMON, original_max_position_embeddings=LONGROPE_BORDER, rope_parameters=_LONGROPE
    ),
    "smollm3": _config("SmolLM3Config", **_COMMON, no_rope_layer_interval=2),
    "gpt_oss": _config(
        "GptOssConfig", **{**_COMMON, "num_hidden_layers": 4}, head_dim=16, sliding_window=WINDOW, num_local_experts=4,
        num_experts_per_tok=2, layer_types=_ALTERNATING,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 32,
        },
    ),
    "gpt2": _config(
        "GPT2Config", vocab_size=VOCAB_SIZE, n_embd=64, n_layer=3, n_head=4, n_positions=CONTEXT,
        tie_word_embeddings=False, **_SPECIAL,
    ),
    "gpt_neox": _config(
        "GPTNeoXConfig", **{name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
    ),
}  # fmt: skip
"""By name, a config each; ``build`` copies it."""


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model of a family, eager, with sharp attention; the same seed gives the same weights."""
    return build_from(FAMILIES[family], seed=seed, dtype=dtype)


def build_from(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model of a config."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
        model.to(dtype).eval().requires_grad_(False)
        _sharpen(model)
    assert isinstance(model, PreTrainedModel)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def _sharpen(model: PreTrainedModel) -> None:
    """Weights so large that attention is sharp and the likeliest token stands out; tiny ones would hide every error."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def fix_long_factors(model: torch.nn.Module) -> None:
    """Make a Phi-3 with longrope use its long factors at every length, by the formula: theta**(-2i/d) / factor."""
    rope = model.get_submodule("model.rotary_emb")
    exponents = torch.arange(0, 16, 2).float() / 16
    factors = torch.tensor(_LONGROPE["long_factor"])
    rope.register_buffer("inv_freq", 1.0 / (factors * _LONGROPE["rope_theta"] ** exponents), persistent=False)
    rope.__dict__["rope_type"] = "default"
