"""The frozen base: where it is, how it is loaded, and the fingerprint that ties an adapter to it."""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import BaseModelError

EMBEDDED_BASE = "micro"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES, NESTED_FILES = ("*.json", "*.jinja", "*.model", "*.txt"), ("*/*",)
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
EDGE_BYTES = 64 * 1024
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


@dataclass(frozen=True)
class Base:
    """A base in memory. ``name`` never holds a path: it goes into published files."""

    name: str
    folder: Path
    fingerprint: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def embedded_base_path() -> Path:
    """The folder of ``micro``. Raises ``BaseModelError`` where the data package is not installed or has no weights."""
    try:
        folder = Path(str(importlib.resources.files("micro_base")))
    except ModuleNotFoundError as error:
        raise BaseModelError("the embedded base is missing: package micro_base is not installed") from error
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"the embedded base is missing: {folder} has no config.json; name another base_model")
    return folder


def find_base(base_model: str) -> tuple[str, Path]:
    """The name and folder of ``micro``, of a folder, or of a hub id, which is downloaded unless the cache has it."""
    if base_model == EMBEDDED_BASE:
        return EMBEDDED_BASE, embedded_base_path()
    folder = Path(base_model).expanduser()
    if folder.is_dir():
        return folder.resolve().name, folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):
        raise BaseModelError(
            f"base_model {base_model!r}: no such folder; use 'micro', a folder with a config.json or a hub id"
        )
    try:
        return base_model, _download(base_model)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"base_model {base_model!r}: no such folder here, and the hub did not give it: {error}"
        ) from error


def _download(repo_id: str) -> Path:
    """The folder of a hub's repository: its small files, then only the weights that the index among them names.

    Repositories hold the same weights in several formats and folders. The second call is for the commit that the first
    one found, whose folder has its name.
    """
    folder = Path(snapshot_download(repo_id, allow_patterns=list(SMALL_FILES), ignore_patterns=list(NESTED_FILES)))
    weights = _shards(folder) if (folder / INDEX_FILE).is_file() else [WEIGHTS_FILE]
    wanted = [glob.escape(name) for name in weights]
    return Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=[*wanted, NAMED_TEMPLATES]))


def load_base(base_model: str) -> Base:
    """The base in float32 with its tokenizer. Remote code and pickled weights are never read."""
    name, folder = find_base(base_model)
    fingerprint = base_fingerprint(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, ImportError) as error:
        raise BaseModelError(f"base_model {base_model!r}: transformers cannot load {folder}: {error}") from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise BaseModelError(
            f"base_model {base_model!r}: its tokenizer needs a chat template, an end-of-turn token and the fast form; "
            "use an instruction-tuned base"
        )
    model.requires_grad_(False)
    model.name_or_path = name  # PEFT writes it into adapter_config.json, where a path of this machine helps nobody
    return Base(name, folder, fingerprint, model, tokenizer)


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
    try:
        config = json.loads((folder / "config.json").read_bytes())
        paths = _weight_files(folder)
        headers = [entry for path in paths for entry in _tensors(path)]
        digest = hashlib.sha256(b"quickchange-base-v1\n")
        for entry in sorted(headers):
            digest.update(_canonical(entry))
        digest.update(_canonical(_architecture(config)))
        for path in paths:
            digest.update(_edges(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{folder}: no fingerprint: config.json or safetensors missing or malformed: {error}"
        ) from error
    return f"sha256:{digest.hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    single = folder / WEIGHTS_FILE
    if single.is_file():
        return [single]
    return [folder / name for name in _shards(folder)]


def _shards(folder: Path) -> list[str]:
    index = json.loads((folder / INDEX_FILE).read_bytes())
    return sorted(set(index["weight_map"].values()))


def _tensors(path: Path) -> list[list[Any]]:
    """``[name, shape, dtype]`` of each tensor in the header of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is not safetensors: its header would have {length} bytes")
        header = json.loads(file.read(length))
    return [[name, entry["shape"], entry["dtype"]] for name, entry in header.items() if name != "__metadata__"]


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
