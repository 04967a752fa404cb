"""``adapter_config.json`` as PEFT 0.21 writes it: what is served exactly, and what is refused when it is active."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "enable_lora", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "loftq_config",
    "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "revision", "target_modules",
})  # fmt: skip
"""Fields that change training or bookkeeping only: which modules an adapter touches is read from its tensors' names."""

_READ = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "bias",
})  # fmt: skip

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_LITERAL_KEY = re.compile(r"[A-Za-z0-9_.]+")
MAX_NUMBER = 1e9


@dataclass(frozen=True)
class LoRAConfig:
    """Rank and scaling of an adapter's modules: ``alpha / r``, with rsLoRA ``alpha / sqrt(r)`` (Kalajdzievski 2023)."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]

    def rank(self, module: str) -> float:
        """A module's rank, which its tensors must have."""
        return _matching(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """The factor on a module's delta."""
        alpha, rank = _matching(self.alpha_pattern, module, self.alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that is the module's name or ends it, as PEFT looks it up."""
    return next((value for key, value in pattern.items() if module == key or module.endswith("." + key)), default)


def parse_peft_config(data: Any) -> LoRAConfig:
    """The checked config. Raises ``ValueError`` with what is not served, its value, and what to do."""
    if not isinstance(data, dict):
        raise ValueError("adapter_config.json is not a JSON object")
    _check_kind(data)
    for name, value in data.items():
        if name not in _IGNORED and name not in _READ and _active(name, value):
            raise ValueError(
                f"adapter_config.json: {name} = {value!r:.80} is not supported; retrain the adapter without it"
            )
    return LoRAConfig(
        r=_number(data, "r", whole=True),
        alpha=_number(data, "lora_alpha"),
        rslora=data.get("use_rslora") is True,
        rank_pattern=_pattern(data, "rank_pattern"),
        alpha_pattern=_pattern(data, "alpha_pattern"),
    )


def _check_kind(data: Mapping[str, Any]) -> None:
    if data.get("peft_type") != "LORA":
        raise ValueError(f"adapter_config.json: peft_type is {data.get('peft_type')!r}: only LORA adapters are served")
    if data.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"adapter_config.json: task_type is {data['task_type']!r}: only CAUSAL_LM adapters are served")
    if data.get("bias", "none") != "none":
        raise ValueError(
            f"adapter_config.json: bias is {data['bias']!r}: only 'none' is served; retrain without biases"
        )
    init = data.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"adapter_config.json: init_lora_weights is {init!r}, which changes the base's own weights; save the "
            "adapter with path_initial_model_for_weight_conversion, so that it fits the unchanged base"
        )


def _active(name: str, value: Any) -> bool:
    return value not in (None, False, "none") and value != {} and value != []


def _number(data: Mapping[str, Any], name: str, *, whole: bool = False) -> Any:
    value = data.get(name, 8)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < MAX_NUMBER:
        kind = "integer" if whole else "number"
        raise ValueError(f"adapter_config.json: {name} is {value!r:.40}: it must be a positive {kind}")
    return value


def _pattern(data: Mapping[str, Any], name: str) -> Mapping[str, float]:
    """A pattern whose keys are literal module names or suffixes; regular expressions are not evaluated."""
    value = data.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"adapter_config.json: {name} is {value!r:.80}: it must be an object")
    for key, number in value.items():
        if not _LITERAL_KEY.fullmatch(key):
            raise ValueError(
                f"adapter_config.json: {name} has the key {key!r:.80}: write module names without wildcards"
            )
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < MAX_NUMBER:
            raise ValueError(f"adapter_config.json: {name}[{key!r}] is {number!r:.80}: it must be a positive number")
    return value
