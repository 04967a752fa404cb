"""GGUF files: a model, or one that is split into parts, with its metadata and its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.gguf.header import MAGIC, GGUFHeader, Value, read_header
from base_files.gguf.tensor import GGUFTensor

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_SPLIT_NO, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class GGUFFile:
    """The files of one model, the first of which has the metadata; tensors by name. Arrays of numbers are numpy's."""

    paths: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]

    @property
    def path(self) -> Path:
        return self.paths[0]

    def read(self, name: str) -> NDArray[Any]:
        """A tensor of float32, or of float16 where it is stored so. Raises ``ValueError`` or ``OSError``."""
        values = self.tensors[name].read()
        return values.astype(np.float16) if self.tensors[name].dtype == "F16" else values


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header, and those of all other parts of a split model, any of which ``path`` may be.

    Raises ``ValueError`` with a sentence that says what is wrong, or ``OSError``.
    """
    header = read_header(path)
    if _SPLIT_COUNT not in header.metadata or _whole_number(header, _SPLIT_COUNT) < 2:
        return GGUFFile((path,), header.metadata, header.tensors)
    parts = [_read_part(part, header) for part in _part_paths(header)]
    for number, part in enumerate(parts):
        _check_part(part, parts[0], number, len(parts))
    return _joined(parts)


def _part_paths(header: GGUFHeader) -> list[Path]:
    """Paths of all parts, by the name of one of them."""
    count, number = _whole_number(header, _SPLIT_COUNT), _whole_number(header, _SPLIT_NO)
    match = _PART_NAME.fullmatch(header.path.name)
    if not match or (int(match["number"]), int(match["count"])) != (number + 1, count):
        raise ValueError(
            f"it is part {number + 1} of {count} by its split.no and split.count, and its name is not "
            f"NAME-{number + 1:05}-of-{count:05}.gguf: give all parts their names back"
        )
    names = (f"{match['stem']}-{part:05}-of-{count:05}{match['suffix']}" for part in range(1, count + 1))
    return [header.path.with_name(name) for name in names]


def _read_part(path: Path, given: GGUFHeader) -> GGUFHeader:
    if path == given.path:
        return given
    try:
        return read_header(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"its part {path.name} is missing: all parts must be in the same folder") from None


def _check_part(part: GGUFHeader, first: GGUFHeader, number: int, count: int) -> None:
    for key, wanted in ((_SPLIT_NO, number), (_SPLIT_COUNT, count)):
        found = _whole_number(part, key)
        if found != wanted:
            raise ValueError(f"{part.path.name}: {key} is {found}, and by its place among the parts it is {wanted}")
    if part.alignment != first.alignment:
        raise ValueError(
            f"{part.path.name}: its alignment is {part.alignment}, that of {first.path.name} is {first.alignment}: "
            "merge the parts with llama-gguf-split --merge"
        )
    for key, value in part.metadata.items():
        if not key.startswith("split.") and not _is_same(value, first.metadata.get(key)):
            raise ValueError(f"{part.path.name}: {key} is not as in {first.path.name}, which has the metadata")


def _is_same(value: Value, other: Value | None) -> bool:
    return other is not None and np.array_equal(np.asarray(value), np.asarray(other))


def _whole_number(header: GGUFHeader, key: str) -> int:
    value = header.metadata.get(key)
    if type(value) is not int or value < 0:
        raise ValueError(f"{header.path.name}: {key} is {value!r:.40}: it must be a number of 0 or more")
    return value


def _joined(parts: list[GGUFHeader]) -> GGUFFile:
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        if twice := next((name for name in part.tensors if name in tensors), None):
            raise ValueError(f"{part.path.name}: tensor {twice} is in {tensors[twice].path.name} too")
        tensors |= part.tensors
    for part in parts:
        if (announced := _whole_number(part, _SPLIT_TENSORS)) != len(tensors):
            raise ValueError(f"{part.path.name}: {_SPLIT_TENSORS} is {announced}, and all parts hold {len(tensors)}")
    return GGUFFile(tuple(part.path for part in parts), parts[0].metadata, tensors)


def check_is_model(metadata: Mapping[str, Value]) -> None:
    """Raises ``ValueError`` for what GGUF files hold beside models, by what it is."""
    if kind := _kind_beside_models(metadata):
        raise ValueError(f"it is {kind}, no model")


_KINDS_BESIDE_MODELS = {
    "adapter": "a LoRA adapter (quickchange adapters convert makes a PEFT folder of it)",
    "mmproj": "a projector of images or sound (mmproj)",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary without weights",
}
"""By ``general.type``."""
_ARCHITECTURES_BESIDE_MODELS = {"clip": _KINDS_BESIDE_MODELS["mmproj"], "controlvector": "a control vector"}
"""By ``general.architecture``, for files without a type."""


def _kind_beside_models(metadata: Mapping[str, Value]) -> str | None:
    """None for a model."""
    kind = str(metadata.get("general.type", "model"))
    if kind != "model":
        return _KINDS_BESIDE_MODELS.get(kind, f"of general.type {kind!r:.40}")
    return _ARCHITECTURES_BESIDE_MODELS.get(str(metadata.get("general.architecture")))


def find_gguf(folder: Path) -> Path | None:
    """The one model among the GGUF files of a folder, its first part where it is split; None without GGUF files.

    Files that hold no model (mmproj, adapters) may lie beside it. Raises ``ValueError`` where there is no model or
    more than one, or ``OSError``.
    """
    files = _without_later_parts(sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf"))
    if len(files) < 2:
        return next(iter(files), None)
    kinds = {path: _kind_of_file(path) for path in files}
    models = [path for path, kind in kinds.items() if kind is None]
    if len(models) == 1:
        return models[0]
    if models:
        raise ValueError(f"the folder holds {len(models)} models in GGUF: name the file, one of {_names(models)}")
    raise ValueError(
        "the folder holds no model in GGUF: " + ", ".join(f"{path.name} is {kinds[path]}" for path in files)
    )


def _without_later_parts(paths: list[Path]) -> list[Path]:
    """The first part that is there stands for all of them."""
    found: dict[object, Path] = {}
    for path in paths:
        match = _PART_NAME.fullmatch(path.name)
        found.setdefault((match["stem"], match["count"]) if match else path, path)
    return list(found.values())


def _kind_of_file(path: Path) -> str | None:
    """A file that cannot be read counts as a model, so that it is named."""
    try:
        return _kind_beside_models(read_header(path).metadata)
    except ValueError:
        return None


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
