"""The architecture of a base in words that a folder's config and one made from a GGUF have in common.

Each says what the other leaves to a default, in another form or rounded to float32. What only one of two says is not
compared; what both can say, is made to look the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Field = str | int | float | bool
Fields = Mapping[str, Field]

DEFAULT_THETA = 10000.0
_TOLERANCE = 1e-6

_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_ONE_OF: Mapping[str, tuple[str, ...]] = {
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
}
"""Fields that have different names in different architectures."""
_SAME = {"mistral": "llama", "swish": "silu", "su": "longrope"}
"""Names of the same computation: Mistral's without its window, which is compared by itself, is Llama's."""


def common_architecture(config: Mapping[str, Any]) -> Fields:
    """The fields of transformers' ``config.json`` that decide what the weights compute."""
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config = {**config, **nested}
    fields: dict[str, Any] = {name: config.get(name) for name in _SIZES}
    fields |= {name: next(_given(config, choices), None) for name, choices in _ONE_OF.items()}
    fields["model_type"] = str(config.get("model_type", "")).removesuffix("_text")
    fields["sliding_window"] = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
        fields["head_dim"] = fields["head_dim"] or hidden // heads
    fields |= _rope(config)
    same = {name: _SAME.get(value, value) if isinstance(value, str) else value for name, value in fields.items()}
    return {name: same[name] for name in sorted(same) if isinstance(same[name], str | int | float)}


def differing_fields(trained: Fields, served: Fields) -> list[str]:
    """A phrase for each field that both have with different values."""
    return [
        f"{name} {trained[name]} instead of {served[name]}"
        for name in sorted(trained.keys() & served.keys())
        if not _is_same(trained[name], served[name])
    ]


def _given(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return (config[name] for name in names if config.get(name) is not None)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base frequency and scaling, from ``rope_parameters`` or the fields that were there before it."""
    parameters = config.get("rope_parameters") or {}
    local = config.get("rope_local_base_freq")
    if isinstance(parameters.get("full_attention"), dict):
        local = parameters.get("sliding_attention", {}).get("rope_theta", local)
        parameters = parameters["full_attention"]
    parameters = {**(config.get("rope_scaling") or {}), **parameters}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "linear" and parameters.get("factor") == 1:
        kind = "default"
    rope = {
        "rope_theta": float(parameters.get("rope_theta", config.get("rope_theta") or DEFAULT_THETA)),
        "rope_theta_local": local,
        "rope_type": kind,
    }
    scaled = () if kind == "default" else ("factor", "low_freq_factor", "high_freq_factor")
    return rope | {f"rope_{name}": parameters.get(name) for name in scaled}


def _is_same(trained: Field, served: Field) -> bool:
    if isinstance(trained, str) or isinstance(served, str):
        return trained == served
    return math.isclose(trained, served, rel_tol=_TOLERANCE)
