"""One adapter folder, read once and judged: everything served comes from the bytes taken here.

Files are opened relative to the folder's descriptor, without following links, and read whole into private memory, so
that nothing that happens to the folder afterwards reaches a running model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.adapters.peft_config import LoRAConfig, parse_peft_config
from server.adapters.safetensors import TensorEntry, read_header
from server.adapters.sidecar import Sidecar, parse_sidecar
from server.errors import AdapterRejected
from server.metrics import BASE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE = "adapter_config.json", "adapter_model.safetensors", "quickchange.json"
MAX_JSON_BYTES = 1024 * 1024
_LORA_TENSOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(A|B)\.weight$")
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class BaseSignature:
    """What an adapter must fit: linear modules by name with (in_features, out_features), and the base's fingerprint."""

    name: str
    fingerprint: str
    modules: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Limits:
    """Largest rank, and most bytes of a weights file."""

    max_rank: int
    max_bytes: int


@dataclass(frozen=True)
class LoRAPair:
    """One module's A [rank, in] and B [out, rank], as entries of the file."""

    a: TensorEntry
    b: TensorEntry

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Manifest:
    """A folder's content, checked for itself and against the base."""

    name: str
    path: Path
    config: LoRAConfig
    sidecar: Sidecar | None
    pairs: Mapping[str, LoRAPair]
    weights_digest: str
    version_digest: str
    created: int
    data: bytes = field(repr=False)

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(pair.rank for pair in self.pairs.values())


def read_manifest(path: Path, base: BaseSignature, limits: Limits) -> Manifest:
    """Read and judge the folder. Raises ``AdapterRejected`` with a sentence that says what to do."""
    name = path.name
    if not NAME.fullmatch(name):
        raise AdapterRejected(
            name, "the folder's name is no model name: use letters, digits, '.', '_' and '-', 128 at most"
        )
    if name in (base.name, BASE):
        raise AdapterRejected(name, "this name means the base model: rename the folder")
    try:
        return _read(path, base, limits)
    except ValueError as error:
        raise AdapterRejected(name, str(error)) from None
    except OSError as error:
        raise AdapterRejected(name, f"cannot be read: {error.strerror}") from None


def _read(path: Path, base: BaseSignature, limits: Limits) -> Manifest:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        config_bytes = _read_file(folder, CONFIG_FILE, MAX_JSON_BYTES)
        weights = _read_file(folder, WEIGHTS_FILE, limits.max_bytes)
        sidecar_bytes = _read_file(folder, SIDECAR_FILE, MAX_JSON_BYTES)
        created = int(os.fstat(folder).st_mtime)
        if config_bytes is None or weights is None:
            raise ValueError(_what_is_missing(set(os.listdir(folder))))
    finally:
        os.close(folder)
    config = parse_peft_config(_json(config_bytes, CONFIG_FILE))
    sidecar = None if sidecar_bytes is None else parse_sidecar(_json(sidecar_bytes, SIDECAR_FILE))
    try:
        entries = read_header(weights)
    except ValueError as error:
        raise ValueError(f"{WEIGHTS_FILE}: {error}") from None
    pairs = _pairs(entries)
    _check_sidecar(sidecar, base)
    _check_base(pairs, base)
    _check_ranks(pairs, config, limits.max_rank)
    weights_digest = _digest(config_bytes, weights)
    return Manifest(
        name=path.name,
        path=path,
        config=config,
        sidecar=sidecar,
        pairs=pairs,
        weights_digest=weights_digest,
        version_digest=_digest(weights_digest.encode(), sidecar_bytes or b""),
        created=created,
        data=weights,
    )


def _read_file(folder: int, name: str, limit: int) -> bytes | None:
    """The whole file, or None where there is none; links and special files are refused unopened."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError:
        raise ValueError(f"{name} is a link or cannot be opened: put the file itself there") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{name} has {status.st_size} bytes; the limit is {limit}")
        return file.read(limit + 1)


def _what_is_missing(names: set[str]) -> str:
    if WEIGHTS_FILE not in names and any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names):
        return (
            f"{WEIGHTS_FILE} is missing and the weights are a pickle, which can run code when opened; load the adapter "
            "with PEFT where you trust it and save it again: save_pretrained writes safetensors"
        )
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names]
    return (
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: copy PEFT's two files into the folder"
    )


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None


def _pairs(entries: Mapping[str, TensorEntry]) -> dict[str, LoRAPair]:
    halves: dict[str, dict[str, TensorEntry]] = {}
    strange = []
    for name, entry in entries.items():
        match = _LORA_TENSOR.match(name)
        if match is None:
            strange.append(name)
        else:
            halves.setdefault(match[1], {})[match[2]] = entry
            if entry.dtype not in _FLOATS or len(entry.shape) != 2:
                raise ValueError(
                    f"tensor {name} is {entry.dtype} of shape {list(entry.shape)}: LoRA wants a float matrix"
                )
    if strange:
        raise ValueError(f"it holds tensors that are not LoRA's A and B of a linear layer: {_first(strange)}")
    if not halves:
        raise ValueError("it holds no tensors, so it would change nothing")
    if single := [module for module, half in halves.items() if len(half) != 2]:
        raise ValueError(f"A or B is missing for {_first(single)}")
    return {module: LoRAPair(half["A"], half["B"]) for module, half in halves.items()}


def _check_sidecar(sidecar: Sidecar | None, base: BaseSignature) -> None:
    if sidecar is None:
        return
    if sidecar.base.fingerprint != base.fingerprint:
        raise ValueError(
            f"it was trained on another base ({sidecar.base.name}, fingerprint {sidecar.base.fingerprint[:19]}); this "
            f"server runs {base.name} ({base.fingerprint[:19]}): start it with that base, or train the adapter again"
        )
    if sidecar.chat_template is not None:
        raise ValueError(f"{SIDECAR_FILE}: chat_template is not served; train the adapter with the base's own template")


def _check_base(pairs: Mapping[str, LoRAPair], base: BaseSignature) -> None:
    if unknown := [module for module in pairs if module not in base.modules]:
        raise ValueError(
            f"the base {base.name} has no linear module {_first(unknown)}: was it trained on another base?"
        )
    wrong = []
    for module, pair in pairs.items():
        in_features, out_features = base.modules[module]
        if pair.a.shape != (pair.rank, in_features) or pair.b.shape != (out_features, pair.rank):
            wrong.append(
                f"{module} (A {list(pair.a.shape)}, B {list(pair.b.shape)}; "
                f"the base needs [{pair.rank}, {in_features}] and [{out_features}, {pair.rank}])"
            )
    if wrong:
        raise ValueError(f"tensors do not fit the base {base.name}: {_first(wrong)}")


def _check_ranks(pairs: Mapping[str, LoRAPair], config: LoRAConfig, max_rank: int) -> None:
    for module, pair in pairs.items():
        if pair.rank > max_rank:
            raise ValueError(f"its rank is {pair.rank}; the limit is {max_rank} (setting max_lora_rank)")
        if pair.rank != config.rank(module):
            raise ValueError(
                f"the tensors of {module} have rank {pair.rank}, and {CONFIG_FILE} says {config.rank(module)}: "
                "they are not of one adapter"
            )


def _first(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()
