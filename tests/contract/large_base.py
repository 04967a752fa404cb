"""A base whose tensors are larger than a fingerprint's windows, and lie about their borders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

SIZES: Mapping[str, int] = {
    "z.nothing": 0,
    "model.a": 100,
    "model.window": 16_384,
    "model.window_and_one": 16_385,
    "model.stride": 1_048_576,
    "model.stride_and_window": 1_048_576 + 16_384,
    "model.stride_and_window_and_one": 1_048_576 + 16_385,
    "lm_head.weight": 3 * 1_048_576 + 77,
}
"""Bytes of each tensor."""


def contents() -> dict[str, bytearray]:
    """The tensors' bytes."""
    return {name: bytearray(_noise(name, size)) for name, size in SIZES.items()}


@cache
def _noise(name: str, size: int) -> bytes:
    return hashlib.shake_128(name.encode()).digest(size)


def write_base(folder: Path, tensors: Mapping[str, bytes | bytearray], *, shards: int = 1) -> Path:
    """A folder with a config and these tensors in one file or several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "large", "hidden_size": 4}', encoding="utf-8")
    names = list(tensors)
    if shards == 1:
        _write(folder / "model.safetensors", tensors, names)
        return folder
    parts = {f"model-{number}.safetensors": names[number::shards] for number in range(shards)}
    for file, part in parts.items():
        _write(folder / file, tensors, part)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def _write(path: Path, tensors: Mapping[str, bytes | bytearray], names: Sequence[str]) -> None:
    header, end = {}, 0
    for name in names:
        begin, end = end, end + len(tensors[name])
        header[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors[name] for name in names))
