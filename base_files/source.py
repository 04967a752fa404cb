"""A base on disk, whatever its format: config, tensors and fingerprints, for server and trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from base_files.experts import with_experts
from base_files.fingerprint import base_fingerprint, base_fingerprint_v2
from base_files.safetensors_header import read_header
from base_files.tensors import SafetensorsTensor, StoredTensor
from base_files.vocabulary import folder_token_texts
from base_files.weight_files import malformed_if_unreadable, num_weight_bytes, weight_files


@dataclass(frozen=True)
class Fingerprints:
    """``v1`` is None where the format has none."""

    v1: str | None
    v2: str


class BaseSource(Protocol):
    """The files of one base. ``name`` never holds a path; ``path`` is the folder, or a GGUF file."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What transformers' ``config.json`` says."""

    @property
    def num_weight_bytes(self) -> int:
        """Size of the weight files."""

    def fingerprints(self) -> Fingerprints: ...

    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by the name of the parameter that it becomes in transformers."""

    def token_texts(self) -> Mapping[int, str] | None:
        """The tokens by id, as the tokenizer's file writes them; None if they are unknown."""


def num_float_bytes(source: BaseSource) -> int:
    """Size of the weights in floats: as the files have them, but 2 bytes for a number that is quantized there."""
    total = 0
    for tensor in source.tensors().values():
        total += max(tensor.num_bytes, 2 * math.prod(tensor.shape))
    return total


@dataclass(frozen=True)
class FolderBase:
    """A folder as transformers saves it: ``config.json``, safetensors, tokenizer."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config(self) -> Mapping[str, Any]:
        with malformed_if_unreadable(self.path):
            config: dict[str, Any] = json.loads((self.path / "config.json").read_bytes())
            return config

    @property
    def num_weight_bytes(self) -> int:
        return num_weight_bytes(self.path)

    def fingerprints(self) -> Fingerprints:
        return Fingerprints(base_fingerprint(self.path), base_fingerprint_v2(self.path))

    def tensors(self) -> Mapping[str, StoredTensor]:
        """By the names in the files, which for most architectures are those of the parameters; experts are joined."""
        with malformed_if_unreadable(self.path):
            entries = [(path, entry) for path in weight_files(self.path) for entry in read_header(path).values()]
            return with_experts({entry.name: SafetensorsTensor(path, entry) for path, entry in entries})

    def token_texts(self) -> Mapping[int, str] | None:
        with malformed_if_unreadable(self.path):
            return folder_token_texts(self.path)
