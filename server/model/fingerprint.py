"""The base's fingerprints, which tie an adapter to the base it was trained on.

Defined in docs/architecture.md and bound to the trainer's reader by ``tests/contract/fingerprint.json``. Version 1
reads the edges of the weight files only; version 2 reads a part of every tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import BaseModelRefused
from server.model.base_folder import weight_files

_EDGE = 64 * 1024
_MAX_HEADER = 100_000_000
_WINDOW, _STRIDE = 16 * 1024, 1024 * 1024
_ARCHITECTURE = (
    "activation_function", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps",
    "layer_norm_epsilon", "model_type", "n_embd", "n_head", "n_inner", "n_layer", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the header of its file has it, with the place of its bytes in the file."""

    path: Path
    name: str
    shape: list[int]
    dtype: str
    begin: int
    end: int

    @property
    def line(self) -> bytes:
        return _line([self.name, self.shape, self.dtype])


def base_fingerprint(folder: Path) -> str:
    """Version 1: ``sha256:`` and 64 hex digits over tensor headers, architecture, and the edges of the weight files.

    Raises ``BaseModelRefused`` where config or weights are missing or malformed.
    """
    with _refusals(folder):
        config = json.loads((folder / "config.json").read_bytes())
        paths = weight_files(folder)
        hashed = hashlib.sha256(b"quickchange-base-v1\n")
        for tensor in sorted([one.name, one.shape, one.dtype] for path in paths for one in _tensors(path)):
            hashed.update(_line(tensor))
        hashed.update(_line(_architecture(config)))
        for path in paths:
            hashed.update(_edges(path))
    return f"sha256:{hashed.hexdigest()}"


def base_fingerprint_v2(folder: Path) -> str:
    """Version 2: ``sha256:`` and 64 hex digits over architecture, tensor headers, and windows of every tensor.

    It does not depend on how tensors are divided among files. Raises as above.
    """
    with _refusals(folder):
        config = json.loads((folder / "config.json").read_bytes())
        hashed = hashlib.sha256(b"quickchange-base-v2\n")
        hashed.update(_line(_architecture(config)))
        tensors = [tensor for path in weight_files(folder) for tensor in _tensors(path)]
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            hashed.update(tensor.line)
            for window in _windows(tensor):
                hashed.update(window)
    return f"sha256:{hashed.hexdigest()}"


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelRefused(
            folder.name, f"config.json or its safetensors are missing or malformed: {error}"
        ) from error


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _tensors(path: Path) -> Iterator[_Tensor]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError(f"{path.name} announces a header of {size} bytes")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end:
                raise ValueError(f"{path.name} has no place for {name}: data_offsets is {[begin, end]}")
            yield _Tensor(path, name, entry["shape"], entry["dtype"], 8 + size + begin, 8 + size + end)


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


def _windows(tensor: _Tensor) -> Iterator[bytes]:
    """The bytes of a small tensor; of a larger one 16 KiB at every MiB from its first byte, and its last 16 KiB."""
    size = min(_WINDOW, tensor.end - tensor.begin)
    with tensor.path.open("rb", buffering=0) as file:
        for begin in (*range(tensor.begin, tensor.end - size, _STRIDE), tensor.end - size):
            file.seek(begin)
            window = file.read(size)
            if len(window) != size:
                raise ValueError(f"{tensor.path.name} is cut off in {tensor.name}")
            yield window
