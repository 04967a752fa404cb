"""Finds the files of a base. Imports no torch, so that a wrong ``base_model`` is refused within milliseconds."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from base_files.errors import BaseNotFound
from base_files.gguf.base import GGUFBase
from base_files.gguf.file import find_gguf, is_gguf
from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from base_files.packaged import PACKAGED_BASES
from base_files.source import BaseSource, FolderBase
from base_files.weight_files import INDEX_FILE, WEIGHTS_FILE, shards

_ACCEPTED = f"base_model must be {BASE_MODEL_HELP} such as 'Qwen/Qwen2.5-0.5B-Instruct'"
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
"""A base's name without a path, or a hub id."""
_NESTED_FILES = ["*/*"]
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"


def find_base(base_model: str) -> BaseSource:
    """The embedded base, a base on disk, or a base from the hub (fetched once, then cached).

    Raises ``BaseNotFound``.
    """
    return base_on_disk(base_model) or FolderBase(_from_hub(base_model))


def base_on_disk(base_model: str) -> BaseSource | None:
    """The embedded base or a base on disk; None for a hub id. Raises ``BaseNotFound`` otherwise."""
    if base_model == EMBEDDED_BASE:
        return FolderBase(_embedded_base())
    if base_model in PACKAGED_BASES:
        return _gguf_base(PACKAGED_BASES[base_model].installed_path(), base_model)
    try:
        path = Path(base_model).expanduser()
        if path.is_dir():
            return _in_folder(path)
        if is_gguf(path):
            return _gguf_base(path)
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:
        raise BaseNotFound(base_model, f"its path cannot be used: {error}") from error
    except ValueError as error:
        raise BaseNotFound(base_model, str(error)) from error
    if is_file:
        raise BaseNotFound(base_model, f"the file is not a GGUF; {_ACCEPTED}")
    if path.is_absolute() or base_model.startswith(".") or base_model.count("/") != 1 or path.suffix == ".gguf":
        raise BaseNotFound(base_model, f"no such folder or file; {_ACCEPTED}")
    return None


def local_bases(name: str, *, near: Path) -> Iterator[BaseSource]:
    """Bases of this name on this machine: embedded, fetched, in the folder ``near``, in the hub's cache.

    ``name`` is a stranger's. No path is followed and nothing is downloaded.
    """
    if not _NAME.fullmatch(name):
        return
    places = [name] if name == EMBEDDED_BASE or name in PACKAGED_BASES else []
    places += [str(near / part) for part in (name, f"{name}.gguf") if "/" not in name and (near / part).exists()]
    for place in places:
        with suppress(BaseNotFound):
            if (source := base_on_disk(place)) is not None:
                yield source
    if "/" in name and (folder := _in_hub_cache(name)) is not None:
        yield FolderBase(folder)


def _in_folder(folder: Path) -> BaseSource:
    """A model as transformers saves it, or else the one in GGUF. Raises ``ValueError`` or ``OSError``."""
    has_config = (folder / "config.json").exists()
    gguf = None if has_config and _has_weights(folder) else find_gguf(folder)
    if gguf is not None:
        return _gguf_base(gguf, folder.resolve().name)
    if not has_config:
        raise ValueError("the folder has no config.json and no GGUF file: is it a model as transformers saves it?")
    return FolderBase(folder)


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS_FILE).exists() or (folder / INDEX_FILE).exists()


def _gguf_base(path: Path, name: str | None = None) -> GGUFBase:
    """With the sampling parameters of a packaged base, if it is its file, wherever that lies. Raises ``OSError``."""
    file = path.resolve(strict=True)
    for packaged in PACKAGED_BASES.values():
        if file.name == packaged.file_name and file.stat().st_size == packaged.num_bytes:
            return GGUFBase(path, name, packaged.sampling)
    return GGUFBase(path, name)


def _embedded_base() -> Path:
    try:
        folder = Path(str(files("micro_base")))
    except ModuleNotFoundError as error:
        raise BaseNotFound(EMBEDDED_BASE, "the package micro_base is not installed") from error
    if not (folder / "config.json").is_file():
        raise BaseNotFound(EMBEDDED_BASE, f"{folder} has no config.json; name another base_model")
    return folder


def _in_hub_cache(repo_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _from_hub(repo_id: str) -> Path:
    """Download the small files first, then only the weight files that the index names.

    Repositories hold the same weights in several formats and folders. The second download names the commit of the
    first, which is the name of its folder, so that both are of one version.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=_SMALL_FILES, ignore_patterns=_NESTED_FILES))
        weights = shards(folder) if (folder / INDEX_FILE).exists() else [WEIGHTS_FILE]
        wanted = [*map(glob.escape, weights), _NAMED_TEMPLATES]
        folder = Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=wanted))
    except Exception as error:
        reason = getattr(error, "strerror", None) or type(error).__name__  # a full disk says so
        raise BaseNotFound(
            repo_id,
            f"it is not a folder, and could not be downloaded from the hub ({reason}): check the name and the network, "
            "or name a folder",
        ) from error
    has_config = (folder / "config.json").exists()
    if not has_config or not _has_weights(folder):
        missing = "safetensors of transformers" if has_config else "config.json"
        raise BaseNotFound(
            repo_id, f"its repository has no {missing}; if it holds GGUF files, download one and name its path"
        )
    return folder
