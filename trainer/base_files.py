"""Where the files of a base are, and what of a hub's repository is fetched."""

from __future__ import annotations

import glob
import importlib.resources
import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from trainer.errors import BaseModelError

EMBEDDED_BASE = "micro"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES, NESTED_FILES = ("*.json", "*.jinja", "*.model", "*.txt"), ("*/*",)
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"


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


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: ``model.safetensors``, or the shards that the index names, by name."""
    single = folder / WEIGHTS_FILE
    if single.is_file():
        return [single]
    return [folder / name for name in _shards(folder)]


def _shards(folder: Path) -> list[str]:
    index = json.loads((folder / INDEX_FILE).read_bytes())
    return sorted(set(index["weight_map"].values()))
