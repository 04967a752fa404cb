"""The fingerprint of a GGUF base is of what its answers depend on, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from base_files.gguf.file import read_gguf
from base_files.gguf.fingerprint import gguf_fingerprint

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "fingerprint.json").read_text(encoding="utf-8"))
KEYS: Mapping[str, Any] = {
    "general.name": "tiny",
    "llama.block_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_sections": [1, 2, 3],
}
GOLDEN: str = VECTORS["gguf"]["fingerprint"]


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of ``tiny.gguf``, and one of several windows."""
    stored = read_gguf(HERE / "tiny.gguf")
    large = np.arange(400_000, dtype=np.float32).reshape(1000, 400)
    return {name: stored.read(name) for name in stored.tensors} | {"output.weight": large}


def write(
    path: Path,
    values: Mapping[str, np.ndarray[Any, Any]],
    *,
    keys: Mapping[str, Any] = KEYS,
    alignment: int = 32,
    max_tensors: int = 0,
) -> str:
    """Write a base and return its fingerprint."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=max_tensors)
    writer.add_custom_alignment(alignment)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for name, tensor in values.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return of(sorted(path.parent.glob(f"{path.stem}*.gguf"))[0])


def of(path: Path) -> str:
    return gguf_fingerprint(read_gguf(path))


@pytest.fixture
def written(tmp_path: Path) -> str:
    return write(tmp_path / "base.gguf", tensors())


def test_a_gguf_has_the_golden_fingerprint() -> None:
    assert of(HERE / "tiny.gguf") == GOLDEN


def test_names_and_licences_are_no_part_of_it(tmp_path: Path, written: str) -> None:
    other = {**KEYS, "general.name": "renamed", "general.license": "mit", "tokenizer.ggml.model": "gpt2"}
    assert write(tmp_path / "renamed.gguf", tensors(), keys=other) == written


def test_the_order_of_keys_and_tensors_and_the_padding_are_no_part_of_it(tmp_path: Path, written: str) -> None:
    backwards = dict(reversed(tensors().items()))
    keys = {key: KEYS[key] for key in reversed(list(KEYS))}
    assert write(tmp_path / "other.gguf", backwards, keys=keys, alignment=256) == written


def test_the_division_into_files_is_no_part_of_it(tmp_path: Path, written: str) -> None:
    split = tmp_path / "split"
    split.mkdir()
    assert write(split / "base.gguf", tensors(), max_tensors=1) == written
    assert len(list(split.iterdir())) == len(tensors())


@pytest.mark.parametrize("key", ["llama.block_count", "llama.rope.dimension_sections"])
def test_another_architecture_is_another_base(tmp_path: Path, written: str, key: str) -> None:
    changed: Any = [1, 2, 4] if isinstance(KEYS[key], list) else 2
    assert write(tmp_path / "changed.gguf", tensors(), keys={**KEYS, key: changed}) != written
    assert write(tmp_path / "less.gguf", tensors(), keys={name: KEYS[name] for name in KEYS if name != key}) != written


@pytest.mark.parametrize("name", list(tensors()))
@pytest.mark.parametrize("place", [0, -1])
def test_a_change_at_either_end_of_any_tensor_is_seen(tmp_path: Path, written: str, name: str, place: int) -> None:
    changed = {key: value.copy() for key, value in tensors().items()}
    changed[name].flat[place] += 1
    assert write(tmp_path / "changed.gguf", changed) != written


def test_another_name_shape_or_type_of_a_tensor_is_another_base(tmp_path: Path, written: str) -> None:
    whole = tensors()
    large = whole["output.weight"]
    others: list[dict[str, np.ndarray[Any, Any]]] = [
        whole | {"output.weight": large.reshape(400, 1000)},
        whole | {"output_norm.weight": whole["output_norm.weight"].astype(np.float16)},
        {("head" if name == "output.weight" else name): value for name, value in whole.items()},
    ]
    found = {write(tmp_path / f"{number}.gguf", other) for number, other in enumerate(others)}
    assert len(found) == 3 and written not in found
