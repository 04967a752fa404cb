"""What identifies a base whatever its name. Version 1 reads the edges of the weight files; version 2 every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base_files import weight_files
from trainer.errors import BaseModelError

EDGE_BYTES = 64 * 1024
WINDOW_BYTES, STRIDE_BYTES = 16 * 1024, 1024 * 1024
MAX_HEADER_BYTES = 100_000_000
ARCHITECTURE_FIELDS = (
    "activation_function",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "model_type",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
)


def base_fingerprint(folder: Path) -> str:
    """What identifies a base whatever its name: ``sha256:`` and 64 hex digits.

    SHA-256 over these bytes, in this order. "Canonical JSON" is
    ``json.dumps(value, sort_keys=True, separators=(",", ":"))`` with Python's default ``ensure_ascii``, in ASCII, and
    one line feed after it.

    1. ``quickchange-base-v1`` and a line feed.
    2. For every tensor in the headers of the weight files, sorted by name as a Python string: canonical JSON of
       ``[name, shape, dtype]``, shape and dtype as the header has them (``"F32"``, ``"BF16"``).
    3. Canonical JSON of the architecture: those ``ARCHITECTURE_FIELDS`` of ``config.json`` that are present and not
       null, as they stand; if ``text_config`` is an object, also ``text_config`` with the same fields of that object.
    4. For every weight file, sorted by file name: its first and then its last 64 KiB (of a shorter file, all of it,
       twice).

    The weight files are ``model.safetensors``, or, where there is none, the files that ``weight_map`` in
    ``model.safetensors.index.json`` names. Raises ``BaseModelError`` where config or weights are missing or malformed.
    """
    with _errors(folder):
        config = json.loads((folder / "config.json").read_bytes())
        paths = weight_files(folder)
        headers = [[tensor.name, tensor.shape, tensor.dtype] for path in paths for tensor in _tensors(path)]
        digest = hashlib.sha256(b"quickchange-base-v1\n")
        for entry in sorted(headers):
            digest.update(_canonical(entry))
        digest.update(_canonical(_architecture(config)))
        for path in paths:
            digest.update(_edges(path))
    return f"sha256:{digest.hexdigest()}"


def base_fingerprint_v2(folder: Path) -> str:
    """Version 2, which sees a change in any tensor: ``sha256:`` and 64 hex digits.

    SHA-256 over these bytes, in this order, with the terms of version 1.

    1. ``quickchange-base-v2`` and a line feed.
    2. Canonical JSON of the architecture.
    3. For every tensor in the headers of the weight files, sorted by name as a Python string: canonical JSON of
       ``[name, shape, dtype]``, then the tensor's windows. Of at most 16 KiB it is the whole tensor. Of a larger one
       they are 16 KiB at each multiple of 1 MiB from the tensor's first byte, as long as they begin before the last
       16 KiB, and then its last 16 KiB.

    How the tensors are divided among files, and in which order, does not matter. Raises as above.
    """
    with _errors(folder):
        config = json.loads((folder / "config.json").read_bytes())
        digest = hashlib.sha256(b"quickchange-base-v2\n")
        digest.update(_canonical(_architecture(config)))
        tensors = [tensor for path in weight_files(folder) for tensor in _tensors(path)]
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            digest.update(_canonical([tensor.name, tensor.shape, tensor.dtype]))
            for window in _windows(tensor):
                digest.update(window)
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class _Tensor:
    """An entry of a safetensors header; its bytes are those from ``begin`` to ``end`` of the file."""

    path: Path
    name: str
    shape: list[int]
    dtype: str
    begin: int
    end: int


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{folder}: no fingerprint: config.json or safetensors missing or malformed: {error}"
        ) from error


def _tensors(path: Path) -> Iterator[_Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is not safetensors: its header would have {length} bytes")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end:
            raise ValueError(f"{path.name}: the data_offsets of {name} are {[begin, end]}")
        yield _Tensor(path, name, entry["shape"], entry["dtype"], 8 + length + begin, 8 + length + end)


def _windows(tensor: _Tensor) -> Iterator[bytes]:
    size = min(WINDOW_BYTES, tensor.end - tensor.begin)
    last = tensor.end - size
    with tensor.path.open("rb", buffering=0) as file:
        for begin in [*range(tensor.begin, last, STRIDE_BYTES), last]:
            file.seek(begin)
            data = file.read(size)
            if len(data) < size:
                raise ValueError(f"{tensor.path.name} ends before {tensor.name} does")
            yield data


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {field: config[field] for field in ARCHITECTURE_FIELDS if config.get(field) is not None}
    if isinstance(config.get("text_config"), dict):
        chosen["text_config"] = _architecture({**config["text_config"], "text_config": None})
    return chosen


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _edges(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(EDGE_BYTES)
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        return first + file.read(EDGE_BYTES)
