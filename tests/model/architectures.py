"""Architectures that people may point the server at: configs as published models have them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig

from server.errors import BaseModelRefused
from server.model.admission import admit


def _config(name: str, **fields: Any) -> Callable[[], PretrainedConfig]:
    def make() -> PretrainedConfig:
        config = getattr(transformers, name)(**fields)
        assert isinstance(config, PretrainedConfig)
        return config

    return make


_FACTORS = {"short_factor": [1.0] * 48, "long_factor": [1.0 + n / 8 for n in range(48)]}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, **_FACTORS}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_CONVOLUTIONS = ["conv", "conv", "full_attention", "conv", "conv", "full_attention"]

SERVED: Mapping[str, Callable[[], PretrainedConfig]] = {
    "Apertus": _config("ApertusConfig"),
    "Arcee": _config("ArceeConfig"),
    "Cohere (Command R)": _config("CohereConfig"),
    "Cohere 2 (Command R7B)": _config("Cohere2Config"),
    "DeepSeek V3": _config("DeepseekV3Config"),
    "ERNIE 4.5": _config("Ernie4_5Config"),
    "ERNIE 4.5 MoE": _config("Ernie4_5_MoeConfig"),
    "EXAONE 4": _config("Exaone4Config"),
    "Gemma": _config("GemmaConfig"),
    "Gemma 2": _config("Gemma2Config"),
    "Gemma 3 (text)": _config("Gemma3TextConfig"),
    "GLM": _config("GlmConfig"),
    "GLM-4": _config("Glm4Config"),
    "GPT-2": _config("GPT2Config"),
    "GPT-BigCode (StarCoder)": _config("GPTBigCodeConfig"),
    "GPT-NeoX (Pythia)": _config("GPTNeoXConfig"),
    "GPT-OSS": _config("GptOssConfig"),
    "Granite": _config("GraniteConfig"),
    "Granite MoE": _config("GraniteMoeConfig"),
    "Helium": _config("HeliumConfig"),
    "HunYuan dense": _config("HunYuanDenseV1Config", head_dim=128),
    "Llama": _config("LlamaConfig"),
    "Llama 3.1 and later (scaled RoPE)": _config("LlamaConfig", num_key_value_heads=8, rope_parameters=_LLAMA3),
    "Llama with dynamic RoPE": _config("LlamaConfig", rope_parameters=_DYNAMIC),
    "Mistral": _config("MistralConfig"),
    "Mixtral": _config("MixtralConfig"),
    "Nemotron": _config("NemotronConfig", num_key_value_heads=8),
    "OLMo": _config("OlmoConfig"),
    "OLMo 2": _config("Olmo2Config"),
    "OLMo 3": _config("Olmo3Config"),
    "OLMoE": _config("OlmoeConfig"),
    "OPT": _config("OPTConfig"),
    "Phi": _config("PhiConfig"),
    "Phi-3 and Phi-4": _config("Phi3Config"),
    "Phi-3 with longrope": _config("Phi3Config", max_position_embeddings=131072, rope_parameters=_LONGROPE),
    "Qwen 2 and 2.5": _config("Qwen2Config"),
    "Qwen 2 MoE": _config("Qwen2MoeConfig"),
    "Qwen 3": _config("Qwen3Config"),
    "Qwen 3 MoE": _config("Qwen3MoeConfig"),
    "Seed-OSS": _config("SeedOssConfig"),
    "SmolLM3": _config("SmolLM3Config"),
    "StableLM": _config("StableLmConfig"),
    "StarCoder 2": _config("Starcoder2Config"),
}
"""Architectures whose logits come out right; the list is what the project promises."""

REFUSED: Mapping[str, Callable[[], PretrainedConfig]] = {
    "Bamba": _config("BambaConfig"),
    "Bloom": _config("BloomConfig"),
    "CodeGen": _config("CodeGenConfig"),
    "DiffLlama": _config("DiffLlamaConfig"),
    "Falcon": _config("FalconConfig"),
    "Falcon Mamba": _config("FalconMambaConfig"),
    "Gemma 3n (text)": _config("Gemma3nTextConfig"),
    "GPT-J": _config("GPTJConfig"),
    "GPT-Neo": _config("GPTNeoConfig"),
    "Granite 4 hybrid": _config("GraniteMoeHybridConfig"),
    "Jamba": _config("JambaConfig"),
    "LFM2": _config("Lfm2Config", num_hidden_layers=6, layer_types=_CONVOLUTIONS),
    "Llama 4 (text)": _config("Llama4TextConfig"),
    "Mamba": _config("MambaConfig"),
    "MiniMax": _config("MiniMaxConfig"),
    "MPT": _config("MptConfig"),
    "Qwen3-Next": _config("Qwen3NextConfig"),
    "RecurrentGemma": _config("RecurrentGemmaConfig"),
}
"""Architectures that would be silently wrong, or cannot be judged."""


@dataclass(frozen=True)
class Verdict:
    """What admission says of an architecture; ``reason`` is None where it is served."""

    model_type: str
    reason: str | None

    @property
    def short_reason(self) -> str:
        """The reason without measured numbers and messages of libraries, which change from version to version."""
        said = (self.reason or "").removeprefix(f"{self.model_type}: ")
        return re.sub(r" \(.*?\)(?=$|,|;)", "", said, flags=re.DOTALL)


@functools.cache
def verdict(name: str) -> Verdict:
    """Admission's verdict, asked once a process."""
    config = {**SERVED, **REFUSED}[name]()
    try:
        admit(config, name=name)
    except BaseModelRefused as refused:
        return Verdict(config.model_type, refused.reason)
    return Verdict(config.model_type, None)
