"""The fields of ``adapter_config.json``: which are read, which have no effect when serving, which are refused.

A field in no table is accepted if its value is empty or its name marks it as a training record. Any other may change
the delta, and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

READ, NO_EFFECT = "read", "has no effect when serving"
CONVERT = "convert it to plain LoRA: quickchange adapters convert FOLDER"

FIELDS: Mapping[str, str] = {
    "alora_invocation_tokens": "it would act only from its invocation tokens on; train it again without them",
    "alpha_pattern": READ,
    "arrow_config": "it chooses among other adapters for every token; serve those adapters themselves",
    "auto_mapping": NO_EFFECT,
    "base_model_name_or_path": NO_EFFECT,
    "bias": READ,
    "corda_config": NO_EFFECT,
    "ensure_weight_tying": READ,
    "eva_config": NO_EFFECT,
    "exclude_modules": READ,
    "fan_in_fan_out": NO_EFFECT,
    "inference_mode": NO_EFFECT,
    "init_lora_weights": READ,
    "kasa_config": "it cuts the base's own weights; train it again without it",
    "layer_replication": "it makes a deeper model of the base's layers; train it again without it",
    "layers_pattern": READ,
    "layers_to_transform": READ,
    "loftq_config": NO_EFFECT,
    "lora_alpha": READ,
    "lora_bias": READ,
    "lora_dropout": NO_EFFECT,
    "lora_ga_config": NO_EFFECT,
    "megatron_config": "it was trained on Megatron's parallel layers; train it again on transformers' model",
    "megatron_core": NO_EFFECT,
    "modules_to_save": READ,
    "monteclora_config": f"it adds random samples to the weights; {CONVERT}",
    "peft_type": READ,
    "peft_version": NO_EFFECT,
    "qalora_group_size": NO_EFFECT,
    "r": READ,
    "rank_pattern": READ,
    "revision": NO_EFFECT,
    "runtime_config": NO_EFFECT,
    "target_modules": READ,
    "target_parameters": READ,
    "task_type": READ,
    "trainable_token_indices": READ,
    "use_bdlora": f"its matrices are block-diagonal; {CONVERT}",
    "use_dora": READ,
    "use_qalora": "it averages groups of inputs of a quantized base; train it again without it",
    "use_rslora": READ,
    "velora_config": NO_EFFECT,
}
"""Every field of PEFT's ``LoraConfig``: read here, without effect when serving, or why it is refused when active."""

OTHER_TOOLS: Mapping[str, str] = {
    "_from_model_config": NO_EFFECT,
    "enable_lora": NO_EFFECT,
    "group_size": NO_EFFECT,
    "lora_dtype": NO_EFFECT,
    "lorap_emb_lr": NO_EFFECT,
    "lorap_lr_ratio": NO_EFFECT,
    "merge_weights": NO_EFFECT,
    "mora_type": NO_EFFECT,
    "swift_type": NO_EFFECT,
    "unsloth_fixed": NO_EFFECT,
    "use_original_init": NO_EFFECT,
    "invocation_string": "it would act only from its invocation string on; train it again without it",
    "use_mora": "its matrices are MoRA's square ones, no low-rank delta; train it again without it",
    "use_qa_lora": "it averages groups of inputs of a quantized base; train it again without it",
}
"""Fields of early PEFT versions and of other tools. ``group_size`` and ``mora_type`` only detail other fields."""

_UNKNOWN = (
    "its meaning is unknown; remove it from adapter_config.json if it changes no weight, or train the adapter again "
    "without it"
)
_RECIPE = ("seed", "dropout", "lr", "lr_ratio", "learning_rate", "weight_decay", "warmup_ratio", "warmup_steps")
_SOURCE = (
    "version", "date", "timestamp", "author", "commit", "commit_hash", "sha", "sha256", "url", "license", "tags",
    "description", "comment", "notes", "name_or_path", "run_name", "run_id", "created_at", "created_by", "library_name",
)  # fmt: skip
_RECORD = re.compile(
    rf"(?i)(?:.*_)?(?:{'|'.join(_RECIPE)})|(?!.*(?:[dlm]ora|adapter|delta|scal|alpha|rank))(?:.*_)?(?:{'|'.join(_SOURCE)})"
    r"|(?://|_comment).*"
)
"""Names of fields that record how an adapter was made or where it comes from.

``lora_version`` and ``dora_version`` may mean a method.
"""


def refusal(name: str, value: Any) -> str | None:
    """The reason to refuse a field with this value; None if it is read or has no effect."""
    known = FIELDS.get(name) or OTHER_TOOLS.get(name)
    if known in (READ, NO_EFFECT) or not is_active(value):
        return None
    if known is not None:
        return known
    return None if _RECORD.fullmatch(name) or _is_empty_inside(value) else _UNKNOWN


def is_active(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in ("", "none", "null", "false")
    return value not in (None, False) and value != {} and value != []


def _is_empty_inside(value: Any, depth: int = 3) -> bool:
    """Whether all values in an object or a list are empty. A number is not, even 0: it may be an index."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_empty_inside(item, depth - 1) for item in items)
    return value is None or value is False or value == ""
