"""Where a base's files are, told from the setting alone: without torch, so that a wrong one is told at once."""

from __future__ import annotations

import glob
import json
from importlib.resources import files
from pathlib import Path

from server.errors import BaseModelNotFound, BaseModelRefused
from server.settings import EMBEDDED_BASE

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_NESTED_FILES = ["*/*"]
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"


def find_base(base_model: str) -> Path:
    """The folder of the embedded base, of a base on disk, or of one from the hub (fetched once, then cached).

    Raises ``BaseModelNotFound``.
    """
    return base_on_disk(base_model) or _from_hub(base_model)


def base_on_disk(base_model: str) -> Path | None:
    """The folder of a base that is no hub's; None for a hub id. Raises ``BaseModelNotFound`` for what is neither."""
    if base_model == EMBEDDED_BASE:
        return Path(str(files("micro_base")))
    path = Path(base_model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BaseModelNotFound(
                f"the folder {base_model} has no config.json: is it a model as transformers saves it?"
            )
        return path
    if path.is_absolute() or base_model.startswith(".") or base_model.count("/") != 1:
        raise BaseModelNotFound(
            f"there is no base model {base_model!r}: base_model must be 'micro', an existing folder, or a hub id such "
            "as 'Qwen/Qwen2.5-0.5B-Instruct'"
        )
    return None


def weight_files(folder: Path) -> list[Path]:
    """The files that a base is loaded from: ``model.safetensors``, or the shards that the index names, by name.

    Raises ``OSError``, ``ValueError`` or another error of malformed data where neither can be read.
    """
    if (single := folder / WEIGHTS_FILE).exists():
        return [single]
    return [folder / name for name in _shards(folder)]


def num_weight_bytes(folder: Path) -> int:
    """Bytes of the files that a base is loaded from; other weights may lie beside them.

    Raises ``BaseModelRefused`` where one is missing.
    """
    try:
        return sum(path.stat().st_size for path in weight_files(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelRefused(folder.name, f"its safetensors are missing or malformed: {error}") from error


def _shards(folder: Path) -> list[str]:
    index = json.loads((folder / INDEX_FILE).read_bytes())
    return sorted(set(index["weight_map"].values()))


def _from_hub(repo_id: str) -> Path:
    """Small files first, then the weights that the index among them names: a repository may hold others beside them.

    The second call names the commit of the first one, whose folder is named after it.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=_SMALL_FILES, ignore_patterns=_NESTED_FILES))
        weights = _shards(folder) if (folder / INDEX_FILE).exists() else [WEIGHTS_FILE]
        wanted = [*map(glob.escape, weights), _NAMED_TEMPLATES]
        return Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=wanted))
    except Exception as error:
        raise BaseModelNotFound(
            f"the base model {repo_id!r} is no folder here and could not be had from the hub ({type(error).__name__}): "
            "check the name and the network, or name a folder"
        ) from error
