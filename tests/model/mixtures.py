"""Small random mixtures of experts in every layout that transformers has, large enough to be quantized."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from tests.model.families import CONTEXT, FAMILIES, VOCAB_SIZE, _config

_COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip

MIXTURES: Mapping[str, PretrainedConfig] = {
    "gpt_oss": FAMILIES["gpt_oss"],
    "qwen3_moe": _config("Qwen3MoeConfig", **_COMMON, moe_intermediate_size=48, head_dim=16, num_experts=6),
    "qwen2_moe": _config(
        "Qwen2MoeConfig", **_COMMON, moe_intermediate_size=32, shared_expert_intermediate_size=40, num_experts=4
    ),
    "mixtral": _config("MixtralConfig", **_COMMON, num_local_experts=4),
    "olmoe": _config("OlmoeConfig", **_COMMON, num_experts=40),
    "ernie4_5_moe": _config(
        "Ernie4_5_MoeConfig", **_COMMON, moe_intermediate_size=32, moe_num_experts=4, moe_k=2,
        moe_num_shared_experts=1, moe_layer_start_index=1,
    ),
    "granitemoe": _config("GraniteMoeConfig", **_COMMON, num_local_experts=4),
    "deepseek_v3": _config(
        "DeepseekV3Config", **(_COMMON | {"num_key_value_heads": 4}), moe_intermediate_size=32, n_routed_experts=4,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, rope_interleave=True,
    ),
}  # fmt: skip
"""Of Ernie and DeepSeek the first layer has no experts; Olmoe's router is as large as a linear that is quantized."""
