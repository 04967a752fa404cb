"""The base's fingerprint, which ties an adapter to the base it was trained on.

Defined in docs/architecture.md and bound to the trainer's reader by ``tests/contract/fingerprint.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server.errors import BaseModelRefused
from server.model.base_folder import weight_files

_EDGE = 64 * 1024
_ARCHITECTURE = (
    "activation_function", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps",
    "layer_norm_epsilon", "model_type", "n_embd", "n_head", "n_inner", "n_layer", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def base_fingerprint(folder: Path) -> str:
    """``sha256:`` and 64 hex digits over tensor headers, architecture, and the edges of the weight files.

    Raises ``BaseModelRefused`` where config or weights are missing or malformed.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        paths = weight_files(folder)
        hashed = hashlib.sha256(b"quickchange-base-v1\n")
        for tensor in sorted(entry for path in paths for entry in _tensors(path)):
            hashed.update(_line(tensor))
        hashed.update(_line(_architecture(config)))
        for path in paths:
            hashed.update(_edges(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelRefused(
            folder.name, f"config.json or its safetensors are missing or malformed: {error}"
        ) from error
    return f"sha256:{hashed.hexdigest()}"


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _tensors(path: Path) -> Iterator[list[Any]]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            yield [name, entry["shape"], entry["dtype"]]


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {field: config[field] for field in _ARCHITECTURE if config.get(field) is not None}
    if isinstance(config.get("text_config"), dict):
        chosen["text_config"] = _architecture(config["text_config"])
    return chosen


def _edges(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_EDGE)
        file.seek(max(0, path.stat().st_size - _EDGE))
        return first + file.read(_EDGE)
