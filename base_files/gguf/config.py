"""The metadata of a GGUF as the dict of transformers' ``config.json``.

Keys that are absent have llama.cpp's defaults, not transformers'. Keys that nothing here reads refuse the file: each
may mean a forward pass that transformers would not compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from base_files.gguf.architectures import ARCHITECTURES, MODEL_CLASSES, Architecture
from base_files.gguf.metadata import MetadataReader, listed
from base_files.gguf.rope import DEFAULT_THETA, rope_parameters
from base_files.tensors import StoredTensor

NO_EFFECT: Mapping[str, str] = {
    "pooling_type": "embeddings of whole texts only",
    "rope.scaling.finetuned": "how the model was trained",
    "tensor_data_layout": "the layout is that of the architecture",
    "vocab_size": "the embedding has a row per token",
}
"""Keys of an architecture that change no number of a forward pass, and why."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,), "expert_shared_count": (0,),
    "expert_group_count": (0, 1), "expert_group_used_count": (0, 1), "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,), "nextn_predict_layers": (0,), "use_parallel_residual": (False,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip
"""Keys that are read where the architecture has no use for them, with the values that ask for nothing."""

_ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP_BIASES = ("ffn_gate", "ffn_up", "ffn_down")
_HEADS_BY_HIDDEN = ("mixtral", "qwen2", "phi3", "smollm3")
"""Where ``config.json`` has no ``head_dim``."""
Config = dict[str, Any]


@dataclass(frozen=True)
class TensorSizes:
    """What the shapes of tensors are made of."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    width: int
    vocab: int
    rotated: int
    experts: int = 0
    expert_width: int = 0
    fused: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.head

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head

    @property
    def queries_keys_values(self) -> int:
        return self.queries + 2 * self.keys

    @property
    def up(self) -> int:
        return 2 * self.width if self.fused else self.width


@dataclass(frozen=True)
class ModelConfig:
    """``config`` as transformers has it, and what the file's tensors must look like."""

    config: Config
    architecture: Architecture
    sizes: TensorSizes
    biased: tuple[str, ...]


def read_config(name: str, reader: MetadataReader, tensors: Mapping[str, StoredTensor]) -> ModelConfig:
    """The config of a file of ``general.architecture`` ``name``. Raises ``ValueError`` with a sentence."""
    architecture = ARCHITECTURES[name]
    sizes = _sizes(name, reader, tensors)
    config: Config = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": reader.integer("context_length"),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_dropout": 0.0,
    }
    factors = {factor: tensors[factor] for factor in architecture.factors if factor in tensors}
    config["rope_parameters"] = rope_parameters(reader, factors, sizes.rotated)
    biased = _biased(architecture, config, tensors)
    config |= _OWN_FIELDS[name](reader, sizes, config)
    if config["model_type"] not in _HEADS_BY_HIDDEN or sizes.queries != sizes.hidden:
        config["head_dim"] = sizes.head
    config["architectures"] = [MODEL_CLASSES[config["model_type"]]]
    _check_keys(reader)
    return ModelConfig(config, architecture, sizes, biased)


def _sizes(name: str, reader: MetadataReader, tensors: Mapping[str, StoredTensor]) -> TensorSizes:
    hidden, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    if not hidden or not heads:
        raise ValueError("embedding_length and attention.head_count must be above 0")
    head = reader.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if reader.integer(key, head) != head:
            raise ValueError(f"{key} is {reader.integer(key)}, and keys have {head}: only equal lengths are read")
    rotated = reader.integer("rope.dimension_count", head)
    if rotated > head or rotated % 2 or (rotated != head and name != "phi3"):
        raise ValueError(f"rope.dimension_count is {rotated}, and a head has {head} dimensions")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("it has no tensor token_embd.weight of two dimensions")
    layers = reader.integer("block_count")
    if layers > len(tensors):
        raise ValueError(f"block_count is {layers}, and the file has {len(tensors)} tensors")
    return TensorSizes(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=reader.integer("attention.head_count_kv", heads),
        head=head,
        width=reader.integer("feed_forward_length"),
        vocab=embedding.shape[0],
        rotated=rotated,
        fused=name == "phi3",
        **_expert_sizes(reader) if ARCHITECTURES[name].experts else {},
    )


def _expert_sizes(reader: MetadataReader) -> dict[str, int]:
    experts = reader.integer("expert_count", 0)
    if not experts:
        return {}
    width = reader.integer("expert_feed_forward_length", reader.integer("feed_forward_length"))
    return {"experts": experts, "expert_width": width}


def _biased(architecture: Architecture, config: Config, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Weights that have a bias; where the architecture leaves it open, the first block tells."""
    if not architecture.optional_biases:
        return architecture.biased
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return (_ATTENTION_BIASES if config["attention_bias"] else ()) + (_MLP_BIASES if config["mlp_bias"] else ())


def _check_keys(reader: MetadataReader) -> None:
    for key in NO_EFFECT:
        reader.skip(key)
    unread = reader.unread()
    for key, values in NEUTRAL.items():
        if key in unread and reader.value(key) not in values:
            raise ValueError(f"{key} is {reader.value(key)!r:.40}, which the architecture has no use for here")
    if unread := reader.unread():
        names = listed([reader.prefix + key for key in unread])
        raise ValueError(
            f"this file has keys that are not understood: {names}. Each may mean another computation: use the "
            "model's folder of safetensors instead"
        )


def _llama(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    if not sizes.experts:
        return {"model_type": "llama", "hidden_act": "silu"}
    return {
        "model_type": "mixtral",
        "hidden_act": "silu",
        "sliding_window": None,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": reader.integer("expert_used_count"),
    }


def _smollm3(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    """Every fourth layer has no rotation, which is not in the file."""
    rotated = [int((layer + 1) % 4 != 0) for layer in range(sizes.layers)]
    return {
        "model_type": "smollm3",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "no_rope_layers": rotated,
        "no_rope_layer_interval": 4,
    }


def _qwen2(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    return {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}


def _qwen3(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    return {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}


def _qwen3moe(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    """The weights of the experts that are used add up to 1 (``norm_topk_prob``), which is not in the file."""
    return _qwen3(reader, sizes, config) | {
        "model_type": "qwen3_moe",
        "num_experts": sizes.experts,
        "num_experts_per_tok": reader.integer("expert_used_count"),
        "moe_intermediate_size": sizes.expert_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _gemma(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    return {"model_type": "gemma", "hidden_act": _GELU, "hidden_activation": _GELU, "attention_bias": False}


def _gemma2(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    layers_of_27b = 46
    return {
        "model_type": "gemma2",
        "hidden_activation": _GELU,
        "attention_bias": False,
        "query_pre_attn_scalar": _scaled_by(sizes, layers_of_27b),
        "attn_logit_softcapping": reader.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reader.number("final_logit_softcapping", 30.0),
        "sliding_window": reader.integer("attention.sliding_window", 4096),
        "layer_types": _layer_types(reader, sizes, period=2),
    }


def _gemma3(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    """Local layers have a rotation of their own, unscaled; the file tells the global layers'."""
    layers_of_27b = 62
    window = reader.integer("attention.sliding_window", 0)
    local = {"rope_type": "default", "rope_theta": reader.number("rope.freq_base_swa", DEFAULT_THETA)}
    softcapping = reader.number("final_logit_softcapping", 0.0)
    return {
        "model_type": "gemma3_text",
        "hidden_activation": _GELU,
        "attention_bias": False,
        "query_pre_attn_scalar": _scaled_by(sizes, layers_of_27b),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": softcapping or None,
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": _layer_types(reader, sizes, period=6) if window else ["full_attention"] * sizes.layers,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _phi3(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    """A window of 0 is none."""
    rope = config["rope_parameters"] | {"partial_rotary_factor": sizes.rotated / sizes.head}
    original = reader.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "model_type": "phi3",
        "hidden_act": "silu",
        "sliding_window": reader.integer("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original,
        "rope_parameters": rope,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _gpt_oss(reader: MetadataReader, sizes: TensorSizes, config: Config) -> Config:
    """The range that yarn interpolates is not rounded to whole dimensions, which is not in the file."""
    rope = config["rope_parameters"]
    return {
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "attention_bias": True,
        "intermediate_size": sizes.expert_width,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": reader.integer("expert_used_count"),
        "sliding_window": reader.integer("attention.sliding_window"),
        "layer_types": _layer_types(reader, sizes, period=2),
        "rope_parameters": rope | {"truncate": False} if rope["rope_type"] == "yarn" else rope,
    }


def _scaled_by(sizes: TensorSizes, layers_of_27b: int) -> int:
    """What queries are scaled by the root of; only the 27B models, known by their layers, differ."""
    return sizes.hidden // sizes.heads if sizes.layers == layers_of_27b else sizes.head


def _layer_types(reader: MetadataReader, sizes: TensorSizes, *, period: int) -> list[str]:
    """The last layer of each period sees everything; the file may say which ones instead."""
    key = "attention.sliding_window_pattern"
    if reader.is_list(key):
        local = reader.flags(key, sizes.layers)
    else:
        period = reader.integer(key, period)
        local = [period == 0 or layer % period < period - 1 for layer in range(sizes.layers)]
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


_GELU = "gelu_pytorch_tanh"
_OWN_FIELDS: Mapping[str, Callable[[MetadataReader, TensorSizes, Config], Config]] = {
    "llama": _llama, "smollm3": _smollm3, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3moe": _qwen3moe, "gemma": _gemma,
    "gemma2": _gemma2, "gemma3": _gemma3, "phi3": _phi3, "gpt-oss": _gpt_oss,
}  # fmt: skip
