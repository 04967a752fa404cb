"""Which architectures of llama.cpp are read, and what their tensors are called in transformers.

By llama.cpp's conversion scripts, read backwards. Adapters in GGUF use the same names and layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LLAMA3_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
TOP_LEVEL = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip

SHAPES: Mapping[str, tuple[str, ...]] = {
    "token_embd": ("vocab", "hidden"), "output": ("vocab", "hidden"), "output_norm": ("hidden",),
    "attn_q": ("queries", "hidden"), "attn_k": ("keys", "hidden"), "attn_v": ("keys", "hidden"),
    "attn_qkv": ("queries_keys_values", "hidden"), "attn_output": ("hidden", "queries"), "attn_sinks": ("heads",),
    "attn_norm": ("hidden",), "ffn_norm": ("hidden",), "post_attention_norm": ("hidden",), "post_ffw_norm": ("hidden",),
    "attn_q_norm": ("head",), "attn_k_norm": ("head",),
    "ffn_gate": ("width", "hidden"), "ffn_up": ("up", "hidden"), "ffn_down": ("hidden", "width"),
    "ffn_gate_inp": ("experts", "hidden"), "ffn_gate_exps": ("experts", "expert_width", "hidden"),
    "ffn_up_exps": ("experts", "expert_width", "hidden"), "ffn_down_exps": ("experts", "hidden", "expert_width"),
}  # fmt: skip
"""Shapes of weights by their names in the file, in sizes of the config; a bias has all of it but the last."""


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls transformers' ``model_types``, and the names within its blocks.

    ``permuted`` says that rows of q and k change places, ``norm_shift`` that 1 is added to norms' weights, ``biased``
    which weights of a block have a bias; with ``optional_biases`` the file tells. ``factors`` are tensors that scale
    rotations.
    """

    model_types: tuple[str, ...]
    blocks: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    norm_shift: bool = False
    biased: tuple[str, ...] = ()
    optional_biases: bool = False
    experts: bool = False
    factors: tuple[str, ...] = ()


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        ("llama", "mistral", "mixtral"), {**_ATTENTION, **_MLP, **_TWO_NORMS}, permuted=True, optional_biases=True,
        experts=True, factors=(LLAMA3_FACTORS,),
    ),
    "smollm3": Architecture(
        ("smollm3",), {**_ATTENTION, **_MLP, **_TWO_NORMS}, permuted=True, factors=(LLAMA3_FACTORS,)
    ),
    "qwen2": Architecture(
        ("qwen2",), {**_ATTENTION, **_MLP, **_TWO_NORMS}, biased=("attn_q", "attn_k", "attn_v")
    ),
    "qwen3": Architecture(("qwen3",), {**_ATTENTION, **_MLP, **_TWO_NORMS, **_HEAD_NORMS}),
    "gemma": Architecture(("gemma",), {**_ATTENTION, **_MLP, **_TWO_NORMS}, norm_shift=True),
    "gemma2": Architecture(("gemma2",), {**_ATTENTION, **_MLP, **_FOUR_NORMS}, norm_shift=True),
    "gemma3": Architecture(
        ("gemma3_text", "gemma3"), {**_ATTENTION, **_MLP, **_FOUR_NORMS, **_HEAD_NORMS}, norm_shift=True
    ),
    "phi3": Architecture(("phi3",), {**_FUSED, **_TWO_NORMS}, factors=(LONG_FACTORS, SHORT_FACTORS)),
    "qwen3moe": Architecture(
        ("qwen3_moe",), {**_ATTENTION, **_TWO_NORMS, **_HEAD_NORMS}, experts=True,
    ),
    "gpt-oss": Architecture(
        ("gpt_oss",), {**_ATTENTION, **_POST_NORMS}, biased=("attn_q", "attn_k", "attn_v", "attn_output"), experts=True
    ),
}  # fmt: skip
"""By ``general.architecture``."""

MODEL_CLASSES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "phi3": "Phi3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM",
}  # fmt: skip
"""By transformers' model type."""
