"""The fingerprints of a base, which tie an adapter to the base it was trained on, whatever that is called.

Version 1 reads the edges of the weight files only, version 2 a part of every tensor. Both are SHA-256, written as
``sha256:`` and 64 hex digits. ``tests/contract/fingerprint.json`` has vectors.

"Canonical JSON" is ``json.dumps(value, sort_keys=True, separators=(",", ":"))`` with Python's default
``ensure_ascii``, in ASCII, and one line feed after it. The "architecture" is those ``ARCHITECTURE_FIELDS`` of
``config.json`` that are present and not null; if ``text_config`` is an object, also ``text_config`` with the same
fields of that object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from base_files.safetensors_header import TensorEntry, read_header
from base_files.weight_files import malformed_if_unreadable, weight_files

ARCHITECTURE_FIELDS = (
    "activation_function", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps",
    "layer_norm_epsilon", "model_type", "n_embd", "n_head", "n_inner", "n_layer", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "vocab_size",
)  # fmt: skip

_EDGE_BYTES = 64 * 1024
_WINDOW_BYTES, _STRIDE_BYTES = 16 * 1024, 1024 * 1024


def base_fingerprint(folder: Path) -> str:
    """Version 1. SHA-256 over these bytes, in this order:

    1. ``quickchange-base-v1`` and a line feed.
    2. For every tensor in the headers of the weight files, sorted by name as a Python string: canonical JSON of
       ``[name, shape, dtype]``, shape and dtype as the header has them (``"F32"``, ``"BF16"``).
    3. Canonical JSON of the architecture.
    4. For every weight file, sorted by file name: its first and then its last 64 KiB (of a shorter file, all of it,
       twice).

    Raises ``BaseMalformed`` where config or weights are missing or malformed.
    """
    with malformed_if_unreadable(folder):
        config = json.loads((folder / "config.json").read_bytes())
        paths = weight_files(folder)
        digest = hashlib.sha256(b"quickchange-base-v1\n")
        for _, tensor in _sorted_tensors(paths):
            digest.update(canonical_json([tensor.name, tensor.shape, tensor.dtype]))
        digest.update(canonical_json(_architecture(config)))
        for path in paths:
            digest.update(_edges(path))
    return f"sha256:{digest.hexdigest()}"


def base_fingerprint_v2(folder: Path) -> str:
    """Version 2, which sees a change in any tensor. SHA-256 over these bytes, in this order:

    1. ``quickchange-base-v2`` and a line feed.
    2. Canonical JSON of the architecture.
    3. For every tensor in the headers of the weight files, sorted by name as a Python string: canonical JSON of
       ``[name, shape, dtype]``, then the tensor's windows. Of at most 16 KiB it is the whole tensor. Of a larger one
       they are 16 KiB at each multiple of 1 MiB from the tensor's first byte, as long as they begin before the last
       16 KiB, and then its last 16 KiB.

    How the tensors are divided among files, and in which order, does not matter. Raises as above.
    """
    with malformed_if_unreadable(folder):
        config = json.loads((folder / "config.json").read_bytes())
        digest = hashlib.sha256(b"quickchange-base-v2\n")
        digest.update(canonical_json(_architecture(config)))
        for path, tensor in _sorted_tensors(weight_files(folder)):
            digest.update(canonical_json([tensor.name, tensor.shape, tensor.dtype]))
            for window in windows(path, tensor):
                digest.update(window)
    return f"sha256:{digest.hexdigest()}"


def _sorted_tensors(paths: list[Path]) -> list[tuple[Path, TensorEntry]]:
    found = [(path, entry) for path in paths for entry in read_header(path).values()]
    return sorted(found, key=lambda item: item[1].name)


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {field: config[field] for field in ARCHITECTURE_FIELDS if config.get(field) is not None}
    if isinstance(config.get("text_config"), dict):
        chosen["text_config"] = _architecture({**config["text_config"], "text_config": None})
    return chosen


def canonical_json(value: object) -> bytes:
    """``value`` as canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _edges(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_EDGE_BYTES)
        file.seek(max(0, path.stat().st_size - _EDGE_BYTES))
        return first + file.read(_EDGE_BYTES)


class TensorSpan(Protocol):
    """A tensor whose bytes are ``[begin, end)`` of a file."""

    @property
    def name(self) -> str: ...

    @property
    def begin(self) -> int: ...

    @property
    def end(self) -> int: ...


def windows(path: Path, tensor: TensorSpan) -> Iterator[bytes]:
    """The parts of a tensor that version 2 reads. Raises ``ValueError`` where the file is cut off."""
    size = min(_WINDOW_BYTES, tensor.end - tensor.begin)
    last = tensor.end - size
    with path.open("rb", buffering=0) as file:
        for begin in [*range(tensor.begin, last, _STRIDE_BYTES), last]:
            file.seek(begin)
            window = file.read(size)
            if len(window) != size:
                raise ValueError(f"{path.name} is cut off in {tensor.name}")
            yield window
