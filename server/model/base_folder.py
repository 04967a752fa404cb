"""Where a base's files are, told from the setting alone: without torch, so that a wrong one is told at once."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from server.errors import BaseModelNotFound
from server.settings import EMBEDDED_BASE

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


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


def num_weight_bytes(folder: Path) -> int:
    """Bytes of a base's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise BaseModelNotFound(
            f"the base model {repo_id!r} is no folder here and could not be had from the hub ({type(error).__name__}): "
            "check the name and the network, or name a folder"
        ) from error
