"""LoRA tensors of other formats, written as the folder that PEFT would save."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapter_format.files import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.content.peft_config import parse_peft_config


@dataclass(frozen=True)
class Delta:
    """``alpha / rank * B @ A`` of one module: A [rank, in], B [out, rank]; of an embedding [rank, tokens], [dim, rank].

    ``magnitude`` [out] is DoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoRATensors:
    """Deltas by module, weights of norms by module, and sentences for whoever converts."""

    deltas: Mapping[str, Delta]
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted(delta.rank for delta in self.deltas.values()))


def write_lora_folder(folder: Path, tensors: LoRATensors, *, base_model: str) -> None:
    """Write PEFT's two files. Raises ``ValueError`` where the server would not read them."""
    config = _peft_config(tensors, base_model)
    parse_peft_config(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_named(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _peft_config(tensors: LoRATensors, base_model: str) -> dict[str, Any]:
    """The rank and alpha that most modules have, and patterns for the others."""
    deltas = tensors.deltas
    (rank, alpha), _ = Counter((delta.rank, delta.alpha) for delta in deltas.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(module): delta.rank for module, delta in deltas.items() if delta.rank != rank},
        "alpha_pattern": {re.escape(module): delta.alpha for module, delta in deltas.items() if delta.alpha != alpha},
        "target_modules": sorted(deltas),
        "modules_to_save": sorted(tensors.norms) or None,
        "use_dora": any(delta.magnitude is not None for delta in deltas.values()),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
    }


def _named(tensors: LoRATensors) -> dict[str, torch.Tensor]:
    """Every tensor under PEFT's name for it, in memory of its own."""
    named: dict[str, torch.Tensor] = {}
    for module, delta in tensors.deltas.items():
        prefix = f"base_model.model.{module}."
        a, b = ("lora_embedding_A", "lora_embedding_B") if delta.embedding else ("lora_A.weight", "lora_B.weight")
        named |= {prefix + a: delta.a, prefix + b: delta.b}
        if delta.magnitude is not None:
            named[f"{prefix}lora_magnitude_vector"] = delta.magnitude
    named |= {f"base_model.model.{module}.weight": weight for module, weight in tensors.norms.items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}
