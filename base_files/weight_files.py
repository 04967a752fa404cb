"""The weight files of a folder as transformers saves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base_files.errors import BaseMalformed

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: ``model.safetensors``, or the shards that the index names, by name.

    Raises ``BaseMalformed`` where the index cannot be read.
    """
    single = folder / WEIGHTS_FILE
    if single.exists():
        return [single]
    with malformed_if_unreadable(folder):
        return [folder / name for name in shards(folder)]


def shards(folder: Path) -> list[str]:
    """Names of the files that the index lists."""
    index = json.loads((folder / INDEX_FILE).read_bytes())
    return sorted(set(index["weight_map"].values()))


def num_weight_bytes(folder: Path) -> int:
    """Size of the weight files in bytes. Raises ``BaseMalformed`` where one is missing."""
    with malformed_if_unreadable(folder):
        return sum(path.stat().st_size for path in weight_files(folder))


@contextmanager
def malformed_if_unreadable(folder: Path) -> Iterator[None]:
    """Turn errors of missing or malformed files into ``BaseMalformed``."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseMalformed(folder.name, f"config.json or its safetensors are missing or malformed: {error}") from error
